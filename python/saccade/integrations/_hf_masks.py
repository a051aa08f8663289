"""transformers' mask functions read back into a saccade.Mask, instead of being evaluated for every pair.

transformers describes a mask by nested closures over (batch, head, query, key) positions. Those that its
`masking_utils` makes are recognised by name and by what they close over. Nothing else is: the caller then has
the mask laid out. `trust` compares every reading with transformers' own on small cases first, so that a
later version that means something else by the same name is laid out too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masks import Band, KeyPadding, Mask, Segments

_MODULE = "transformers.masking_utils"


class Unread(Exception):
    """A mask function that is none of those known."""


@dataclass(frozen=True)
class Region:
    """The queries and keys of a call as transformers counts them: from the offsets on."""

    batch: int
    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    device: torch.device
    trusted: frozenset[str]  # the mask functions that mean what is read here

    def band(self, left: int | None, right: int | None) -> list[Mask]:
        """Keys from `left` before to `right` after the query's position."""
        shift = self.q_offset - self.kv_offset  # what key index - query index is at equal positions
        if shift == self.kv_length - self.q_length:
            return [Band(left, right)]
        bounds = (None if left is None else left - shift, None if right is None else right + shift)
        return [Band(*bounds, align="start")]

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Those of the queries [1, Sq] and of the keys [1, Sk]."""
        q = torch.arange(self.q_length, device=self.device) + self.q_offset
        k = torch.arange(self.kv_length, device=self.device) + self.kv_offset
        return q[None], k[None]

    @property
    def is_square(self) -> bool:
        return self.q_length == self.kv_length and self.q_offset == self.kv_offset == 0


def read(function: Callable[..., Any], region: Region, padding: Tensor | None) -> Mask:
    """The mask of a call. `padding`: [B, at least all keys] bool, True for real tokens. Raises Unread."""
    return _joined(_read(function, region, None), region, padding)


def _joined(parts: list[Mask], region: Region, padding: Tensor | None) -> Mask:
    if padding is not None:
        keep = padding[:, region.kv_offset : region.kv_offset + region.kv_length].bool()
        missing = region.kv_length - keep.shape[1]
        if missing:  # keys of a static cache that nothing was written to yet
            keep = torch.nn.functional.pad(keep, (0, missing))
        if not _all(keep):
            parts.append(KeyPadding(keep=keep.to(region.device)))
    bands = [part for part in parts if isinstance(part, Band)]
    rest = [part for part in parts if not isinstance(part, Band)]
    return functools.reduce(lambda a, b: a & b, [*bands, *rest] or [Band()])


def read_traced(function: Any, region: Region, padding: Tensor | None, options: dict[str, Any]) -> Mask:
    """`read` under torch.compile, which cannot look into a closure: the plain functions are known by
    identity, a sliding window by what transformers says of it (its length, and that only padding joins it).
    """
    from transformers import masking_utils as theirs

    if function is theirs.causal_mask_function and "causal_mask_function" in region.trusted:
        return _joined(region.band(None, 0), region, padding)
    if function is theirs.bidirectional_mask_function and "bidirectional_mask_function" in region.trusted:
        return _joined([], region, padding)
    window, config = options.get("local_size"), options.get("config")
    chunk = getattr(config, "attention_chunk_size", None)
    if not options.get("allow_is_causal_skip") or window is None or chunk is not None:
        raise Unread("traced")
    if window != getattr(config, "sliding_window", None) or "sliding_window_overlay" not in region.trusted:
        raise Unread("traced")
    return _joined(region.band(window - 1, 0), region, padding)


def _all(keep: Tensor) -> bool:
    # A GPU is not waited for, and a traced value not looked at: then the padding is passed on as it is.
    return keep.device.type == "cpu" and not torch.compiler.is_compiling() and bool(keep.all())


def _read(function: Callable[..., Any], region: Region, positions: Tensor | None) -> list[Mask]:
    """`positions`: [B, S], where sequences are packed and count from 0 each."""
    name = _name(function)
    if name not in region.trusted or getattr(function, "__module__", "") != _MODULE:
        raise Unread(name)
    try:
        return _READERS[name](region, positions, **_cells(function))
    except TypeError as error:  # it closes over something else than it did
        raise Unread(name) from error


def _name(function: Callable[..., Any]) -> str:
    """The function, or the one that made it."""
    return str(getattr(function, "__qualname__", "")).split(".")[0]


def _cells(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function closes over, by name."""
    cells: Any = getattr(function, "__closure__", None) or ()
    return {n: c.cell_contents for n, c in zip(function.__code__.co_freevars, cells, strict=True)}


