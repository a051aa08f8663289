"""Attention inside programs of torch's compiler and exporter: what they record has the derivatives of what
they saw, serves other lengths and bounds, and runs without this package's Python.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import saccade
import torch
from saccade import nn, ops
from saccade.graph import Graph
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

pytestmark = pytest.mark.skipif(not ops.LOADED, reason="the CPU kernels are not built")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def edges(nodes: int, count: int) -> Graph:
    return Graph.from_edge_index(torch.randint(nodes, (2, count)), nodes)


def dual(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent

    return run


DERIVED: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "grad": lambda f: grad(lambda x: f(x).square().sum()),
    "grad of grad": lambda f: grad(lambda x: grad(lambda x: f(x).square().sum())(x).square().sum()),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1],
    "dual": dual,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda f: hessian(lambda x: f(x).sum()),
    "vmap of grad": lambda f: lambda x: vmap(grad(lambda x: f(x).square().sum()))(torch.stack([x, 2 * x])),
}


@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize("kind", ["dense", "graph"])
def test_compiled_transforms_keep_the_derivative(name: str, kind: str) -> None:
    q, k, v = draw(1, 2, 5, 4), draw(1, 2, 5, 4), draw(1, 2, 5, 4)
    mask = edges(5, 14) if kind == "graph" else None
    run = DERIVED[name](lambda q: saccade.attention(q, k, v, mask))
    expected = run(q)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(torch.compile(run, backend="eager", fullgraph=True)(q), expected)


def test_compiled_gradients_of_each_sample() -> None:
    """vmap of grad of a module and of its weights."""
    module = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    p, x = {n: p.detach() for n, p in module.named_parameters()}, draw(3, 5, 8)

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        out, weights = functional_call(module, p, (x[None], x[None], x[None]))
        return out.square().sum() + weights.square().sum()

    run = vmap(grad(loss), (None, 0))
    found = torch.compile(run, backend="eager", fullgraph=True)(p, x)
    for name, expected in run(p, x).items():
        torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize("chain", ["ff", "frf", "rff", "fff"])
def test_forward_mode_within_forward_mode(chain: str) -> None:
    q, k, v = draw(1, 1, 3, 2), draw(1, 1, 3, 2), draw(1, 1, 3, 2)

    def derived(attention: Any) -> Tensor:
        f = lambda q: attention(q, k, v, causal=True).square().sum()  # noqa: E731
        for step in reversed(chain):
            f = (jacfwd if step == "f" else jacrev)(f)
        return f(q)

    torch.testing.assert_close(derived(saccade.attention), derived(saccade.reference.attention))


class Called(torch.nn.Module):
    """A function of parameters and inputs."""

    def __init__(self, run: Callable[..., Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.run = run
        for name, value in parameters.items():
            setattr(self, name, torch.nn.Parameter(value))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


def trained(module: Any, inputs: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    module.zero_grad()
    module(*inputs).square().sum().backward()
    return {name: p.grad for name, p in module.named_parameters()}


GRAPH = edges(9, 20)


def layer(m: Any, x: Tensor) -> Tensor:
    return m.layer(x)


def terms(m: Any, q: Tensor) -> Tensor:
    return saccade.attention(m.w * q, q, q, bias=m.bias, sink=m.sink)


def triton(m: Any, q: Tensor) -> Tensor:
    return saccade.attention(m.w * q, q, q, bias=m.bias, sink=m.sink, causal=True, backend="triton")


def relative(m: Any, q: Tensor) -> Tensor:
    return saccade.attention(q, m.w * q, q, position=saccade.T5(m.table, bidirectional=True))


def packed(m: Any, x: Tensor, cu: Tensor) -> Tensor:
    return saccade.attention_varlen(x, x, m.w * x, cu, cu, 6, 6, sink=m.sink)


def graph(m: Any, q: Tensor) -> Tensor:
    return saccade.attention(m.w * q, q, q, GRAPH, edge_bias=m.edge_bias, sink=m.sink)


def features(m: Any, q: Tensor) -> Tensor:
    return saccade.attention(m.w * q, q, q, GRAPH, edge_attr=(m.e, m.p), sink=m.sink)


def gatv2(m: Any, q: Tensor) -> Tensor:
    return saccade.attention(q, m.w * q, q, GRAPH, score=saccade.GATv2(m.v, 0.2, edge_attr=(m.e, m.p)))


SIZES = {  # of parameters
    "w": (8,), "bias": (4, 1, 9), "sink": (4,), "table": (32, 4), "edge_bias": (4, 20), "e": (20, 3),
    "p": (4, 8, 3), "v": (4, 8),
}  # fmt: skip
PROGRAMS: dict[Callable[..., Tensor], str] = {
    terms: "w bias sink", triton: "w bias sink", relative: "w table", packed: "w sink",
    graph: "w edge_bias sink", features: "w e p sink", gatv2: "w v e p", layer: "",
}  # fmt: skip


def program_of(run: Callable[..., Tensor]) -> tuple[Called, tuple[Tensor, ...]]:
    module = Called(run, **{name: draw(*SIZES[name]) for name in PROGRAMS[run].split()})
    if run is layer:
        module.layer = nn.TransformerEncoderLayer(
            16, 2, 32, batch_first=True, dropout=0.0, dtype=torch.float64
        )
        return module, (draw(3, 20, 16),)
    return module, (draw(10, 4, 8), torch.tensor([0, 4, 10])) if run is packed else (draw(2, 4, 9, 8),)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("run", PROGRAMS)
def test_exported_programs_train(run: Callable[..., Tensor], strict: bool) -> None:
    module, inputs = program_of(run)
    expected = trained(module, inputs)
    assert all(g is not None for g in expected.values())
    program = export(module, inputs, strict=strict).module()
    for parameter, found in trained(program, inputs).items():
        torch.testing.assert_close(found, expected[parameter])


def test_exported_weights_say_that_they_have_no_derivative() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    program = export(module, (x, x, x)).module()
    out, weights = program(x, x, x)
    out.sum().backward(retain_graph=True)
    assert all(p.grad is not None for p in program.parameters())
    with pytest.raises(NotImplementedError, match="its weights and gradients have none"):
        weights.sum().backward()


def test_a_second_derivative_of_a_program_raises() -> None:
    module, inputs = program_of(terms)
    program = export(module, inputs).module()
    (first,) = torch.autograd.grad(program(*inputs).square().sum(), [program.w], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def compiled_once(run: Callable[..., Tensor], calls: list[tuple[Any, ...]]) -> None:
    """Ten calls with other sizes take the first program and one more, which leaves them open."""
    programs = 0

    def count(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal programs
        programs += 1
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=count)
    for call in calls:
        torch.testing.assert_close(compiled(*call), run(*call))
    assert programs == 2


def test_bounds_and_lengths_stay_open_in_compiled_programs() -> None:
    q = torch.randn(1, 2, 40, 8)
    for run in (
        lambda q, n: saccade.attention(q, q, q, window=(n, 0)),
        lambda q, n: saccade.attention(q, q, q, saccade.Chunks(n, 1)),
    ):
        compiled_once(run, [(q, n) for n in range(3, 13)])
    compiled_once(
        lambda x, cu, n: saccade.attention_varlen(x, x, x, cu, cu, n, n, causal=True),
        [(torch.randn(n, 2, 8), torch.tensor([0, n // 2, n]), n - n // 2) for n in range(20, 40, 2)],
    )
    compiled_once(
        lambda q, k, lengths: saccade.attention_decode(q, k, k, lengths=lengths),
        [
            (torch.randn(2, 4, 1, 8), torch.randn(2, 4, n, 8), torch.tensor([n, n - 2]))
            for n in range(20, 40, 2)
        ],
    )


def test_jagged_tensors_in_compiled_programs() -> None:
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    run = lambda x: module(x, x, x, need_weights=False)[0]  # noqa: E731
    compiled = torch.compile(run, backend="eager")
    for lengths in ([20, 7], [12, 9], [5, 30]):
        x = torch.nested.nested_tensor([torch.randn(n, 16) for n in lengths], layout=torch.jagged)
        torch.testing.assert_close(compiled(x).values(), run(x).values())


def test_compiled_padding_is_no_bias() -> None:
    """A bias would make every kernel read N x S numbers and visit what padding hides."""
    module, seen = nn.MultiheadAttention(16, 2, batch_first=True), []

    def look(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.extend(n for n in gm.graph.nodes if n.target is torch.ops.saccade.forward.default)
        return gm.forward

    x, padding = torch.randn(3, 20, 16), torch.arange(20).expand(3, -1) >= torch.tensor([[20], [11], [4]])
    with torch.no_grad():
        torch.compile(lambda x: module(x, x, x, key_padding_mask=padding, need_weights=False), backend=look)(
            x
        )
    at = ops.places("forward")
    assert len(seen) == 1 and seen[0].args[at["bias"]] is None and seen[0].args[at["keep"]] is not None


@pytest.mark.parametrize("strict", [True, False])
def test_padded_modules_are_exported_with_open_lengths(strict: bool) -> None:
    module, length = nn.MultiheadAttention(16, 2, batch_first=True), Dim("length", max=64)
    called = Called(lambda m, x, p: module(x, x, x, key_padding_mask=p, need_weights=False)[0])
    called.module = module

    def inputs(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(3, n, 16), torch.arange(n).expand(3, -1) >= torch.tensor([[n], [7], [4]])

    dims = (({1: length}, {1: length}),)  # of *inputs
    program = export(called, inputs(20), dynamic_shapes=dims, strict=strict).module()
    x = inputs(33)
    torch.testing.assert_close(program(*x), called(*x))


@pytest.mark.full
def test_ahead_of_time_programs_run_without_python(tmp_path: Path) -> None:
    module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        program = export(module, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        torch.save((x, module(x)), tmp_path / "expected.pt")
    code = f"""
