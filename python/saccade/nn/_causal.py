"""Whether a mask tensor is exactly the causal one: then no kernel need read it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..maskbase import unwatched
from ._kept import of_masks


def is_causal_mask(mask: Tensor, may_wait: bool = True) -> bool:
    """Whether `mask` [L, L] equals `generate_square_subsequent_mask(L)`, in floats or in bool.

    The answer is kept with the tensor until its values change, so that a stack and its layers look once. Off
    the CPU looking waits for the device; without `may_wait` only an answer already known counts there. False
    where values cannot be looked at (compile, traces, transforms, subclasses) or carry a gradient.
    """
    if type(mask) is not Tensor or mask.requires_grad or not unwatched(mask):
        return False
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    if may_wait or mask.device.type == "cpu":
        return of_masks.of(mask, "causal", lambda: _equals(mask))
    return of_masks.known(mask, "causal", False)


def _equals(mask: Tensor) -> bool:
    hidden = True if mask.dtype == torch.bool else -torch.inf
    size = mask.shape[0]
    if mask.device.type == "cpu" and size > 1 and (mask[0, -1] != hidden or mask[-1, 0] != 0):
        return False
    causal = torch.full((size, size), hidden, dtype=mask.dtype, device=mask.device).triu_(1)
    return torch.equal(mask, causal)
