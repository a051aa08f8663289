"""Masks joined with `&`, and their one normal form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .graph import Graph
from .maskbase import Dims, Index, Mask, MaskArgs, set_fields
from .masks import Band, Chunks, KeyPadding, Segments, head_bounds, int_bounds


class And(Mask):
    """Several masks joined with `&`: a pair is kept iff every part keeps it."""

    __slots__ = ("_parts", "_static", "_shared")

    _parts: tuple[Mask, ...]
    _static: MaskArgs | None
    _shared: Graph | None  # the edges that all graphs among the parts have

    def __init__(self, parts: tuple[Mask, ...]) -> None:
        bands = [p for p in parts if isinstance(p, Band) and p.static is not None]
        static = MaskArgs(band=int_bounds(bands)) if len(bands) == len(parts) else None
        set_fields(self, _parts=parts, _static=static, _shared=None)
        for name in ("num_batch", "num_heads", "device"):
            values = {getattr(p, name) for p in parts} - {None}
            if len(values) > 1:
                raise ValueError(
                    f"mask: the parts of {self!r} differ in {name.removeprefix('num_')}: {list(values)}"
                )
        if graphs := [p for p in parts if isinstance(p, Graph)]:
            set_fields(self, _shared=Graph.intersect(graphs))

    @property
    def parts(self) -> tuple[Mask, ...]:
        return self._parts

    @property
    def static(self) -> MaskArgs | None:
        return self._static

    @property
    def graph(self) -> Graph | None:
        return self._shared

    def _first(self, name: str) -> Any:
        return next((v for v in (getattr(p, name) for p in self._parts) if v is not None), None)

    @property
    def num_batch(self) -> int | None:
        return self._first("num_batch")

    @property
    def num_heads(self) -> int | None:
        return self._first("num_heads")

    @property
    def device(self) -> torch.device | None:
        return self._first("device")

    def keep(self, b: Index, h: Index, i: Tensor, j: Tensor, sq: Index, sk: Index) -> Tensor:
        kept = self._parts[0].keep(b, h, i, j, sq, sk)
        for part in self._parts[1:]:
            kept = kept & part.keep(b, h, i, j, sq, sk)
        return kept

    def to(self, device: torch.device | str) -> Mask:
        return And(tuple(p.to(device) for p in self._parts))

    def prepare(self) -> Mask:
        if self._shared is not None:
            self._shared.prepare()
        return self

    def __repr__(self) -> str:
        return " & ".join(map(repr, self._parts))


def resolve(mask: Mask, dims: Dims) -> MaskArgs:
    """The normal form of a mask for a call of these dimensions. Raises ValueError where a part does not
    fit it.
    """
    parts = mask.parts
    for part in parts:
        if part.num_batch not in (None, dims.batch):
            raise ValueError(f"mask: {part!r} is for a batch of {part.num_batch}, the call has {dims.batch}")
        if part.device not in (None, dims.device):
            raise ValueError(
                f"mask: {part!r} is on {part.device}, expected {dims.device}; move it with mask.to(...)"
            )
        part.check(dims)
    bands = [p for p in parts if isinstance(p, Band)]
    q_ids, k_ids = _join_segments([p for p in parts if isinstance(p, Segments)], dims)
    paddings = [p for p in parts if isinstance(p, KeyPadding)]
    return MaskArgs(
        band=int_bounds(bands),
        head_bounds=head_bounds(bands, dims),
        chunks=tuple(n for p in parts if isinstance(p, Chunks) for n in (p.size, p.left)),
        lengths=_join([p.lengths for p in paddings if p.lengths is not None], 1, dims, torch.minimum),
        keep=_join(
            [p.keep_keys[..., : dims.seqlen_k] for p in paddings if p.keep_keys is not None],
            2,
            dims,
            torch.logical_and,
        ),
        q_ids=q_ids,
        k_ids=k_ids,
        graph=mask.graph,
    )


def _join(values: list[Tensor], ndim: int, dims: Dims, op: Any) -> Tensor | None:
    joined = None
    for value in values:
        value = value if value.dim() == ndim else value.expand(dims.batch, *value.shape)
        joined = value if joined is None else op(joined, value)
    return None if joined is None else joined.contiguous()


def _join_segments(segments: list[Segments], dims: Dims) -> tuple[Tensor | None, Tensor | None]:
    if not segments:
        return None, None
    q_all = [s.q_ids.expand(dims.batch, -1)[:, : dims.seqlen_q] for s in segments]
    k_all = [s.k_ids.expand(dims.batch, -1)[:, : dims.seqlen_k] for s in segments]
    q_ids, k_ids = q_all[0], k_all[0]
    for q, k in zip(q_all[1:], k_all[1:], strict=True):  # a pair of ids becomes one id
        first = torch.cat([q_ids, k_ids], 1).long()
        second = torch.cat([q, k], 1).long()
        pair = torch.stack([first.reshape(-1), second.reshape(-1)], 1)
        joint = torch.unique(pair, dim=0, return_inverse=True)[1].view_as(first).int()
        q_ids, k_ids = joint[:, : q.shape[1]], joint[:, q.shape[1] :]
    return q_ids.contiguous(), k_ids.contiguous()
