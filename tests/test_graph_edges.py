"""Graphs at their edges: nothing in them, everything at one node, repeats; reordering; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade import Graph, locality
from saccade.backends import pairs
from saccade.testing import Shape, check_attention, make_inputs
from torch import Tensor


def attend(n: int, graph: Graph, backend: str | None = None, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The output of 2 heads and the gradients of q, k, v."""
    qkv = [torch.randn(2, n, 8, requires_grad=True) for _ in range(3)]
    out = saccade.attention(*qkv, graph, backend=backend, **options)
    return out, list(torch.autograd.grad(out.sin().sum(), qkv))


@pytest.mark.parametrize("n", [0, 1, 5])
def test_no_edges(n: int, backend: str) -> None:
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), n).prepare()
    out, grads = attend(n, graph, backend, edge_bias=torch.zeros(0))
    assert out.shape == (2, n, 8) and not out.any() and not any(g.any() for g in grads)
    lse = saccade.attention(*[torch.randn(2, n, 8)] * 3, graph, return_lse=True, backend=backend)[1]
    assert (lse == -torch.inf).all()
    loops = graph.add_self_loops()
    assert loops.num_edges == n
    x = torch.randn(2, n, 8)
    torch.testing.assert_close(saccade.attention(x, x, x, loops, backend=backend), x)


@pytest.mark.parametrize(("sources", "targets"), [(3, 0), (0, 3)])
def test_one_side_empty(sources: int, targets: int, backend: str) -> None:
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), (sources, targets))
    q, k = torch.randn(2, targets, 8), torch.randn(2, sources, 8)
    assert not saccade.attention(q, k, k, graph, backend=backend).any()


def test_one_node_with_itself(backend: str) -> None:
    x = torch.randn(2, 1, 8)
    graph = Graph.from_edge_index(torch.zeros(2, 3, dtype=torch.int64), 1)
    torch.testing.assert_close(saccade.attention(x, x, x, graph, backend=backend), x)


@pytest.mark.many_calls
@pytest.mark.parametrize("direction", ["in", "out", "both"])
def test_a_hub_with_every_edge(direction: str, backend: str) -> None:
    n, hub = 3000, 1234
    ends = torch.stack([torch.arange(n), torch.full((n,), hub)])
    index = {"in": ends, "out": ends.flip(0), "both": torch.cat([ends, ends.flip(0)], 1)}[direction]
    check_attention(make_inputs(Shape(1, 2, 2, n, n, 8, 8)), Graph.from_edge_index(index, n), backend)


@pytest.mark.parametrize("options", [{}, {"edge_bias": True}, {"dropout_p": 0.3, "seed": 4}])
def test_isolated_nodes_are_zero_and_repeats_count(options: dict[str, Any], backend: str) -> None:
    index = torch.tensor([[0, 0, 3, 5, 3, 3], [2, 2, 2, 1, 0, 0]])
    graph = Graph.from_edge_index(index, 7)
    if options.get("edge_bias"):
        options = {"edge_bias": torch.randn(6, requires_grad=True)}
    inputs = make_inputs(Shape(96, 1, 1, 7, 7, 8, 8))
    check_attention(inputs, graph, backend, **options)
    out = saccade.attention(*inputs, graph, backend=backend, **options)
    assert not out[:, :, 3:].any()
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(g.isfinite().all() for g in grads) and not grads[0][:, :, 3:].any()
    assert not grads[1][:, :, [1, 2, 4, 6]].any()


