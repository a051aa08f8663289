"""Dense masks that are bands, seen as such: what a causal or banded tensor hides is then never visited."""

from __future__ import annotations

import torch
from torch import Tensor

from ..maskbase import unwatched
from ..masks import Band
from ._kept import of_masks

_WORTHWHILE = 64 * 64  # pairs: below this there is no tile to leave out


def as_band(mask: Tensor) -> Band | None:
    """The Band that a mask [L, S] is (bool True = hidden, or floats of 0 and -inf), aligned with the first
    key.

    None where it is none, or where its values may not be read: a gradient is wanted, a transform, a tracer or
    the compiler looks on, or it lies on a device that reading would have to wait for. What was found is kept
    with the tensor until its values change.
    """
    if mask.dim() != 2 or mask.numel() < _WORTHWHILE or mask.requires_grad or mask.device.type != "cpu":
        return None
    if type(mask) is not Tensor or not unwatched(mask):
        return None
    return of_masks.of(mask, "band", lambda: _find_band(mask))


def _find_band(mask: Tensor) -> Band | None:
    """Its first row and column name the only band it can be; then it is compared with that one."""
    rows, keys = mask.shape
    seen_first, seeing_first = int(_kept(mask[0]).sum()), int(_kept(mask[:, 0]).sum())
    if seen_first == 0 or seeing_first == 0:
        return None
    right = None if seen_first == keys else seen_first - 1
    left = None if seeing_first == rows else seeing_first - 1
    band = torch.ones(rows, keys, dtype=torch.bool, device=mask.device)
    band = band if right is None else band.tril_(right)
    band = band if left is None else band.triu_(-left)
    if not torch.equal(_kept(mask), band):
        return None
    if mask.dtype != torch.bool and not torch.equal(mask == -torch.inf, ~band):
        return None
    return Band(left, right, align="start")


def _kept(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask == 0
