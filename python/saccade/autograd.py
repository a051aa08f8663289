"""The operators as functions of autograd. First derivatives are kernels; all others follow from the
reference, which is plain differentiable PyTorch, so that second derivatives, forward mode and vmap hold for
every argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from . import gather, ops
from .backends import reference
from .problem import NORMALISED, Problem, Spec
from .transforms import around, is_batched_by_autograd, jvp_by_vjp, loop_over_entries, vjp, vmap_by_loop

Tensors = tuple[Tensor | None, ...]
COUNT = 12  # q, k, v, bias, rel_bias, weight, sink, extra_k, extra_v, edge_bias, edge e, edge W
_HEADS = 5  # dout, dlse, out, lse, the mixed edge features
_SINK = 6
# Place among the tensors -> bit among the operator's gradients, in the order in which it returns them.
_BITS = dict(zip((0, 1, 2, 3, 4, 5, 7, 8), ops.GRADIENTS.values(), strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The plain half of a call."""

    spec: Spec
    body: int
    ops: Any = ops  # whose operators: a module with forward, backward and weights, and gather's

    @property
    def has_lse(self) -> bool:
        return self.spec.activation in NORMALISED


def attend(problem: Problem, body: int, operators: Any = ops) -> tuple[Tensor, Tensor]:
    """(out, lse) by the operators, with derivatives."""
    tensors, spec = problem.tensors, problem.spec
    call = Call(spec, body, operators)
    if untracked(tensors):
        out, lse, *_ = _run(call, tensors, spec.seed)
        return out, lse
    if beyond_functions():
        out, lse = reference.attend(spec, tensors)
        return out, lse.double()
    if torch.compiler.is_compiling():
        apply, tensors = Forward.apply, distinct(tensors)
    elif torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace cannot record attention's derivatives: trace under torch.no_grad()"
        )
    elif torch._C._functorch.peek_interpreter_stack() is None:
        apply = super(Function, Eager).apply  # past the wrapper that looks for functorch, 4 us a call
    else:
        apply = Attention.apply
    found = apply(*tensors, spec.seed, call)
    return found[0], found[1]


def distinct(tensors: Tensors) -> Tensors:
    """The same, no tensor twice: torch.compile takes none that a Function gets in two places."""
    found: list[Tensor | None] = []
    for x in tensors:
        again = x is not None and any(x is y for y in found)
        found.append(x.view_as(x) if again and x is not None else x)
    return tuple(found)


def untracked(tensors: Tensors) -> bool:
    """No derivative and no transform looks at this call, so the operator may run bare. In programs that
    `torch.export` writes down it always does: a Function would be lost there, operators have `op_gradients`.
    """
    if torch.compiler.is_exporting() and not around():
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return False
    if torch.compiler.is_compiling():
        return all(kind == "Vmap" for kind in around())  # the compiler's own loop serves bare operators
    return forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None


def beyond_functions() -> bool:
    """Whether the transforms around a tracked call ask for more than torch's Functions give: forward mode
    within forward mode and, compiled, any at all (the compiler loses gradients there). The reference serves
    those.
    """
    if torch.compiler.is_compiling():
        return bool(around())
    return torch._C._functorch.peek_interpreter_stack() is not None and around().count("Jvp") > 1