def _causal(region: Region, positions: Tensor | None) -> list[Mask]:
    return region.band(None, 0)


def _bidirectional(region: Region, positions: Tensor | None) -> list[Mask]:
    return []


def _sliding(region: Region, positions: Tensor | None, *, sliding_window: int) -> list[Mask]:
    return region.band(sliding_window - 1, None)


def _sliding_both(region: Region, positions: Tensor | None, *, sliding_window: int) -> list[Mask]:
    return region.band(sliding_window, sliding_window)


def _chunked(
    region: Region, positions: Tensor | None, *, chunk_size: int, left_padding: Tensor
) -> list[Mask]:
    q, k = region.positions if positions is None else (positions, positions)
    q, k = ((x - left_padding[:, None]).div(chunk_size, rounding_mode="floor").int() for x in (q, k))
    return [Segments(q, k)]


def _packed(region: Region, positions: Tensor | None, *, packed_sequence_mask: Tensor) -> list[Mask]:
    if not region.is_square:
        raise Unread("packed sequences with a cache")
    return [Segments(packed_sequence_mask.int())]


def _and(region: Region, positions: Tensor | None, *, mask_functions: tuple[Any, ...]) -> list[Mask]:
    names = [_name(function) for function in mask_functions]
    found: list[Mask] = []
    for name, function in zip(names, mask_functions, strict=True):
        if name == _REMAP:
            # Within a packed sequence positions count on as indices do, so what asks for differences only is
            # the same for both; between sequences nothing is kept.
            if name not in region.trusted or "packed_sequence_mask_function" not in names:
                raise Unread(name)
            cells = _cells(function)
            found += _read(cells["mask_function"], region, cells["position_ids"])
        else:
            found += _read(function, region, positions)
    return found


_REMAP = "remap_positions_for_packed_sequence"
_READERS: dict[str, Callable[..., list[Mask]]] = {
    "causal_mask_function": _causal,
    "bidirectional_mask_function": _bidirectional,
    "sliding_window_overlay": _sliding,
    "sliding_window_bidirectional_overlay": _sliding_both,
    "chunked_overlay": _chunked,
    "packed_sequence_mask_function": _packed,
    "and_masks": _and,
}


TRUSTED: frozenset[str] = frozenset()  # what `trust` found


def trust() -> None:
    """Find the mask functions whose reading is transformers' own mask on small cases."""
    global TRUSTED
    from transformers import masking_utils as theirs

    left = torch.tensor([0, 2])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]])
    ids = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]])
    makers: dict[tuple[str, ...], Callable[[], Any]] = {
        ("causal_mask_function",): lambda: theirs.causal_mask_function,
        ("bidirectional_mask_function",): lambda: theirs.bidirectional_mask_function,
        ("sliding_window_overlay", "and_masks"): lambda: theirs.sliding_window_causal_mask_function(3),
        ("sliding_window_bidirectional_overlay",): lambda: theirs.sliding_window_bidirectional_overlay(2),
        ("chunked_overlay",): lambda: theirs.chunked_overlay(3, left),
        ("packed_sequence_mask_function", _REMAP): lambda: theirs.packed_sequence_compatibility_function(
            theirs.sliding_window_causal_mask_function(3), positions, ids
        ),
    }
    every = frozenset((*_READERS, _REMAP))
    found = set(every)
    for names, make in makers.items():
        try:
            function = make()
            packed = _REMAP in names
            if not all(
                _agrees(theirs.sdpa_mask, function, sizes, every) for sizes in _SIZES[: 1 if packed else 4]
            ):
                found -= {*names}
        except Exception:  # renamed, gone, or called differently: laid out from now on
            found -= {*names}
    TRUSTED = frozenset(found)


_SIZES = ((6, 6, 0, 0), (3, 7, 4, 0), (2, 5, 6, 3), (4, 9, 2, 0))  # queries, keys, their offsets


def _agrees(lay_out: Any, function: Any, sizes: tuple[int, int, int, int], every: frozenset[str]) -> bool:
    q_length, kv_length, q_offset, kv_offset = sizes
    padding = torch.arange(12) >= torch.tensor([0, 2])[:, None]
    dense = lay_out(
        batch_size=2, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=function, attention_mask=padding, allow_is_causal_skip=False,
    )  # fmt: skip
    region = Region(2, *sizes, torch.device("cpu"), every)
    mask = read(function, region, padding).materialize(q_length, kv_length)
    return bool((mask.expand(2, q_length, kv_length) == dense[:, 0]).all())
