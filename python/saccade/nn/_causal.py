"""Whether a mask tensor is exactly the causal one: then no kernel need read it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# By mask: the version of its values and the answer. An entry lives as long as its tensor.
_known = WeakTensorKeyDictionary()


def is_causal_mask(mask: Tensor, may_wait: bool = True) -> bool:
    """Whether `mask` [L, L] equals `generate_square_subsequent_mask(L)`, in floats or in bool.

    The answer is kept with the tensor until it is written to, so that a stack and its layers look once. Off
    the CPU looking waits for the device; without `may_wait` only an answer already known counts there. False
    where values cannot be looked at (compile, transforms, subclasses) or carry a gradient.
    """
    if torch.compiler.is_compiling() or type(mask) is not Tensor or mask.requires_grad:
        return False
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or mask.is_meta:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if mask.is_inference():  # its values may change without a trace
        return _equals(mask) if may_wait or mask.device.type == "cpu" else False
    version, answer = _known.get(mask, (-1, False))
    if version == mask._version:
        return answer
    if not may_wait and mask.device.type != "cpu":
        return False
    answer = _equals(mask)
    _known[mask] = (mask._version, answer)
    return answer


def _equals(mask: Tensor) -> bool:
    hidden = True if mask.dtype == torch.bool else -torch.inf
    size = mask.shape[0]
    if mask.device.type == "cpu" and size > 1 and (mask[0, -1] != hidden or mask[-1, 0] != 0):
        return False
    causal = torch.full((size, size), hidden, dtype=mask.dtype, device=mask.device).triu_(1)
    return torch.equal(mask, causal)