import sys, torch
torch.ops.load_library({ops.PATH!r})
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(torch._inductor.aoti_load_package({str(path)!r})(x), expected)
assert "saccade" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_copies_of_a_program_train() -> None:
    module, inputs = program_of(layer)
    expected = trained(module, inputs)
    program = copy.deepcopy(export(module, inputs)).module()
    for name, found in trained(program, inputs).items():
        torch.testing.assert_close(found, expected[name])


def edge_terms(kind: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors of a graph's 20 edges that have gradients, and the options that take them."""
    if kind in ("dense", "graph"):
        return [], {}
    if kind == "bias":
        bias = torch.randn(4, 20, requires_grad=True)
        return [bias], {"edge_bias": bias}
    pair = torch.randn(20, 3, requires_grad=True), torch.randn(4, 8, 3, requires_grad=True)
    if kind == "features":
        return [*pair], {"edge_attr": pair}
    w = torch.randn(4, 8, requires_grad=True)
    return [*pair, w], {"score": saccade.GATv2(w, edge_attr=pair)}


@pytest.mark.parametrize("kind", ["dense", "graph", "bias", "features", "gatv2"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
def test_fakes_lie_as_results_do(order: tuple[int, ...], kind: str) -> None:
    """The compiler plans with the strides of fakes: q, k and v of other layouts have gradients of these."""
    index = torch.stack([torch.randint(9, (20,)), torch.randint(6, (20,))])
    graph = None if kind == "dense" else Graph.from_edge_index(index, (9, 6)).prepare()

    def strides() -> list[tuple[int, ...]]:
        shapes = ((2, 4, 6, 8), (2, 4 if graph else 2, 9, 8), (2, 4 if graph else 2, 9, 8 if graph else 16))
        q, k, v = (
            torch.randn([s[d] for d in order]).permute([order.index(d) for d in range(4)]) for s in shapes
        )
        more, options = edge_terms(kind)
        x = [t.requires_grad_() for t in (q, k, v)] + more
        out = saccade.attention(q, k, v, graph, **options)
        return [t.stride() for t in (out, *torch.autograd.grad(out.square().sum(), x))]

    expected = strides()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert strides() == expected


@pytest.mark.parametrize("layer", [nn.TransformerConv, nn.GATv2Conv])
def test_graph_layers_train_compiled(layer: Any) -> None:
    """By inductor, which holds the operators to the strides of their fakes."""
    torch._dynamo.reset()
    conv, graph, x = layer(5, 4, heads=2, edge_dim=3), edges(7, 20), torch.randn(7, 5)
    if layer is nn.GATv2Conv:
        graph = graph.add_self_loops()
    features = torch.randn(graph.num_edges, 3)
    found = []
    for run in (conv, torch.compile(conv)):
        conv.zero_grad()
        run(x, graph, features).sin().sum().backward()
        found.append({name: p.grad for name, p in conv.named_parameters()})
    torch.testing.assert_close(*found)
