"""Checks shared by the modules that torch does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_shape(name: str, x: Any, shape: str, dims: tuple[int, ...], last: int | None = None) -> Tensor:
    """`x`, if it is a tensor of one of these numbers of dimensions, the last of size `last`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() not in dims or (last is not None and x.shape[-1] != last):
        raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")
    return x


def check_padding(name: str, padding: Tensor | None, batch: int, length: int) -> None:
    """A bool [N, S] or None."""
    if padding is None:
        return
    if padding.dtype != torch.bool or tuple(padding.shape) != (batch, length):
        raise ValueError(
            f"{name}: expected a bool tensor [{batch}, {length}], True = padding, "
            f"got {padding.dtype} {list(padding.shape)}"
        )
