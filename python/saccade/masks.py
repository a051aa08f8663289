"""The masks made of bands, padding, segments and chunks. (`Graph` has a file of its own.)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import as_int, int_at_least, is_int
from .maskbase import NO_MASK, UNBOUNDED, Dims, Index, Mask, MaskArgs, set_fields, values_are_known

__all__ = [
    "NO_MASK", "UNBOUNDED", "Band", "Causal", "Chunks", "Dims", "KeyPadding", "Mask", "MaskArgs", "Segments",
    "Window", "head_bounds", "int_bounds",
]  # fmt: skip

Bound = int | Tensor | None


def as_bound(name: str, value: object) -> Bound:
    """An int, None or an int64 tensor [H]; anything else is refused."""
    if value is None:
        return value
    if not isinstance(value, Tensor) and not is_int(value):
        raise TypeError(f"{name}: expected an int, None or an integer tensor [H], got {type(value).__name__}")
    if isinstance(value, Tensor):
        _check_unmapped(name, value)
        _check_integers(name, value)
        if value.dim() == 0:
            return int(value)
        if value.dim() != 1:
            raise ValueError(f"{name}: expected shape [H], got {list(value.shape)}")
        return value.detach().to(torch.int64).clamp(-UNBOUNDED, UNBOUNDED).contiguous()
    clamped: Any = max(-UNBOUNDED, min(as_int(value), UNBOUNDED))  # a traced length stays one
    return clamped


def _own(name: str, value: Any) -> Tensor:
    """A contiguous copy: what is written into the caller's tensor later must not change a mask, which the
    backward pass reads again.
    """
    if isinstance(value, Tensor):
        _check_unmapped(name, value)
        return value.detach().clone(memory_format=torch.contiguous_format)
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected a tensor or numbers, got {type(value).__name__} ({error})"
        ) from None


def _check_unmapped(name: str, value: Tensor) -> None:
    if torch._C._functorch.is_batchedtensor(value):
        raise ValueError(
            f"{name}: torch.func.vmap maps over no numbers of a mask: make what is mapped the batch "
            "dimension of q, k, v and the mask, or give a bias that is -inf where a pair is masked"
        )


def _check_integers(name: str, value: Tensor) -> None:
    if value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
        raise ValueError(f"{name}: expected an integer dtype, got {value.dtype}")


def check_align(align: object) -> None:
    if align not in ("end", "start"):
        raise ValueError(f'align: expected "end" or "start", got {align!r}')


class Band(Mask):
    """Keeps `-left <= j - (i + Sk - Sq) <= right`; with `align="start"` it keeps `-left <= j - i <= right`.

    A bound is an int (negatives allowed), None for unbounded, or an integer tensor [H], one per query head.
    """

    __slots__ = ("left", "right", "align", "_static")

    left: Bound
    right: Bound
    align: str
    _static: MaskArgs | None

    def __init__(self, left: Bound = None, right: Bound = None, *, align: str = "end") -> None:
        check_align(align)
        set_fields(self, left=as_bound("left", left), right=as_bound("right", right), align=align)
        lengths = [len(x) for x in (self.left, self.right) if isinstance(x, Tensor)]
        if len(set(lengths)) > 1:
            raise ValueError(f"left and right: expected the same number of heads, got {lengths}")
        set_fields(self, _static=None if lengths else MaskArgs(band=int_bounds([self])))

    @property
    def static(self) -> MaskArgs | None:
        return self._static

    @property
    def num_heads(self) -> int | None:
        return next((len(x) for x in (self.left, self.right) if isinstance(x, Tensor)), None)

    @property
    def device(self) -> torch.device | None:
        return next((x.device for x in (self.left, self.right) if isinstance(x, Tensor)), None)

    def keep(self, b: Index, h: Index, i: Tensor, j: Tensor, sq: Index, sk: Index) -> Tensor:
        delta = j - i if self.align == "start" else j - (i + sk - sq)
        kept = torch.ones_like(delta, dtype=torch.bool)
        if self.left is not None:
            kept = kept & (delta >= -(self.left[h] if isinstance(self.left, Tensor) else self.left))
        if self.right is not None:
            kept = kept & (delta <= (self.right[h] if isinstance(self.right, Tensor) else self.right))
        return kept

    def check(self, dims: Dims) -> None:
        if self.num_heads is not None and self.num_heads != dims.heads:
            raise ValueError(
                f"mask: {self!r} has bounds for {self.num_heads} heads, the call has {dims.heads}"
            )

    def to(self, device: torch.device | str) -> Mask:
        if self.num_heads is None:
            return self
        left, right = (x.to(device) if isinstance(x, Tensor) else x for x in (self.left, self.right))
        return Band(left, right, align=self.align)

    def __repr__(self) -> str:
        left, right = ("[H]" if isinstance(x, Tensor) else x for x in (self.left, self.right))
        return f"Band({left}, {right}{'' if self.align == 'end' else ', align=start'})"


class Causal(Band):
    """`Band(None, 0)`: no key after the query. `align="start"` is
    `F.scaled_dot_product_attention(is_causal=True)`.
    """

    __slots__ = ()

    def __init__(self, *, align: str = "end") -> None:
        super().__init__(None, 0, align=align)


class Window(Band):
    """`Band(left, right)` with bounds that are >= 0 or None."""

    __slots__ = ()

    def __init__(self, left: Bound, right: Bound, *, align: str = "end") -> None:
        for name, value in (("left", left), ("right", right)):
            bound = as_bound(name, value)
            if isinstance(bound, Tensor):
                negative = values_are_known(bound) and bool((bound < 0).any())
            else:
                negative = bound is not None and bound < 0
            if negative:
                raise ValueError(
                    f"{name}: a window reaches >= 0 keys, got {value}; for an unbounded side use None"
                )
        super().__init__(left, right, align=align)


class KeyPadding(Mask):
    """Which keys are not padding: `lengths` ([B] ints, keys j < lengths[b]) or `keep` ([B, Sk] bool, True =
    keep).

    Without the batch dimension (an int, or [Sk] bool) it holds for every batch entry. Values are checked
    here, once.
    """

    __slots__ = ("lengths", "keep_keys", "max_length")

    lengths: Tensor | None
    keep_keys: Tensor | None
    max_length: int

    def __init__(self, lengths: Any = None, *, keep: Tensor | None = None) -> None:
        if (lengths is None) == (keep is None):
            raise TypeError(
                "KeyPadding: expected lengths or keep, got " + ("neither" if keep is None else "both")
            )
        value = _own("lengths", lengths) if keep is None else _own("keep", keep)
        if value.dtype == torch.bool:
            if value.dim() not in (1, 2):
                raise ValueError(f"keep: expected shape [B, Sk] or [Sk], got {list(value.shape)}")
            set_fields(self, lengths=None, keep_keys=value, max_length=0)
            return
        if keep is not None:
            raise ValueError(f"keep: expected dtype torch.bool, got {value.dtype}")
        _check_integers("lengths", value)
        if value.dim() > 1:
            raise ValueError(
                f"lengths: expected shape [B], got {list(value.shape)}; a mask of keys [B, Sk] is bool"
            )
        longest = 0
        if value.numel() and values_are_known(value):
            least, longest = (int(x) for x in value.aminmax())
            if least < 0:
                raise ValueError(f"lengths: expected values >= 0, got {least}")
        set_fields(self, lengths=value.to(torch.int64), keep_keys=None, max_length=longest)

    @property
    def _values(self) -> Tensor:
        values = self.keep_keys if self.lengths is None else self.lengths
        assert values is not None
        return values

    @property
    def num_batch(self) -> int | None:
        values = self._values
        return values.shape[0] if values.dim() == (2 if self.lengths is None else 1) else None

    @property
    def device(self) -> torch.device | None:
        return self._values.device

    def keep(self, b: Index, h: Index, i: Tensor, j: Tensor, sq: Index, sk: Index) -> Tensor:
        if self.lengths is not None:
            kept = j < (self.lengths if self.num_batch is None else self.lengths[b])
        else:
            assert self.keep_keys is not None
            kept = self.keep_keys[j] if self.num_batch is None else _entries(self.keep_keys, b, j)
        return kept & torch.ones_like(i, dtype=torch.bool)

    def check(self, dims: Dims) -> None:
        if self.lengths is not None and self.max_length > dims.seqlen_k:
            raise ValueError(
                f"mask: KeyPadding has a length of {self.max_length}, the call has {dims.seqlen_k} keys"
            )
        if self.keep_keys is not None:
            _check_positions("KeyPadding", "keys", self.keep_keys.shape[-1], dims.seqlen_k, dims.ragged)

    def to(self, device: torch.device | str) -> Mask:
        if self.lengths is None:
            return KeyPadding(keep=self._values.to(device))
        return KeyPadding(self.lengths.to(device))

    def __repr__(self) -> str:
        return f"KeyPadding({'keep' if self.lengths is None else 'lengths'} {list(self._values.shape)})"


def _entries(values: Tensor, b: Index, n: Tensor) -> Tensor:
    """`values[b, n]`. torch refuses to index what has no entries, though none are asked for."""
    if values.numel():
        return values[b, n]
    return values.new_zeros(torch.broadcast_shapes(torch.as_tensor(b).shape, n.shape))


def _check_positions(what: str, kind: str, got: int, expected: int, ragged: bool) -> None:
    if got < expected if ragged else got != expected:
        raise ValueError(f"mask: {what} has {got} {kind}, the call has {expected}")


class Segments(Mask):
    """Keeps the pairs whose query and key carry the same id: `q_ids` [B, Sq] and `k_ids` [B, Sk] ints, or
    [S].

    With `k_ids=None` the keys have the ids of the queries, which needs Sq == Sk.
    """

    __slots__ = ("q_ids", "k_ids", "shared")

    q_ids: Tensor
    k_ids: Tensor
    shared: bool

    def __init__(self, q_ids: Any, k_ids: Any = None) -> None:
        ids = []
        for name, value in (("q_ids", q_ids), ("k_ids", q_ids if k_ids is None else k_ids)):
            value = _own(name, value)
            _check_integers(name, value)
            if value.dim() not in (1, 2):
                raise ValueError(f"{name}: expected shape [B, S] or [S], got {list(value.shape)}")
            ids.append(value)
        if ids[0].shape[:-1] != ids[1].shape[:-1] or ids[0].device != ids[1].device:
            got = " and ".join(f"{list(x.shape)} on {x.device}" for x in ids)
            raise ValueError(f"k_ids: expected the batch and the device of q_ids, got {got}")
        q, k = _as_int32(*ids)
        set_fields(self, q_ids=q, k_ids=k, shared=k_ids is None)

    @property
    def num_batch(self) -> int | None:
        return self.q_ids.shape[0] if self.q_ids.dim() == 2 else None

    @property
    def device(self) -> torch.device | None:
        return self.q_ids.device

    def keep(self, b: Index, h: Index, i: Tensor, j: Tensor, sq: Index, sk: Index) -> Tensor:
        if self.num_batch is None:
            return self.q_ids[i] == self.k_ids[j]
        return _entries(self.q_ids, b, i) == _entries(self.k_ids, b, j)

    def check(self, dims: Dims) -> None:
        if self.shared and dims.seqlen_q != dims.seqlen_k:
            raise ValueError(
                "mask: Segments(ids) with one argument needs Sq == Sk, "
                f"got {dims.seqlen_q} and {dims.seqlen_k}; say Segments(q_ids, k_ids)"
            )
        _check_positions("Segments", "query ids", self.q_ids.shape[-1], dims.seqlen_q, dims.ragged)
        _check_positions("Segments", "key ids", self.k_ids.shape[-1], dims.seqlen_k, dims.ragged)

    def to(self, device: torch.device | str) -> Mask:
        return Segments(self.q_ids.to(device), None if self.shared else self.k_ids.to(device))

    def __repr__(self) -> str:
        return (
            f"Segments({list(self.q_ids.shape)}{'' if self.shared else ', ' + str(list(self.k_ids.shape))})"
        )


def _as_int32(q_ids: Tensor, k_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The ids as int32: as they are where they fit, else renumbered together."""
    if q_ids.dtype == torch.int64:
        both = torch.cat([q_ids.reshape(-1), k_ids.reshape(-1)])
        if not values_are_known(both) or (both.numel() and (both != both.int()).any()):
            both = torch.searchsorted(both.sort()[0], both)
        q_ids, k_ids = both[: q_ids.numel()].view_as(q_ids), both[q_ids.numel() :].view_as(k_ids)
    return q_ids.int().contiguous(), k_ids.int().contiguous()


