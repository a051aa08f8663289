"""Derivatives of every order and kind, and the transforms: gradcheck, forward mode, vmap, compile, export,
autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import saccade
import torch
from saccade import ops
from saccade.problem import Problem
from saccade.testing import Shape, derivatives, make_inputs
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

TINY = Shape(2, 2, 1, 3, 4, 3, 2)


def draw(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, requires_grad=True)


def graph(repeats: bool = False) -> saccade.Graph:
    edges = torch.tensor([[0, 2, 3, 1, 3], [0, 0, 1, 2, 2]])
    return saccade.Graph.from_edge_index(torch.cat([edges, edges[:, :2]], 1) if repeats else edges, (4, 3))


def with_edges(*names: str) -> Callable[..., dict[str, Any]]:
    def build(x: Tensor, y: Tensor | None = None) -> dict[str, Any]:
        return {"edge_attr": (x, y)} if y is not None else {"edge_bias": x}

    return build


# name -> (the tensors beside q, k, v; how they become options; fixed options)
CASES: dict[str, tuple[tuple[Tensor, ...], Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "causal": ((), dict, {"causal": True}),
    "empty rows": ((), dict, {"mask": saccade.Band(None, -2)}),
    "relu": ((), dict, {"activation": "relu"}),
    "sigmoid": ((), dict, {"activation": "sigmoid"}),
    "softcap, scale": ((), dict, {"softcap": 1.5, "scale": 0.7}),
    "dropout": ((), dict, {"dropout_p": 0.4, "seed": 5}),
    "padding": ((), dict, {"mask": saccade.KeyPadding(torch.tensor([0, 3]))}),
    "graph": ((), dict, {"mask": graph()}),
    "bias": ((draw(2, 3, 4),), lambda x: {"bias": x}, {}),
    "row bias": ((draw(1, 1, 4),), lambda x: {"bias": x}, {"window": (1, 1)}),
    "sink": ((draw(2),), lambda x: {"sink": x}, {"mask": saccade.Band(None, -2)}),
    "alibi": ((draw(2),), lambda x: {"position": saccade.ALiBi(x)}, {}),
    "t5": ((draw(4, 2),), lambda x: {"position": saccade.T5(x)}, {}),
    "shaw": ((draw(3, 3),), lambda x: {"position": saccade.Shaw(x)}, {}),
    "transformer-xl": (
        (draw(6, 3), draw(2, 3), draw(2, 3)),
        lambda *x: {"position": saccade.TransformerXL(*x)},
        {"softcap": 2.0},
    ),
    "rope": ((draw(1),), lambda x: {"position": saccade.RoPE(inv_freq=x)}, {}),
    "additive": ((draw(2, 3),), lambda x: {"score": saccade.Additive(x)}, {}),
    "gatv2": ((draw(3),), lambda x: {"score": saccade.GATv2(x, 0.3)}, {}),
    "edge bias, repeats": ((draw(2, 7),), with_edges(), {"mask": graph(repeats=True)}),
}  # fmt: skip


def call_of(name: str, backend: str | None = None) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    extra, build, fixed = CASES[name]
    inputs = (*make_inputs(TINY, torch.float64), *extra)
    softmax = fixed.get("activation", "softmax") == "softmax"
    # An empty row's lse is -inf: no finite difference of it means anything.
    lse = softmax and name not in ("empty rows", "padding")

    def run(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Any:
        return saccade.attention(q, k, v, **build(*more), **fixed, return_lse=lse, backend=backend)

    return run, inputs


def supported(name: str, backend: str) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    run, inputs = call_of(name, backend)
    try:
        run(*inputs)
    except NotImplementedError:
        pytest.skip(f"not for {backend}")
    return run, inputs


@pytest.mark.many_calls
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str, backend: str) -> None:
    run, inputs = supported(name, backend)
    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("name", ["causal", "edge bias, repeats"])
def test_cotangents_in_a_batch(name: str, backend: str) -> None:
    """autograd.grad(is_grads_batched=True), jacobian(vectorize=True): their vmap knows no Function."""
    run, inputs = supported(name, backend)
    outputs = run(*inputs)
    heads = [torch.randn(3, *x.shape, dtype=x.dtype) for x in outputs]
    batched = torch.autograd.grad(outputs, inputs, heads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(outputs, inputs, [x[n] for x in heads], retain_graph=True) for n in range(3)]
    for got, *want in zip(batched, *each, strict=True):
        torch.testing.assert_close(got, torch.stack(want))
    (of_out,) = torch.autograd.grad(outputs[0], inputs[:1], heads[0], is_grads_batched=True)
    want_of_out = [torch.autograd.grad(run(*inputs)[0], inputs[0], x)[0] for x in heads[0]]
    torch.testing.assert_close(of_out, torch.stack(want_of_out))
    jacobians = [
        torch.autograd.functional.jacobian(lambda q: run(q, *inputs[1:])[0], inputs[0], vectorize=vectorize)
        for vectorize in (False, True)
    ]
    torch.testing.assert_close(*jacobians)


@pytest.mark.many_calls
@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name: str, backend: str) -> None:
    run, inputs = supported(name, backend)
    assert gradgradcheck(run, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_edge_attr_derivatives(backend: str) -> None:
    q, k, v = make_inputs(Shape(1, 2, 2, 3, 4, 3, 3), torch.float64)
    e, w = draw(7, 2), draw(2, 3, 2)

    def run(q: Tensor, k: Tensor, v: Tensor, e: Tensor, w: Tensor) -> Tensor:
        return saccade.attention(q, k, v, graph(repeats=True), edge_attr=(e, w), backend=backend)

    assert gradcheck(run, (q, k, v, e, w), check_forward_ad=True, fast_mode=backend == "triton")
    assert gradgradcheck(run, (q, k, v, e, w), fast_mode=True)


def test_only_some_inputs_need_gradients(backend: str) -> None:
    q, k, v = make_inputs(TINY, torch.float64)
    full = torch.autograd.grad(saccade.attention(q, k, v, backend=backend).sum(), (q, k, v))
    for n in range(3):
        some = [x.detach().requires_grad_(m == n) for m, x in enumerate((q, k, v))]
        out = saccade.attention(*some, backend=backend)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), some[n])[0], full[n])


def test_only_some_edge_terms_need_gradients(backend: str) -> None:
    tensors = [*make_inputs(Shape(1, 2, 2, 3, 4, 3, 3), torch.float64), draw(7, 2), draw(2, 3, 2)]

    def loss(q: Tensor, k: Tensor, v: Tensor, e: Tensor, w: Tensor) -> Tensor:
        return saccade.attention(q, k, v, graph(repeats=True), edge_attr=(e, w), backend=backend).sin().sum()

    full = torch.autograd.grad(loss(*tensors), tensors)
    for n, want in enumerate(full):
        some = [x.detach().requires_grad_(m == n) for m, x in enumerate(tensors)]
        torch.testing.assert_close(torch.autograd.grad(loss(*some), some[n])[0], want)


def test_lse_alone_has_gradients(backend: str) -> None:
    q, k, v = make_inputs(TINY, torch.float64)
    lse = saccade.attention(q, k, v, return_lse=True, backend=backend)[1]
    expected = torch.logsumexp(q @ k.transpose(-1, -2) * 3**-0.5, -1)
    for got, want in zip(
        torch.autograd.grad(lse.sum(), (q, k)), torch.autograd.grad(expected.sum(), (q, k)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_expanded_bias_gets_its_own_gradient(backend: str) -> None:
    q, k, v = make_inputs(TINY, torch.float64)
    base = draw(2, 1, 3, 4)
    wide = base.expand(2, 2, 3, 4)
    grads = [
        torch.autograd.grad(saccade.attention(q, k, v, bias=b, backend=backend).pow(2).sum(), b)[0]
        for b in (wide, wide.detach().clone().requires_grad_())
    ]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.many_calls
@pytest.mark.parametrize("name", ["causal", "bias", "sink", "dropout", "graph", "alibi"])
def test_vmap(name: str, backend: str) -> None:
    run, inputs = supported(name, backend)
    stacked = [torch.stack([x, 2 * x, -x]).detach() for x in inputs]
    got = torch.vmap(run)(*stacked)
    want = [torch.stack(t) for t in zip(*(run(*(s[n] for s in stacked)) for n in range(3)), strict=True)]
    torch.testing.assert_close(list(got), want)
    # Over the keys only: what is not batched is shared.
    got = torch.vmap(run, in_dims=(None, 1, *(None,) * (len(inputs) - 2)))(
        stacked[0][0], stacked[1].movedim(0, 1), *(s[0] for s in stacked[2:])
    )
    want = [run(stacked[0][0], stacked[1][n], *(s[0] for s in stacked[2:])) for n in range(3)]
    torch.testing.assert_close(got[0], torch.stack([w[0] for w in want]))


@pytest.mark.parametrize("sizes", [(5, 0, 4), (5, 4, 0), (0, 4, 4)])
def test_vmap_of_nothing(sizes: tuple[int, int, int], backend: str) -> None:
    entries, queries, keys = sizes
    q, k = torch.randn(entries, 2, 3, queries, 8), torch.randn(entries, 2, 3, keys, 8)

    def run(q: Tensor, k: Tensor) -> Tensor:
        return saccade.attention(q, k, k, backend=backend)

    assert torch.vmap(run)(q, k).shape == q.shape
    grads = torch.vmap(torch.func.grad(lambda q, k: run(q, k).sum(), argnums=(0, 1)))(q, k)
    assert [g.shape for g in grads] == [q.shape, k.shape]
    assert not any(bool(g.any()) for g in grads)


@pytest.mark.many_calls
def test_per_sample_gradients(backend: str) -> None:
    q, k, v = (x.detach() for x in make_inputs(Shape(5, 2, 2, 3, 4, 3, 2), torch.float64))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return saccade.attention(q, k, v, causal=True, backend=backend).pow(2).sum()

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.testing.assert_close(got, torch.autograd.grad(loss(*leaves), leaves))


@pytest.mark.many_calls
def test_hessian_and_jacobians_agree(backend: str) -> None:
    q, k, v = (x.detach() for x in make_inputs(Shape(1, 1, 1, 2, 3, 2, 2), torch.float64))

    def loss(q: Tensor) -> Tensor:
        return saccade.attention(q, k, v, backend=backend).pow(3).sum()

    twice = torch.func.jacrev(torch.func.jacrev(loss))(q)
    torch.testing.assert_close(torch.func.hessian(loss)(q), twice)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, q), twice)


def test_forward_mode_without_gradients(backend: str) -> None:
    q, k, v = (x.detach() for x in make_inputs(TINY, torch.float64))
    tangent = torch.randn_like(q)
    with forward_ad.dual_level():
        out = saccade.attention(forward_ad.make_dual(q, tangent), k, v, backend=backend)
        got = forward_ad.unpack_dual(out).tangent
    step = 1e-6
    ends = [saccade.attention(q + s * tangent, k, v, backend=backend) for s in (step, -step)]
    torch.testing.assert_close(got, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)


def test_checkpoint_repeats_dropout(backend: str) -> None:
    q, k, v = make_inputs(TINY, torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return saccade.attention(q, k, v, dropout_p=0.5, backend=backend)

    torch.manual_seed(1)
    want = torch.autograd.grad(run(q, k, v).sum(), (q, k, v))
    torch.manual_seed(1)
    got = torch.autograd.grad(checkpoint(run, q, k, v, use_reentrant=False).sum(), (q, k, v))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_torch(dtype: torch.dtype, backend: str) -> None:
    q, k, v = make_inputs(TINY)
    with torch.autocast("cpu", dtype):
        out = saccade.attention(q, k, v, backend=backend)
        assert (
            out.dtype
            == dtype
            == torch.nn.functional.scaled_dot_product_attention(
                q, k.expand_as(q[:, :, :1].expand(2, 2, 4, 3)), v.expand(2, 2, 4, 2)
            ).dtype
        )
        wide = saccade.attention(q.double(), k.double(), v.double(), backend=backend)
        assert wide.dtype == torch.float64
    out.sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


@pytest.mark.parametrize("terms", ["none", "edge_attr"])
def test_autocast_leaves_the_arithmetic_wide(terms: str, backend: str) -> None:
    q, k, v = (x.detach().bfloat16() for x in make_inputs(Shape(2, 2, 2, 9, 9, 16, 16)))
    options: dict[str, Any] = {"return_lse": True, "backend": backend}
    if terms == "edge_attr":
        edges = saccade.Graph.from_dense(torch.rand(9, 9) < 0.5)
        options |= {"mask": edges, "edge_attr": (torch.randn(edges.num_edges, 3), torch.randn(2, 16, 3))}
    want = saccade.attention(q, k, v, **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = saccade.attention(q, k, v, **options)
    assert all(map(torch.equal, got, want))


@pytest.mark.skipif(not ops.LOADED, reason="no operator library")
def test_compile_leaves_strides_of_any_order_open() -> None:
    torch._dynamo.reset()
    inputs = make_inputs(Shape(2, 3, 3, 5, 7, 8, 8), order="sbhd")
    got = torch.compile(saccade.attention, fullgraph=True, dynamic=True, backend="aot_eager")(*inputs)
    want = saccade.attention(*inputs)
    assert got.stride() == want.stride()
    torch.testing.assert_close(derivatives(got, inputs), derivatives(want, inputs))


COMPILED = ["causal", "bias", "sink", "dropout", "padding", "graph", "alibi", "rope", "additive", "relu"]


@pytest.mark.skipif(not ops.LOADED, reason="no operator library")
@pytest.mark.parametrize("name", COMPILED)
def test_compile(name: str) -> None:
    torch._dynamo.reset()
    run, inputs = call_of(name)
    want = run(*inputs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = compiled(*inputs)
    torch.testing.assert_close(got, want)

    def total(outputs: Any) -> Tensor:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((x.pow(2).sum() for x in outputs), torch.zeros((), dtype=torch.float64))

    torch.testing.assert_close(
        torch.autograd.grad(total(got), inputs), torch.autograd.grad(total(want), inputs)
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), want)


@pytest.mark.skipif(not ops.LOADED, reason="no operator library")
def test_compile_dynamic_shapes_without_recompiling() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: saccade.attention(q, k, v, window=(3, 0)),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (5, 9, 14):
            q, k, v = make_inputs(Shape(2, 2, 2, size, size + 3, 4, 4))
            torch.testing.assert_close(compiled(q, k, v), saccade.attention(q, k, v, window=(3, 0)))


class Block(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return saccade.attention(q, k, v, causal=True)


@pytest.mark.skipif(not ops.LOADED, reason="no operator library")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(strict: bool, dynamic: bool) -> None:
    inputs = tuple(x.detach() for x in make_inputs(Shape(2, 2, 2, 6, 6, 4, 4)))
    dims = {2: torch.export.Dim("length", min=2, max=4096)} if dynamic else None
    program = torch.export.export(
        Block(), inputs, strict=strict, dynamic_shapes=(dims,) * 3 if dynamic else None
    )
    assert any("saccade" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), Block()(*inputs))


@pytest.mark.skipif(not ops.LOADED, reason="no operator library")
@pytest.mark.parametrize("name", ["causal", "bias", "dropout", "graph", "sink", "alibi", "additive"])
def test_opcheck(name: str) -> None:
    extra, build, fixed = CASES[name]
    problem = Problem.of(*make_inputs(TINY, torch.float64), **build(*extra), **fixed)
    tensors = tuple(None if x is None else x.detach() for x in problem.tensors)
    spec = problem.spec
    seen = _captured(lambda: ops.forward(spec, tensors, spec.seed, ops.TILED))
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.saccade.forward.default, seen, test_utils=utils)
    out, lse = ops.forward(spec, tensors, spec.seed, ops.TILED)
    grads = (torch.randn_like(out), torch.randn_like(lse), out, lse)
    needs = sum(1 << bit for bit, n in enumerate((0, 1, 2, 3, 4, 5, 7, 8)) if tensors[n] is not None)
    seen = _captured(lambda: ops.backward(spec, grads, tensors, spec.seed, (ops.TILED, needs)))
    torch.library.opcheck(torch.ops.saccade.backward.default, seen, test_utils=utils)
    seen = _captured(lambda: ops.weights(spec, lse, tensors, spec.seed, False))
    torch.library.opcheck(torch.ops.saccade.weights.default, seen, test_utils=utils)
    seen = _captured(lambda: ops.forward_weights(spec, tensors, spec.seed, True))
    torch.library.opcheck(torch.ops.saccade.forward_weights.default, seen, test_utils=utils)


def _captured(run: Callable[[], Any]) -> tuple[Any, ...]:
    """The arguments with which `run` calls an operator of saccade."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[tuple[Any, ...]] = []

    class Capture(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "saccade":
                found.append(args)
            return func(*args, **(kwargs or {}))

    with Capture():
        run()
    return found[-1]


def test_operators_are_called_for_the_smallest_shapes() -> None:
    if not ops.LOADED:
        pytest.skip("no operator library")
    x = torch.randn(1, 1, 1, 1)
    assert _captured(lambda: saccade.attention(x, x, x))


@pytest.mark.parametrize("average", [False, True])
def test_weights_and_their_derivatives(average: bool, backend: str) -> None:
    from saccade.functional import attend_with_weights

    inputs = make_inputs(TINY, torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        problem = Problem.of(q, k, v, saccade.Causal(), dropout_p=0.3, seed=3)
        return attend_with_weights(problem, average, backend)

    out, weights = run(*inputs)
    want = run_reference_weights(*inputs)
    torch.testing.assert_close(weights, want.mean(1) if average else want)
    torch.testing.assert_close(out, want @ inputs[2].expand(2, 2, 4, 2))
    assert gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


def run_reference_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~saccade.Causal().materialize(3, 4), -torch.inf).softmax(-1)
    return weights * saccade.dropout_mask(3, 0.3, 2, 2, 3, 4) / 0.7