@pytest.mark.parametrize("options", ["plain", "bias", "dropout", "features", "gatv2", "relu", "sink"])
@pytest.mark.parametrize(("heads", "heads_k"), [(1, 1), (3, 3), (5, 1), (12, 4), (17, 17), (40, 8)])
def test_heads_share_vectors(heads: int, heads_k: int, options: str) -> None:
    """Any number of heads on rows of 0 to 40 edges: what a vector of numbers holds differs in each."""
    n, dim = 160, 5  # too thin for tiles
    index = torch.cat(
        [torch.stack([torch.randperm(n)[: i % 41], torch.full((i % 41,), i)]) for i in range(n)], 1
    )
    graph, count = Graph.from_edge_index(index, n), index.shape[1]
    given: dict[str, Any] = {
        "plain": lambda: {},
        "bias": lambda: {"edge_bias": torch.randn(heads, count, requires_grad=True)},
        "dropout": lambda: {"dropout_p": 0.3, "seed": 4},
        "features": lambda: {
            "edge_attr": (torch.randn(count, 3).requires_grad_(), torch.randn(heads, dim, 3).requires_grad_())
        },
        "gatv2": lambda: {"score": saccade.GATv2(torch.randn(heads, dim, requires_grad=True))},
        "relu": lambda: {"activation": "relu"},
        "sink": lambda: {"sink": torch.randn(heads, requires_grad=True), "softcap": 2.0},
    }[options]()
    wide = dim if options == "features" else 18
    check_attention(make_inputs(Shape(2, heads, heads_k, n, n, dim, wide)), graph, "cpu", **given)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16])
def test_dtypes_of_indices(kind: torch.dtype) -> None:
    index = torch.randint(50, (2, 300))
    x = torch.randn(2, 50, 8)
    expected = saccade.attention(x, x, x, Graph.from_edge_index(index, 50))
    graph = Graph.from_edge_index(index.to(kind), 50)
    csr = Graph.from_csr(graph.indptr.to(kind), graph.indices.to(kind), 50)
    for one in (graph, csr):
        assert torch.equal(saccade.attention(x, x, x, one), expected)


