"""Derivatives and batches of a function from its reverse mode alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def around() -> tuple[str, ...]:
    """The transforms that look at this call, outermost first, as torch.func names them: "Grad", "Jvp", "Vmap"
    and others; a level of `forward_ad` alone is "Jvp", too.
    """
    kinds = tuple(level.key().name for level in torch._C._functorch.get_interpreter_stack() or ())
    return kinds if "Jvp" in kinds or forward_ad._current_level < 0 else (*kinds, "Jvp")


# The compiler cannot read that stack. While it traces, the transforms are there: it takes the answer as it is
# then.
around._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


def is_batched_by_autograd(x: Tensor) -> bool:
    """Is it one of the cotangents of `torch.autograd.grad(is_grads_batched=True)`, which has a vmap of its
    own that asks no Function? Its fallback serves no operator that takes a list of tensors.
    """
    return torch._C._functorch.is_legacy_batchedtensor(x)


def loop_over_entries(
    run: Callable[..., tuple[Tensor, ...]], *cotangents: Tensor | None
) -> tuple[Tensor, ...]:
    """`run` of each entry of the cotangents that are batched, the others and None as they are."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    # Of a tensor that is not batched at this level this makes a batch of copies; its size is then needed.
    size = max(
        torch._remove_batch_dim(x, level, 1, 0).shape[0]
        for x in cotangents
        if x is not None and is_batched_by_autograd(x)
    )
    entries = [None if x is None else torch._remove_batch_dim(x, level, size, 0) for x in cotangents]
    found = [run(*(None if x is None else x[n] for x in entries)) for n in range(size)]
    return tuple(torch._add_batch_dim(torch.stack(one), 0, level) for one in zip(*found, strict=True))
