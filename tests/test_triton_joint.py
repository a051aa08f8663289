"""Edge features inside additive scores, on Triton's kernels: W e joins the query, edge by edge."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import saccade
import torch
from saccade import Additive, GATv2, Graph
from saccade.testing import Shape, check_attention, derivatives, make_inputs
from torch import Tensor

if "triton" not in saccade.backends() or not saccade.ops_triton.INTERPRETED:
    pytest.skip("triton is not installed, or not interpreted", allow_module_level=True)

from saccade.backends import cpu, triton
from saccade.kernels import launch_gather
from saccade.nn import _conv, gat_conv

SCORES = {"additive": Additive, "gatv2": GATv2}


def terms(edges: int, heads: int, dim: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight, e and W, as leaves."""
    sizes = ((heads, dim), (edges, features), (heads, dim, features))
    weight, e, w = (torch.randn(size, requires_grad=True) for size in sizes)
    return weight, e, w


def some_graph(sources: int, targets: int, count: int) -> Graph:
    """With repeats, and a target without edges."""
    index = torch.stack([torch.randint(sources, (count,)), torch.randint(targets - 1, (count,))])
    return Graph.from_edge_index(torch.cat([index, index[:, :3]], 1), (sources, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("score", "features", "shape"), [
    ("gatv2", 1, (2, 2, 1, 9, 9, 1, 6)),  # a score of one channel, as GATConv's
    ("additive", 3, (1, 2, 2, 9, 7, 5, 8)),
    ("gatv2", 16, (1, 1, 1, 7, 11, 19, 3)),
    ("gatv2", 33, (1, 3, 1, 8, 8, 33, 33)),
])  # fmt: skip
def test_matches_the_reference(score: str, features: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, heads_k, queries, keys, dim, dim_v = shape
    graph = some_graph(keys, queries, 37)
    weight, e, w = terms(40, heads, dim, features)
    inputs = make_inputs(Shape(batch, heads, heads_k, queries, keys, dim, dim_v), dtype)
    check_attention(inputs, graph, "triton", score=SCORES[score](weight, edge_attr=(e, w)))


@pytest.mark.parametrize("options", [
    {"dropout_p": 0.3, "seed": 5, "return_lse": True}, {"softcap": 3.0, "scale": 0.5},
    {"activation": "sigmoid"}, {"edge_bias": True, "sink": True},
], ids=lambda o: next(iter(o)))  # fmt: skip
def test_goes_with_other_options(options: dict[str, Any]) -> None:
    graph = some_graph(12, 12, 57)
    made = {
        "edge_bias": lambda: torch.randn(2, 60).requires_grad_(),
        "sink": lambda: torch.randn(2).requires_grad_(),
    }
    options = {name: made[name]() if name in made else value for name, value in options.items()}
    weight, e, w = terms(60, 2, 6, 4)
    mask = graph & saccade.Window(8, None)  # some edges are left out
    inputs = make_inputs(Shape(2, 2, 2, 12, 12, 6, 6), torch.float64)
    check_attention(inputs, mask, "triton", score=GATv2(weight, 0.1, edge_attr=(e, w)), **options)


@pytest.mark.parametrize("part", [1, 1000])
@pytest.mark.parametrize("item", [4, 256])
def test_hubs_and_partial_sums(item: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row and a column that are cut into pieces; one partial sum of W's gradient, and many."""
    monkeypatch.setattr(saccade.ops_triton, "ITEM", item)
    monkeypatch.setattr(launch_gather, "_PART", part)
    hub = torch.stack([torch.arange(20), torch.full((20,), 3)])
    index = torch.cat([hub, hub.flip(0), hub[:, :5]], 1)
    graph = Graph.from_edge_index(index, 20)
    weight, e, w = terms(45, 2, 5, 3)
    inputs = make_inputs(Shape(1, 2, 1, 20, 20, 5, 5))
    monkeypatch.setitem(launch_gather._BLOCK, "edges", (1024, 64))  # several blocks for each partial sum
    check_attention(inputs, graph, "triton", score=GATv2(weight, edge_attr=(e, w)))


def test_partial_sums_stay_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory does not grow with the edges: 64 edges each, then as many as fit; results are the same."""
    sizes: list[tuple[int, ...]] = []
    run = type(launch_gather.gather_backward_edges).__getitem__

    def spy(self: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            if self is launch_gather.gather_backward_edges:
                sizes.append(tuple(args[8].shape))
            return run(self, grid)(*args, **options)

        return launch

    monkeypatch.setattr(type(launch_gather.gather_backward_edges), "__getitem__", spy)
    graph = some_graph(9, 9, 297)
    q, k, v = make_inputs(Shape(1, 2, 2, 9, 9, 4, 4), torch.float64)
    leaves = [x.detach().double().requires_grad_() for x in terms(300, 2, 4, 3)]
    found = []
    for limit in (1 << 22, 2 * 2 * 4 * 3):
        monkeypatch.setattr(launch_gather, "_PARTS", limit)
        score = GATv2(leaves[0], edge_attr=(leaves[1], leaves[2]))
        out = saccade.attention(q, k, v, graph, score=score, backend="triton")
        found.append(derivatives(out, leaves))
    assert sizes == [(5, 2, 3, 4), (2, 2, 3, 4)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_results_repeat_and_gradients_stand_alone() -> None:
    """Bit for bit; and a gradient wanted alone is the one found among all."""
    graph = some_graph(10, 10, 67)
    q, k, v = (x.detach() for x in make_inputs(Shape(2, 2, 1, 10, 10, 7, 5)))
    weight, e, w = (x.detach() for x in terms(70, 2, 7, 3))
    given = {"q": q, "k": k, "v": v, "weight": weight, "e": e, "w": w}

    def gradients(*of: str) -> list[Tensor]:
        x = {name: t.clone().requires_grad_(name in of) for name, t in given.items()}
        score = Additive(x["weight"], edge_attr=(x["e"], x["w"]))
        out = saccade.attention(x["q"], x["k"], x["v"], graph, score=score, backend="triton")
        return list(torch.autograd.grad(out.sin().sum(), [x[name] for name in of]))

    every = dict(zip(given, gradients(*given), strict=True))
    again = dict(zip(given, gradients(*given), strict=True))
    assert all(torch.equal(every[name], again[name]) and every[name].any() for name in given)
    for name in given:
        assert torch.equal(gradients(name)[0], every[name]), name


@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 4, 4), (1, 0, 4), (1, 4, 0), (0, 4, 4)])
def test_no_edges_and_nothing_at_all(batch: int, queries: int, keys: int) -> None:
    edges = 3 if batch == 0 else 0
    graph = Graph.from_edge_index(torch.zeros(2, edges, dtype=torch.int64), (keys, queries))
    leaves = [*make_inputs(Shape(batch, 2, 2, queries, keys, 8, 8)), *terms(edges, 2, 8, 3)]
    score = GATv2(leaves[3], edge_attr=(leaves[4], leaves[5]))
    out = saccade.attention(*leaves[:3], graph, score=score, backend="triton")
    assert not out.any()
    torch.empty(1 << 16).fill_(float("nan"))  # what a gradient that nobody fills may find
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in grads] == [x.shape for x in leaves] and not any(g.any() for g in grads)


def test_second_derivatives_and_compile() -> None:
    graph = Graph.from_edge_index(torch.randint(5, (2, 11)), 5).prepare()
    q, k, v = (x.detach().double().requires_grad_() for x in make_inputs(Shape(1, 1, 1, 5, 5, 2, 2)))
    weight, e, w = (x.detach().double().requires_grad_() for x in terms(11, 1, 2, 2))

    def call(*x: Tensor) -> Tensor:
        score = Additive(x[3], edge_attr=(x[4], x[5]))
        return saccade.attention(*x[:3], graph, score=score, backend="triton")

    leaves = (q, k, v, weight, e, w)
    assert torch.autograd.gradcheck(call, leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), call(*leaves))
    both = [derivatives(derivatives_of(call, leaves, backend), leaves) for backend in ("triton", "reference")]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


def derivatives_of(call: Any, leaves: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
    """First derivatives that can be differentiated again; `backend` is that of the call inside."""
    attention = saccade.attention
    try:
        saccade.attention = lambda *args, **options: attention(*args, **(options | {"backend": backend}))
        return torch.autograd.grad(call(*leaves).sin().sum(), leaves, create_graph=True)
    finally:
        saccade.attention = attention


# -- the layers


@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv"])
@pytest.mark.parametrize("bipartite", [False, True])
def test_layers_take_the_kernel(name: str, bipartite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton serves a device, W e is joined there: with equal results, and no logits beforehand."""
    shape, sizes = ((6, 4), (9, 7)) if bipartite else (6, (9, 9))
    layer = getattr(saccade.nn, name)(shape, 5, heads=2, edge_dim=3, dropout=0.3)
    index = torch.stack([torch.randint(sizes[0], (30,)), torch.randint(sizes[1], (30,))])
    x, y, e = torch.randn(sizes[0], 6), torch.randn(sizes[1], 4 if bipartite else 6), torch.randn(30, 3)
    given, asked = ((x, y) if bipartite else x), []
    leaves = [*layer.parameters()]

    def results() -> list[Tensor]:
        torch.manual_seed(7)
        out = layer(given, index, e)
        return [out, *derivatives(out, leaves)]

    def attention(*args: Any, **options: Any) -> Any:
        asked.append(options)
        return saccade.attention(*args, backend="triton", **options)

    monkeypatch.setattr(gat_conv, "_joins_features", lambda rows: False)
    plain = results()
    monkeypatch.setattr(_conv, "attention", attention)
    monkeypatch.setattr(gat_conv, "_joins_features", lambda rows: True)
    joined = results()
    (options,) = asked
    assert options["score"].edge_attr is not None and "edge_bias" not in options
    for a, b in zip(joined, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_which_devices_join(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Any = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(triton, "missing", list)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    for capability, joins in (((8, 0), True), ((9, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert gat_conv._joins_features(rows) == joins
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(triton, "missing", lambda: ["triton is not installed"])
    assert not gat_conv._joins_features(rows)
    assert gat_conv._joins_features(torch.empty(0)) == (not cpu.missing())


def test_only_cuda_names_a_reason() -> None:
    graph = some_graph(4, 4, 3)
    x = torch.zeros(2, 4, 4)
    weight, e, w = terms(6, 2, 4, 3)
    score = GATv2(weight, edge_attr=(e, w))
    assert saccade.explain(x, x, x, graph, score=score, backend="triton").kernel == "gather"
    reasons = saccade.explain(x, x, x, graph, score=score).reasons
    assert not any("features" in why or "additive" in why for why in reasons["triton"])
    assert any("scores other than the dot product" in why for why in reasons["cuda"])