class Forward(Function):
    """saccade::forward with its first derivative. The form torch.compile traces: it takes no jvp."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, seed, call = args
        return _run(call, tuple(tensors), seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*tensors, *output)
        if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
            ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)
        if len(output) > 1 + ctx.call.has_lse:
            ctx.mark_non_differentiable(*output[1 + ctx.call.has_lse :])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        tensors, (seed, out, lse, *rest) = saved[:COUNT], saved[COUNT:]
        nothing = (None,) * (COUNT + 2)
        wanted = tuple(n for n in range(COUNT) if ctx.needs_input_grad[n])
        if (dout is None and dlse is None) or not wanted:
            return nothing
        if dout is None:
            dout = torch.zeros_like(out)
        inputs = (dout, dlse, out, lse, rest[0] if rest else None, *tensors, seed)
        if torch.compiler.is_compiling():
            found = Backward.forward(*inputs, ctx.call, wanted)
        elif is_batched_by_autograd(dout) or (dlse is not None and is_batched_by_autograd(dlse)):
            found = loop_over_entries(
                lambda *heads: Backward.apply(*heads, *inputs[2:], ctx.call, wanted), dout, dlse
            )
        elif untracked(inputs):
            found = Backward.forward(*inputs, ctx.call, wanted)
        else:
            found = Backward.apply(*inputs, ctx.call, wanted)
        grads: list[Any] = list(nothing)
        for n, grad in zip(wanted, found, strict=True):
            grads[n] = grad
        return tuple(grads)


class Attention(Forward):
    """`Forward` with forward mode and vmap."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        *tensors, seed = ctx.saved_tensors[: COUNT + 1]
        present = present_of(tensors)
        run = _attend_fn(ctx.call, seed, present, (True, ctx.call.has_lse))
        found = jvp_by_vjp(run, [tensors[n] for n in present], [tangents[n] for n in present])
        return (*found, *(None,) * (_outputs(ctx.call) - len(found)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *tensors, seed, call = args
        if _folds(call, tensors, in_dims, seed):
            q, k, v = (_folded(x, d, info.batch_size) for x, d in zip(tensors[:3], in_dims, strict=False))
            folded = _with_batch(call, info.batch_size)
            found = Attention.apply(q, k, v, *tensors[3:], seed, folded)
            return _unfolded(found, info.batch_size, call)
        return vmap_by_loop(Attention.apply, info, in_dims, args)


class Eager(Function):
    """`Attention` without a setup_context, which functorch needs and which costs 15 us a call."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        output = Forward.forward(*args)
        Forward.setup_context(ctx, args, output)
        return output

    backward = staticmethod(Forward.backward)
    jvp = staticmethod(Attention.jvp)


class Backward(Function):
    """saccade::backward as a function of dout, dlse and the inputs; `out` and `lse` are taken for functions
    of those.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        dout, dlse, out, lse, mixed, *tensors, seed, call, wanted = args
        found = _gradients(call, (dout, dlse, out, lse, mixed), tuple(tensors), seed, wanted)
        if _SINK in wanted:
            found[_SINK] = sink_gradient(call.spec.layout.is_varlen, dout, dlse, out, lse, tensors[_SINK])
        return tuple(_as(found[n], tensors[n].dtype) for n in wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.call, ctx.wanted = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        run, present, primals = _gradient_fn(ctx)
        _, pullback = vjp(run, *primals)
        grads: list[Any] = [None] * (_HEADS + COUNT + 3)
        for n, grad in zip(present, pullback(tuple(cotangents)), strict=True):
            grads[n] = grad
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        run, present, primals = _gradient_fn(ctx)
        return jvp_by_vjp(run, primals, [tangents[n] for n in present])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        tensors, seed, call, wanted = args[_HEADS:-3], *args[-3:]
        if _folds(call, tensors, in_dims[_HEADS:], seed):
            first = _HEADS + 3
            joint = [_folded(x, d, info.batch_size) for x, d in zip(args[:first], in_dims, strict=False)]
            found = Backward.apply(*joint, *tensors[3:], seed, _with_batch(call, info.batch_size), wanted)
            return _unfolded(found, info.batch_size, call)
        return vmap_by_loop(Backward.apply, info, in_dims, args)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _run(call: Call, tensors: Tensors, seed: Tensor | None) -> tuple[Tensor, ...]:
    if call.body == ops.GATHER:
        return gather.forward(call.ops, call.spec, tensors, seed)
    return call.ops.forward(call.spec, tensors, seed, call.body)


def _outputs(call: Call) -> int:
    return 3 if call.body == ops.GATHER else 2


def _gradients(
    call: Call, grads: Tensors, tensors: Tensors, seed: Tensor | None, wanted: tuple[int, ...]
) -> dict[int, Tensor]:
    """The operators' gradients of the inputs wanted, by place; the sink's is not theirs."""
    if call.body == ops.GATHER:
        return gather.backward((call.ops, call.spec), grads, tensors, seed, wanted)
    bits = 0
    for n in wanted:
        bits |= _BITS.get(n, 0)
    if not bits:
        return {}
    found = call.ops.backward(call.spec, grads[:4], tensors, seed, (call.body, bits))
    return dict(zip(_BITS, found, strict=True))


def sink_gradient(
    packed: bool, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sink: Tensor
) -> Tensor:
    """[H], of `out` [B, H, Sq, Dv] and `lse` [B, H, Sq], or packed [total, H, Dv] and [H, total]."""
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    delta = delta.t() if packed else delta
    if dlse is not None:
        delta = delta - dlse
    share = torch.where(lse == -torch.inf, 0.0, torch.exp(sink[:, None] - lse))
    return -(share * delta).sum(-1) if packed else -(share * delta).sum((0, 2))


def present_of(tensors: list[Tensor | None] | Tensors) -> list[int]:
    return [n for n, x in enumerate(tensors) if x is not None]


def placed(values: tuple[Tensor, ...], present: list[int]) -> Tensors:
    found: list[Tensor | None] = [None] * COUNT
    for n, value in zip(present, values, strict=True):
        found[n] = value
    return tuple(found)


def _attend_fn(
    call: Call, seed: Tensor | None, present: list[int], outputs: tuple[bool, bool]
) -> Callable[..., tuple[Tensor, ...]]:
    """The reference as a function of the tensors that are there, giving the outputs asked for."""
    spec = replace(call.spec, seed=seed)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        out, lse = reference.attend(spec, placed(values, present))
        found = (out, lse.double())  # as the operators give it
        return tuple(x for x, asked in zip(found, outputs, strict=True) if asked)

    return run


def _gradient_fn(ctx: Any) -> tuple[Callable[..., Any], list[int], list[Tensor]]:
    """`Backward` by the reference: the function, the places of its arguments among the inputs, and their
    values.
    """
    dout, dlse, _, _, _, *tensors, seed = ctx.saved_tensors
    inside = present_of(tensors)
    run = _attend_fn(ctx.call, seed, inside, (True, dlse is not None))
    heads = [dout] if dlse is None else [dout, dlse]

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        _, pullback = vjp(run, *values[len(heads) :])
        found = pullback(tuple(values[: len(heads)]))
        return tuple(found[inside.index(n)] for n in ctx.wanted)

    places = [*range(len(heads)), *(n + _HEADS for n in inside)]
    return gradients, places, [*heads, *(tensors[n] for n in inside)]


def _folds(call: Call, tensors: Sequence[Any], in_dims: Any, seed: Tensor | None) -> bool:
    """Entries become batch entries where nothing but q, k and v tells those apart."""
    args = call.spec.args
    alone = all(t is None for t in tensors[3:]) and seed is None
    return (
        alone
        and call.spec.layout.is_dense
        and args.lengths is None
        and args.keep is None
        and args.q_ids is None
    )


def _folded(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if x is None:
        return None
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _with_batch(call: Call, size: int) -> Call:
    return replace(call, spec=replace(call.spec, batch=size * call.spec.batch))


def _unfolded(found: tuple[Tensor, ...], size: int, call: Call) -> Any:
    """The results by entry. What has one dimension is a result that nobody asked for, [0]."""
    sizes = (size, call.spec.batch)
    return tuple(x.unflatten(0, sizes) if x.dim() > 1 else x.expand(size, *x.shape) for x in found), (
        0,
    ) * len(found)
