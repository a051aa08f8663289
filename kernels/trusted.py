"""Whether what a tile shape computes is right, for `tune`: the compiler is known to reuse registers that a
product under way still reads (triton-lang/triton#11781), so a shape may be fast and wrong.

The yardstick: the error against fp64 is at most four times (gradients: six times) that of plain PyTorch in
the same dtype, plus one rounding. The tests' is half of that; here a shape that rounds less luckily than
PyTorch's own product must not be lost, and what a race leaves is off by whole terms of the sums. Nothing here
asks a kernel for what is right, not even the row of the table that is now in force.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Results(NamedTuple):
    """Of one head: out, dq, dk, dv [S, D], lse [S]."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


PASSES = {"forward": ("out", "lse"), "backward_q": ("dq",), "backward_kv": ("dk", "dv")}


def attention(tensors: tuple[Tensor, ...], left: int) -> Results:
    """Causal attention of one head to at most `left` keys before its own, and the gradients: of q, k, v, dout
    [S, D], written out in plain PyTorch in their dtype.
    """
    q, k, v, dout = tensors
    scale, place = q.shape[-1] ** -0.5, torch.arange(q.shape[0], device=q.device)
    delta = place - place[:, None]
    s = torch.where((delta <= 0) & (delta >= -left), (q @ k.mT) * scale, float("-inf"))
    p, dp = s.softmax(-1), dout @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return Results(p @ v, s.logsumexp(-1), ds @ k, ds.mT @ q, p.mT @ dout)


def expected(tensors: tuple[Tensor, ...], left: int) -> tuple[Results, Results]:
    """(exact, allowed) of one head: `attention` in fp64 on q, k, v, dout, and how far plain PyTorch is from
    that (each result its largest error). In fp64 that is what fp32 costs, in units of fp64's rounding.
    """
    exact = attention(tuple(x.double() for x in tensors), left)
    narrow, unit, true = tensors, 1.0, exact
    if tensors[0].dtype == torch.float64:
        narrow, unit = tuple(x.float() for x in tensors), 2.5 * 2.0**-29  # eps of fp64 by that of fp32
        true = attention(tuple(x.double() for x in narrow), left)
    plain = attention(narrow, left)
    return exact, Results(*(unit * _furthest(a.double(), b) for a, b in zip(plain, true, strict=True)))


def fault(name: str, got: Tensor, exact: Tensor, allowed: Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with a result of a pass, or None. `dtype` is that of the inputs."""
    if not got.isfinite().all():
        return f"{name} is not finite"
    factor = 6.0 if name.startswith("d") else 4.0
    bound = factor * allowed + torch.finfo(dtype).eps * exact.abs().max()
    error = _furthest(got.double(), exact)
    return None if error <= bound else f"{name} is off by {error:.2e}, where {bound:.2e} is allowed"


def _furthest(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().max()