class Chunks(Mask):
    """Streaming: with positions p = i + Sk - Sq, keeps `p // size - left <= j // size <= p // size`.

    `left=None` reaches back to the first key. A dense call with Sq != Sk must say `align="end"`.
    """

    __slots__ = ("size", "left", "align")

    size: int
    left: int
    align: str | None

    def __init__(self, size: int, left: int | None = None, *, align: str | None = None) -> None:
        size, left = int_at_least("size", size, 1), None if left is None else int_at_least("left", left, 0)
        if align not in (None, "end"):
            raise ValueError(f'align: expected None or "end", got {align!r}')
        # A chunk number times the size must stay within int64.
        size = min(size, UNBOUNDED)
        reach = UNBOUNDED // size if left is None else min(left, UNBOUNDED // size)
        set_fields(self, size=size, left=reach, align=align)

    def keep(self, b: Index, h: Index, i: Tensor, j: Tensor, sq: Index, sk: Index) -> Tensor:
        own = torch.div(i + sk - sq, self.size, rounding_mode="floor")
        chunk = torch.div(j, self.size, rounding_mode="floor")
        return (own - self.left <= chunk) & (chunk <= own)

    def check(self, dims: Dims) -> None:
        if self.align is None and not dims.ragged and dims.seqlen_q != dims.seqlen_k:
            raise ValueError(
                f"mask: Chunks needs Sq == Sk, got {dims.seqlen_q} and {dims.seqlen_k}; "
                'say Chunks(size, left, align="end") for queries aligned with the end of the keys'
            )

    def __repr__(self) -> str:
        return f"Chunks({self.size}, {None if self.left >= UNBOUNDED // self.size else self.left})"


def int_bounds(bands: list[Band]) -> tuple[int, int, int, int]:
    """The intersection of bands as left_end, right_end, left_start, right_start; tensor bounds are passed
    over.
    """
    bounds = [UNBOUNDED] * 4
    for band in bands:
        for slot, value in _slots(band):
            if not isinstance(value, Tensor):
                bounds[slot] = min(bounds[slot], value)
    return (bounds[0], bounds[1], bounds[2], bounds[3])


def head_bounds(bands: list[Band], dims: Dims) -> Tensor | None:
    """The intersection as an [H, 4] tensor where a bound differs per head."""
    if all(band.num_heads is None for band in bands):
        return None
    columns = [
        torch.full((dims.heads,), bound, dtype=torch.int64, device=dims.device) for bound in int_bounds(bands)
    ]
    for band in bands:
        for slot, value in _slots(band):
            if isinstance(value, Tensor):
                columns[slot] = torch.minimum(columns[slot], value)
    return torch.stack(columns, dim=1)


def _slots(band: Band) -> list[tuple[int, int | Tensor]]:
    first = 0 if band.align == "end" else 2
    return [(first + side, x) for side, x in enumerate((band.left, band.right)) if x is not None]
