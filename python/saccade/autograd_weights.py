"""The attention weights as a function of autograd: from a kernel, their derivatives from the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from . import ops
from .autograd import COUNT, Call, Tensors, attend, beyond_functions, distinct, placed, present_of, untracked
from .backends import reference
from .bodies import needs_gather
from .problem import Problem, Spec
from .transforms import jvp_by_vjp, vjp, vmap_by_loop


def attend_and_weigh(problem: Problem, body: int, average: bool) -> tuple[Tensor, Tensor]:
    """(out, weights) as `attend` and `attention_weights` give them; in one pass where no derivative is asked
    for.
    """
    tensors, spec = problem.tensors, problem.spec
    if body == ops.TILED and untracked(tensors):
        out, _, found = ops.forward_weights(spec, tensors, spec.seed, average)
        return out, found
    out, lse = attend(problem, body)
    return out, attention_weights(problem, lse, average)


def attention_weights(problem: Problem, lse: Tensor, average: bool, operators: Any = ops) -> Tensor:
    """The weights [B, H, Sq, Sk'], or [B, Sq, Sk'] averaged over heads, after dropout, with derivatives."""
    tensors, spec = problem.tensors, problem.spec
    if needs_gather(problem):  # the operators of weights are of tiles
        operators = ReferenceWeights
    if untracked(tensors):
        return operators.weights(spec, lse, tensors, spec.seed, average)
    if beyond_functions():
        return ReferenceWeights.weights(spec, None, tensors, spec.seed, average)
    if torch.compiler.is_compiling():
        function: type[Function] = PlainWeights
        tensors = distinct(tensors)
    else:
        function = EagerWeights if torch._C._functorch.peek_interpreter_stack() is None else Weights
    return function.apply(lse.detach(), *tensors, spec.seed, Call(spec, ops.TILED, operators), average)


class ReferenceWeights:
    """`ops.weights` in plain PyTorch: the operators for `attention_weights` where kernels have none."""

    @staticmethod
    def weights(
        spec: Spec, lse: Tensor | None, tensors: Tensors, seed: Tensor | None, average: bool
    ) -> Tensor:
        assert tensors[0] is not None
        found = reference.weigh(replace(spec, seed=seed), tensors)[2].to(tensors[0].dtype)
        return found.mean(1) if average else found


class PlainWeights(Function):
    """saccade::weights; its derivatives are the reference's. The form torch.compile traces."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        lse, *tensors, seed, call, average = args
        return call.ops.weights(call.spec, lse, tuple(tensors), seed, average)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, *tensors, ctx.call, ctx.average = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        *tensors, seed = ctx.saved_tensors
        present = present_of(tensors)
        run = _weights_fn(ctx.call, seed, present, ctx.average)
        _, pullback = vjp(run, *(tensors[n] for n in present))
        grads: list[Any] = [None] * (COUNT + 4)
        for n, grad in zip(present, pullback(cotangent), strict=True):
            grads[n + 1] = grad
        return tuple(grads)


class Weights(PlainWeights):
    """`PlainWeights` with forward mode and vmap."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        *tensors, seed = ctx.saved_tensors
        present = present_of(tensors)
        run = _weights_fn(ctx.call, seed, present, ctx.average)
        return jvp_by_vjp(run, [tensors[n] for n in present], [tangents[n + 1] for n in present])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return vmap_by_loop(Weights.apply, info, in_dims, args)


class EagerWeights(Function):
    """`Weights` without a setup_context, as `Eager`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        output = PlainWeights.forward(*args)
        PlainWeights.setup_context(ctx, args, output)
        return output

    backward = staticmethod(PlainWeights.backward)
    jvp = staticmethod(Weights.jvp)


def _weights_fn(call: Call, seed: Tensor | None, present: list[int], average: bool) -> Callable[..., Tensor]:
    def run(*values: Tensor) -> Tensor:
        return ReferenceWeights.weights(call.spec, None, placed(values, present), seed, average)

    return run
