"""Derivatives of the bare operators, for programs that hold these and nothing else of this package: what
`torch.export` wrote down. Calls from Python have their own (`autograd`) and pass by here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from . import ops, ops_triton  # noqa: F401 (ops_triton defines its operators)
from .autograd import sink_gradient
from .graph import Graph

_OF_PAIRS = ("forward", "forward_weights", "triton_forward")


def _above(name: str, *args: Any) -> Any:
    """The kernel of operator `name` for autograd."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return _Derived.apply(name, *args)
    return ops.bare(name, *args)


class _Derived(Function):
    @staticmethod
    def forward(ctx: Any, name: str, *args: Any) -> Any:
        found = ops.bare(name, *args)
        results = (found,) if isinstance(found, Tensor) else found
        ctx.name = name
        ctx.plain = tuple(None if isinstance(x, Tensor) else x for x in args)
        ctx.places = [n for n, x in enumerate(args) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(args[n] for n in ctx.places), *results)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *heads: Tensor | None) -> tuple[Any, ...]:
        names, args, saved = list(ops.places(ctx.name)), list(ctx.plain), ctx.saved_tensors
        for n, x in zip(ctx.places, saved, strict=False):
            args[n] = x
        given = dict(zip(names, args, strict=True))
        results = saved[len(ctx.places) :]
        wanted = {name for n, name in enumerate(names) if ctx.needs_input_grad[n + 1]}
        backward = ctx.name.replace("forward_weights", "forward").replace("forward", "backward")
        if ctx.name == "gather_forward":
            grads = _of_edges(given, heads, results, wanted)
        elif ctx.name in _OF_PAIRS and all(x is None for x in heads[2:]):
            grads = _of_pairs(backward, given, heads, results, wanted)
        else:
            raise NotImplementedError(
                f"saccade::{ctx.name} has no derivative in an exported program: attention's output has one "
                "(along edges: on CPUs), its weights and gradients have none"
            )
        found = (grads.get(name) for name in names)
        return None, *(g if g is None else g.to(x.dtype) for g, x in zip(found, args, strict=True))


def _of_pairs(
    backward: str,
    given: dict[str, Any],
    heads: tuple[Tensor | None, ...],
    results: tuple[Tensor, ...],
    wanted: set[str],
) -> dict[str, Tensor]:
    (dout, dlse), (out, lse) = heads[:2], results[:2]
    dout = torch.zeros_like(out) if dout is None else dout
    if given["bias"] is not None:  # the operator would add up what was expanded
        given["bias"] = given["bias"].contiguous()
    needs = sum(bit for name, bit in ops.GRADIENTS.items() if name in wanted)
    given |= {"dout": dout, "dlse": dlse, "out": out, "lse": lse, "needs": needs}
    given["deterministic"] = torch.are_deterministic_algorithms_enabled()
    found = dict(zip(ops.GRADIENTS, _named(backward, given), strict=True))
    if "sink" in wanted:
        found["sink"] = sink_gradient(given["cu_seqlens_q"] is not None, dout, dlse, out, lse, given["sink"])
    return {name: found[name] for name in wanted}


def _of_edges(
    given: dict[str, Any], heads: tuple[Tensor | None, ...], results: tuple[Tensor, ...], wanted: set[str]
) -> dict[str, Tensor]:
    (dout, dlse, dmixed), (out, lse, mixed) = heads, results
    graph = Graph.from_csr(given["indptr"], given["indices"], given["k"].shape[2])
    needs = sum(bit for name, bit in ops.EDGE_GRADIENTS.items() if name in wanted)
    dout = torch.zeros_like(out) if dout is None else dout
    dmixed = torch.zeros_like(mixed) if dmixed is None else dmixed
    given |= {"dout": dout, "dlse": dlse, "dout_edge": dmixed, "out": out, "lse": lse, "out_edge": mixed}
    given |= dict(zip(("t_indptr", "t_rows", "t_edges"), graph.columns(), strict=True)) | {"needs": needs}
    found = dict(zip(ops.EDGE_GRADIENTS, _named("gather_backward", given), strict=True))
    if "sink" in wanted:
        if mixed.numel():
            dout, out = torch.cat([dout, dmixed], -1), torch.cat([out, mixed], -1)
        found["sink"] = sink_gradient(False, dout, dlse, out, lse, given["sink"])
    return {name: found[name] for name in wanted}


def _named(name: str, given: dict[str, Any]) -> tuple[Tensor, ...]:
    return ops.bare(name, *(given[argument] for argument in ops.places(name)))


_LIBRARY = torch.library.Library("saccade", "IMPL")


def _register(names: Iterable[str]) -> None:
    for name in names:
        _LIBRARY.impl(name, partial(_above, name), "Autograd")


_NAMES = ("forward", "backward", "weights", "gather_forward", "gather_backward")
if ops.LOADED:
    _register((*_NAMES, "forward_weights"))
_register(f"triton_{name}" for name in _NAMES)
