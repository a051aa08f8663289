"""Nested tensors (N, ragged, E) in and out: their rows are one packed sequence, as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masks import KeyPadding


@dataclass(slots=True, eq=False)
class Packed:
    """The rows of a nested tensor."""

    values: Tensor  # [total, E]
    cu_seqlens: Tensor  # [N + 1] int64
    longest: int
    lengths: list[int] | None  # of the strided layout; None for the jagged one

    @property
    def batch(self) -> int:
        return self.cu_seqlens.shape[0] - 1


def pack(x: Tensor) -> Packed:
    """The rows of a nested tensor of either layout, with derivatives."""
    if not x.is_nested:
        raise AssertionError("MultiheadAttention needs query, key and value all nested, or none")
    if x.dim() != 3:
        raise AssertionError(
            f"MultiheadAttention expected a nested tensor (N, ragged, E) but got {x.dim()} dimensions"
        )
    if x.layout == torch.jagged:
        ragged: Any = x
        if ragged._ragged_idx != 1 or ragged.lengths() is not None:
            ragged = ragged.contiguous()
        if ragged._ragged_idx != 1:
            raise AssertionError(
                "MultiheadAttention expected the ragged dimension of a nested tensor to be its second"
            )
        return Packed(ragged.values(), ragged.offsets().to(torch.int64), int(ragged._get_max_seqlen()), None)
    rows = x.unbind()
    lengths = [len(r) for r in rows]
    ends = torch.tensor([0, *lengths], dtype=torch.int64, device=x.device).cumsum(0)
    values = torch.cat(rows) if rows else x.new_empty((0, 0))
    return Packed(values, ends, max(lengths, default=0), lengths)


def unpack(values: Tensor, like: Packed) -> Tensor:
    """A nested tensor of `values` [total, E] in the layout and with the lengths of `like`."""
    if like.lengths is None:
        return torch.nested.nested_tensor_from_jagged(values, like.cu_seqlens, max_seqlen=like.longest)
    return torch.nested.as_nested_tensor(list(values.split(like.lengths)))


def padded(x: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """The rows `x` [total, H, D] as [N, longest, H, D] with zeros, and which are real ([N, longest] bool)."""
    steps = torch.arange(packed.longest, device=x.device)
    real = steps < packed.cu_seqlens.diff()[:, None]
    rows = (packed.cu_seqlens[:-1, None] + steps).clamp(max=max(x.shape[0] - 1, 0))
    zero = x.new_zeros(())
    return torch.where(real[..., None, None], x[rows], zero), real


def padding(packed: Packed) -> KeyPadding:
    """The keys of each sequence in the padded form."""
    return KeyPadding(packed.cu_seqlens.diff())