@pytest.mark.parametrize("edge_terms", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_threads_change_no_bit(edge_terms: bool, dropout_p: float) -> None:
    """A power-law graph: the hubs are cut and merged the same way by any number of threads."""
    n, count = 3000, 40_000
    targets = torch.multinomial((torch.arange(n) + 1.0) ** -1.5, count, True)
    index = torch.stack([torch.randint(n, (count,)), targets])
    graph = Graph.from_edge_index(index, n)
    inputs = list(make_inputs(Shape(1, 2, 2, n, n, 16, 16)))
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": 3}
    if edge_terms:
        e, w = torch.randn(count, 3, requires_grad=True), torch.randn(2, 16, 3, requires_grad=True)
        bias = torch.randn(2, count, requires_grad=True)
        options |= {"edge_attr": (e, w), "edge_bias": bias}
        inputs += [e, w, bias]
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = saccade.attention(*inputs[:3], graph, deterministic=True, **options)
            found.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


# -- reordering


def bandwidth(graph: Graph) -> int:
    sources, targets = graph.edge_index
    return int((sources - targets).abs().max())


@pytest.mark.many_calls
@pytest.mark.parametrize("kind", ["grid", "random", "islands", "none"])
def test_reordering_changes_no_result(kind: str, backend: str) -> None:
    n = 144
    shuffle = torch.randperm(n)
    index = {
        "grid": shuffle[saccade.patterns.grid2d(12, 12, 1).edge_index],
        "random": torch.randint(n, (2, 400)),
        "islands": shuffle[torch.stack([torch.arange(0, n, 2), torch.arange(1, n, 2)])],
        "none": torch.zeros(2, 0, dtype=torch.int64),
    }[kind]
    graph = Graph.from_edge_index(index, n)
    turned, order = graph.reorder()
    assert torch.equal(order.sort()[0], torch.arange(n)) and turned.num_edges == graph.num_edges
    assert torch.equal(order[turned.edge_index], index)  # edges keep their numbers
    inputs = [torch.randn(2, n, 8, requires_grad=True) for _ in range(3)]
    bias = torch.randn(2, index.shape[1], requires_grad=True)
    plain = saccade.attention(*inputs, graph, edge_bias=bias, backend=backend)
    q, k, v = (x[:, order] for x in inputs)
    again = saccade.attention(q, k, v, turned, edge_bias=bias, backend=backend)[:, order.argsort()]
    torch.testing.assert_close(again, plain)
    grads = [torch.autograd.grad(x.sin().sum(), [*inputs, bias]) for x in (plain, again)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    if kind == "grid":
        assert bandwidth(turned) < bandwidth(graph) / 3


def test_order_of_a_path_is_the_path() -> None:
    n = 50
    shuffle = torch.randperm(n)
    path = shuffle[torch.stack([torch.arange(n - 1), torch.arange(1, n)])]
    order = locality.cuthill_mckee(path[0], path[1], n)
    place = order.argsort()
    assert ((place[path[0]] - place[path[1]]).abs() == 1).all()
    assert locality.cuthill_mckee(path[0, :0], path[1, :0], 0).shape == (0,)


def test_a_bipartite_graph_has_no_order_of_its_own() -> None:
    with pytest.raises(ValueError, match="reorder: needs as many keys as queries, got 4 and 3"):
        Graph.from_edge_index(torch.tensor([[3], [2]]), (4, 3)).reorder()


# -- what is refused, before any work


X = torch.zeros(2, 3, 4)
G = Graph.from_edge_index(torch.tensor([[0, 2], [1, 0]]), 3)
Z = torch.zeros(2, 2, dtype=torch.int64)


def elsewhere() -> Graph:
    """A graph whose tensors say that they are on another device."""
    graph = Graph.from_edge_index(Z, 3)
    object.__setattr__(graph, "indptr", graph.indptr.to("meta"))
    return graph


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"edge_index\[0\] .*0 <= index < 2, got 0 to 2",
         lambda: Graph.from_edge_index(torch.tensor([[0, 2], [1, 0]]), 2)),  # num_nodes too small
        (ValueError, r"edge_index\[1\] .*0 <= index < 3, got 0 to 3",
         lambda: Graph.from_edge_index(torch.tensor([[0, 2], [3, 0]]), 3)),
        (ValueError, "got -1 to -1", lambda: Graph.from_edge_index(Z - 1, 3)),
        (ValueError, "expected 0 <= index < 0", lambda: Graph.from_edge_index(Z, 0)),
        (ValueError, r"expected shape \[2, E\], got \[2\]", lambda: Graph.from_edge_index(Z[0], 3)),
        (ValueError, r"expected shape \[2, E\], got \[3, 2\]", lambda: Graph.from_edge_index(X[0, :, :2], 3)),
        (ValueError, "integer dtype, got torch.float32", lambda: Graph.from_edge_index(Z.float(), 3)),
        (ValueError, "integer dtype, got torch.bool", lambda: Graph.from_edge_index(Z.bool(), 3)),
        (TypeError, "edge_index: expected a tensor", lambda: Graph.from_edge_index([[0], [1]], 3)),
        (TypeError, "num_nodes: expected an int", lambda: Graph.from_edge_index(Z, None)),
        (TypeError, "num_nodes: expected an int", lambda: Graph.from_edge_index(Z, (3, 3, 3))),
        (ValueError, "num_nodes: expected sizes >= 0", lambda: Graph.from_edge_index(Z[:, :0], -1)),
        (TypeError, "num_keys: expected an int", lambda: Graph.from_csr(Z[0], Z[0, :0], 2.5)),
        (ValueError, "num_keys: expected sizes >= 0", lambda: Graph.from_csr(Z[0], Z[0, :0], -2)),
        (ValueError, "edge_bias: expected shape",
         lambda: saccade.attention(X, X, X, G, edge_bias=torch.zeros(3))),
        (ValueError, "edge_bias: expected a float", lambda: saccade.attention(X, X, X, G, edge_bias=Z[0])),
        (ValueError, "edge_attr's e: expected shape",
         lambda: saccade.attention(X, X, X, G, edge_attr=(torch.zeros(3, 5), torch.zeros(2, 4, 5)))),
        (ValueError, "edge_attr's W: expected shape",
         lambda: saccade.attention(X, X, X, G, edge_attr=(torch.zeros(2, 5), torch.zeros(2, 4, 6)))),
        (ValueError, "is on meta, expected cpu", lambda: saccade.attention(X, X, X, elsewhere())),
        (ValueError, "for 3 queries and 3 keys, the call has 2 and 3",
         lambda: saccade.attention(X[:, :2], X, X, G)),
    ],
)  # fmt: skip
def test_bad_graphs_are_refused(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()


def test_features_of_width_0_add_nothing(backend: str) -> None:
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 1], [1, 2, 0]]), 3)
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    e, w = torch.zeros(3, 0, requires_grad=True), torch.zeros(2, 8, 0, requires_grad=True)
    plain = saccade.attention(q, q, q, graph, backend=backend)
    got = saccade.attention(q, q, q, graph, edge_attr=(e, w), backend=backend)
    torch.testing.assert_close(got, plain)
    grads = torch.autograd.grad(got.sum(), (q, e, w))
    torch.testing.assert_close(grads[0], torch.autograd.grad(plain.sum(), q)[0])
    assert grads[1].shape == e.shape and grads[2].shape == w.shape


