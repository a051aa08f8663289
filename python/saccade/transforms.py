"""Derivatives and batches of a function from its reverse mode alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def vjp(run: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    found: Any = torch.func.vjp(run, *primals)
    return found[0], found[1]


def jvp_by_vjp(run: Callable[..., Any], primals: list[Any], tangents: list[Any]) -> Any:
    """The directional derivative as the derivative of u -> vjp(u), which is linear. Unlike torch.func.jvp it
    may run inside forward_ad.dual_level, which does not nest."""
    tangents = [torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True)]
    outputs, pullback = vjp(run, *primals)
    single = isinstance(outputs, Tensor)
    cotangents = (torch.zeros_like(outputs),) if single else tuple(map(torch.zeros_like, outputs))
    _, push = vjp(lambda *u: pullback(u[0] if single else u), *cotangents)
    found = push(tuple(tangents))
    return found[0] if single else found


def vmap_by_loop(apply: Callable[..., Any], info: Any, in_dims: Any, args: tuple[Any, ...]) -> Any:
    """One call per entry: correct for every argument."""
    found = []
    for n in range(info.batch_size):
        entry = (x.select(d, n) if isinstance(d, int) else x for x, d in zip(args, in_dims, strict=True))
        found.append(apply(*entry))
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])
