"""Calls of test_gpu.py: which of Hopper's own kernels and which of sm_80 takes each. racecheck is shown the
latter alone (Makefile), and test_gpu_make.py sees to it that they are.
"""

from __future__ import annotations

from typing import Any

import saccade
import torch
from saccade.testing import Shape, make_inputs, tensor_map

GENERAL = ["dropout", "bias", "relative", "padding", "slices"]  # left to those of sm_80
HOPPERS = ["softcap", "grouped"]


def call_of(name: str, dim: int, device: str) -> tuple[Any, Any, dict[str, Any]]:
    """(q, k and v, mask, options)."""
    inputs = make_inputs(Shape(2, 4, 2 if name == "grouped" else 4, 150, 170, dim, dim), torch.float16)
    tensors = tensor_map(lambda x: x.detach().to(device).requires_grad_(), inputs)
    if name == "slices":  # rows that no 16-byte load reaches
        tensors = tuple(torch.cat([x, x], -1)[..., 3 : dim + 1].detach().requires_grad_() for x in tensors)
    mask: Any = saccade.Causal()
    if name == "padding":
        mask &= saccade.KeyPadding(torch.arange(170, device=device).remainder(3).gt(0).expand(2, -1))
    bias = torch.randn(4, 150, 170, device=device, dtype=torch.float16, requires_grad=name == "bias")
    options: dict[str, Any] = {
        "dropout": {"dropout_p": 0.2, "seed": 5},
        "bias": {"bias": bias},
        "relative": {"position": saccade.ALiBi(saccade.ALiBi.default_slopes(4).to(device))},
        "softcap": {"softcap": 3.0},
    }.get(name, {})
    return tensors, mask, options