def test_nan_in_a_query_without_keys_reaches_no_feature(backend: str) -> None:
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [0, 1]]), 3)
    q, k = torch.randn(2, 1, 3, 2), torch.randn(2, 1, 3, 2)
    q[:, :, 2] = torch.nan  # no edge
    q[0, 0, 1] = torch.nan  # its edge is masked in this entry
    e, w = torch.randn(2, 4, requires_grad=True), torch.randn(1, 2, 4, requires_grad=True)
    mask = graph & saccade.KeyPadding(torch.tensor([1, 2]))
    out = saccade.attention(q, k, k, mask, edge_attr=(e, w), backend=backend)
    for grad in torch.autograd.grad(out.sum(), (e, w)):
        assert bool(grad.isfinite().all()) and bool(grad.any())


@pytest.mark.parametrize("body", ["edges", "terms", "joint", "tiles"])
def test_no_heads(body: str, backend: str) -> None:
    graph = Graph.from_dense(torch.ones(4, 4).bool()) if body == "tiles" else complete(4)
    q = torch.randn(1, 0, 4, 3, requires_grad=True)
    e, w = torch.randn(graph.num_edges, 2, requires_grad=True), torch.randn(0, 3, 2, requires_grad=True)
    options: dict[str, Any] = {}
    if body == "terms":
        options["edge_attr"] = (e, w)
    if body == "joint":
        options["score"] = saccade.GATv2(torch.randn(0, 3), edge_attr=(e, w))
    out = saccade.attention(q, q, q, graph, backend=backend, **options)
    out.sum().backward()
    assert out.shape == q.shape and q.grad is not None
    assert body not in ("terms", "joint") or (e.grad is not None and not bool(e.grad.any()))


def complete(n: int) -> Graph:
    """Every edge twice."""
    index = torch.arange(n).repeat(2 * n)
    return Graph.from_edge_index(torch.stack([index, index.sort().values]), n)


def test_second_derivatives_hold_no_dense_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("a number for every pair")

    monkeypatch.setattr(pairs.Edges, "dense", refuse)
    q = torch.randn(1, 2, 9, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(saccade.attention(q, q, q, complete(9)).sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), q)
    assert bool(second.any())


@pytest.mark.parametrize("hide", ["mask", "bias"])
@pytest.mark.parametrize("score", ["dot", "gatv2"])
def test_nan_of_edges_that_nobody_keeps_stays_there(hide: str, score: str, backend: str) -> None:
    """In their features, and in a key that has no other edge: the same results as with zeros there."""
    index = torch.tensor([[0, 1, 2, 3, 1], [0, 0, 1, 1, 2]])
    graph = Graph.from_edge_index(index, num_nodes=4)
    drawn = [torch.randn(2, 2, 4, 8) for _ in range(3)]
    features, weight, additive = torch.randn(5, 3), torch.randn(2, 8, 3), torch.randn(2, 8)
    options: dict[str, Any] = {}
    mask: saccade.Mask = graph
    if hide == "bias":
        options["edge_bias"] = torch.tensor([0.3, -0.2, 0.5, -torch.inf, 0.1])
    else:
        mask = graph & saccade.KeyPadding(keep=torch.tensor([[True, True, True, False]] * 2))
    found = []
    for value in (0.0, torch.nan):
        q, k, v = (x.clone() for x in drawn)
        e = features.clone()
        k[:, :, 3], v[:, :, 3], e[3] = value, value, value
        tensors = [x.requires_grad_() for x in (q, k, v, e)] + [weight.clone().requires_grad_()]
        joined: dict[str, Any] = {"edge_attr": (tensors[3], tensors[4])}
        if score == "gatv2":
            joined = {"score": saccade.GATv2(additive, 0.2, edge_attr=(tensors[3], tensors[4]))}
        out = saccade.attention(*tensors[:3], mask, backend=backend, **joined, **options)
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for want, got in zip(*found, strict=True):
        assert got.isfinite().all() and torch.allclose(got, want, atol=1e-6)
