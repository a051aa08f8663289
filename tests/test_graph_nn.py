"""`GraphMultiheadAttention`, `GraphTransformerLayer` and the encodings of positions in a graph."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import saccade
import torch
from saccade import Graph
from saccade.nn import (
    GraphMultiheadAttention,
    GraphTransformerLayer,
    MultiheadAttention,
    laplacian_encoding,
    random_walk_encoding,
)
from saccade.nn import graph_encodings as encodings
from saccade.testing import pairwise
from torch import Tensor

N, KEYS, E = 7, 9, 8


def edges(sources: int = KEYS, targets: int = N, count: int = 30) -> Tensor:
    """With repeats; the last target has none."""
    index = torch.stack([torch.randint(sources, (count,)), torch.randint(targets - 1, (count,))])
    return torch.cat([index, index[:, :2]], 1)


AXES = {
    "batched": [False, True],
    "heads": [(2, 2), (4, 2), (4, 1)],
    "head_dim": [None, 5],
    "score": ["dot", "additive", "gatv2"],
    "activation": ["softmax", "softmax1", "relu", "sigmoid"],
    "edge": [None, "value", "bias"],
    "edge_bias": [None, 1, 2],
    "cross": [False, True],
}


@pytest.mark.parametrize("case", pairwise(AXES), ids=lambda case: "-".join(str(v) for v in case.values()))
def test_out_is_the_sum_over_the_weights_it_gives(case: dict[str, Any]) -> None:
    """Weights by the definition, edge by edge; the output and every gradient from them."""
    score, edge = case["score"], case["edge"]
    if edge == "value" and score != "dot":
        edge = "bias"
    (heads, heads_k), kinds = case["heads"], {"kdim": 6, "vdim": 3} if case["cross"] else {}
    module = GraphMultiheadAttention(
        E, heads, num_kv_heads=heads_k, head_dim=case["head_dim"], score=score, activation=case["activation"],
        edge_dim=None if edge is None else 3, edge_mode=edge or "value", **kinds,
    ).double()  # fmt: skip
    lead = (2,) if case["batched"] else ()
    query = torch.randn(*lead, N, E, dtype=torch.float64, requires_grad=True)
    given, nodes = (query,), N
    if case["cross"]:
        nodes = KEYS
        given = (
            query,
            *(torch.randn(*lead, KEYS, d, dtype=torch.float64, requires_grad=True) for d in (6, 3)),
        )
    index = edges(nodes)
    count = index.shape[1]
    attr = None if edge is None else torch.randn(count, 3, dtype=torch.float64, requires_grad=True)
    bias = None
    if case["edge_bias"]:
        shape = (heads, count)[2 - case["edge_bias"] :]
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out, weights = module(query, index, *given[1:], edge_attr=attr, edge_bias=bias, need_weights=True)
    assert weights.shape == (*lead, count, heads)

    key, value = (given[1], given[2]) if case["cross"] else (query, query)
    dim, group = module.head_dim, heads // heads_k
    q = module.q_proj(query).unflatten(-1, (heads, dim))[..., index[1], :, :]
    k, v = (
        proj(x).unflatten(-1, (heads_k, dim)).repeat_interleave(group, -2)[..., index[0], :, :]
        for proj, x in ((module.k_proj, key), (module.v_proj, value))
    )
    logits = torch.zeros(count, heads, dtype=torch.float64)
    if edge == "value":
        k, v = (x + module.edge_proj(attr).unflatten(-1, (heads, dim)) for x in (k, v))
    if edge == "bias":
        logits = logits + module.edge_proj(attr)
    if bias is not None:
        logits = logits + (bias[:, None] if bias.dim() == 1 else bias.t())
    if score == "dot":
        logits = logits + (q * k).sum(-1) / dim**0.5
    else:
        joint = torch.tanh(q + k) if score == "additive" else torch.nn.functional.leaky_relu(q + k, 0.2)
        logits = logits + (joint * module.score_weight).sum(-1)
    known = activate(case["activation"], logits, index[1])
    mixed = q.new_zeros(*lead, N, heads, dim).index_add(len(lead), index[1], known[..., None] * v)
    expected = module.out_proj(mixed.flatten(-2))
    torch.testing.assert_close(weights, known)
    torch.testing.assert_close(out, expected)
    tensors = [x for x in (*given, attr, bias, *module.parameters()) if x is not None]
    plain = module(query, index, *given[1:], edge_attr=attr, edge_bias=bias)
    assert torch.equal(plain, out)
    cotangent = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(plain, tensors, cotangent),
        torch.autograd.grad(expected, tensors, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def activate(name: str, logits: Tensor, targets: Tensor) -> Tensor:
    if not name.startswith("softmax"):
        return torch.relu(logits) if name == "relu" else torch.sigmoid(logits)
    powers = torch.exp(logits)
    total = torch.full(
        (*logits.shape[:-2], N, logits.shape[-1]), float(name == "softmax1"), dtype=logits.dtype
    )
    total = total.index_add(-2, targets, powers)
    return powers / total[..., targets, :]


def test_a_full_graph_is_multihead_attention() -> None:
    torch.manual_seed(0)
    ours, theirs = GraphMultiheadAttention(E, 2), MultiheadAttention(E, 2, batch_first=True)
    projections = torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight])
    theirs.load_state_dict(
        {
            "in_proj_weight": projections, "in_proj_bias": torch.zeros(3 * E),
            "out_proj.weight": ours.out_proj.weight, "out_proj.bias": ours.out_proj.bias,
        }
    )  # fmt: skip
    x = torch.randn(3, N, E)
    graph = Graph.from_dense(torch.ones(N, N, dtype=torch.bool))
    torch.testing.assert_close(ours(x, graph), theirs(x, x, x, need_weights=False)[0])


def test_dropout_is_for_training() -> None:
    module, x, index = GraphMultiheadAttention(E, 2, dropout=0.5), torch.randn(N, E), edges(N)
    assert not torch.equal(module(x, index), module(x, index))
    module.eval()
    assert torch.equal(module(x, index), module(x, index))


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_a_batch_of_none_has_weights_too(activation: str) -> None:
    module = GraphMultiheadAttention(E, 2, activation=activation)
    query = torch.randn(0, N, E, requires_grad=True)
    out, weights = module(query, edges(N), need_weights=True)
    assert out.shape == (0, N, E) and weights.shape == (0, 32, 2)
    assert torch.autograd.grad(weights.sum() + out.sum(), query)[0].shape == query.shape


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_layer(norm: str, norm_first: bool) -> None:
    layer = GraphTransformerLayer(E, 2, 16, 0.0, norm=norm, norm_first=norm_first, edge_dim=3).double()
    x, index = torch.randn(N, E, dtype=torch.float64), edges(N)
    e = torch.randn(index.shape[1], 3, dtype=torch.float64)
    reference = torch.nn.TransformerEncoderLayer(E, 2, 16, 0.0, norm_first=norm_first).double()

    def feed(y: Tensor) -> Tensor:
        return layer.linear2(torch.relu(layer.linear1(y)))

    def attend(y: Tensor) -> Tensor:
        return layer.self_attn(y, index, edge_attr=e)

    out = layer(x, index, e)
    if norm_first:
        middle = x + attend(layer.norm1(x))
        expected = middle + feed(layer.norm2(middle))
    else:
        middle = layer.norm1(x + attend(x))
        expected = layer.norm2(middle + feed(middle))
    torch.testing.assert_close(out, expected)
    assert {"self_attn", "linear1", "linear2", "norm1", "norm2"} <= set(dict(reference.named_children()))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_batched_graphs_do_not_mix() -> None:
    layer = GraphTransformerLayer(E, 2, dropout=0.0).eval()
    graphs = [Graph.from_edge_index(edges(n, n), n) for n in (3, 8, 5)]
    xs = [torch.randn(g.num_keys, E) for g in graphs]
    joint = layer(torch.cat(xs), Graph.batch(graphs))
    torch.testing.assert_close(joint, torch.cat([layer(x, g) for x, g in zip(xs, graphs, strict=True)]))


def test_compiled_layer() -> None:
    layer = GraphTransformerLayer(E, 2, dropout=0.0, edge_dim=3)
    index = edges(N)
    graph = Graph.from_edge_index(index, N).prepare()
    x, e = torch.randn(N, E, requires_grad=True), torch.randn(index.shape[1], 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, graph, e), layer(x, graph, e)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("num_heads: expected to divide", lambda: GraphMultiheadAttention(7, 2)),
        ("num_kv_heads", lambda: GraphMultiheadAttention(8, 4, num_kv_heads=3)),
        ("edge_mode", lambda: GraphMultiheadAttention(8, 4, edge_mode="key")),
        ("edge_mode", lambda: GraphMultiheadAttention(8, 4, edge_dim=2, score="gatv2")),
        ("score", lambda: GraphMultiheadAttention(8, 4, score="cosine")),
        ("activation", lambda: GraphMultiheadAttention(8, 4, activation="tanh")),
        ("norm", lambda: GraphTransformerLayer(8, 4, norm="group")),
        (
            "edge_attr",
            lambda: GraphMultiheadAttention(8, 4)(torch.ones(3, 8), edges(3, 3), edge_attr=torch.ones(32, 2)),
        ),
        ("edge_attr", lambda: GraphMultiheadAttention(8, 4, edge_dim=2)(torch.ones(3, 8), edges(3, 3))),
        ("k: expected at least 1", lambda: random_walk_encoding(edges(3, 3), 3, 0)),
        ("num_nodes", lambda: laplacian_encoding(edges(3, 3), -3, 2)),
    ],
)
def test_bad_arguments(message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- encodings


def ring(n: int) -> Tensor:
    i = torch.arange(n)
    return torch.stack([torch.cat([i, (i + 1) % n]), torch.cat([(i + 1) % n, i])])


def laplacian(index: Tensor, n: int) -> Tensor:
    a = torch.zeros(n, n, dtype=torch.float64)
    a[index[0], index[1]] = 1
    a = torch.maximum(a, a.t()) * (1 - torch.eye(n))
    scale = a.sum(1).clamp(min=1).rsqrt()
    return torch.eye(n) - scale[:, None] * a * scale


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", ["path", "random"])
def test_laplacian_encoding(name: str, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        pytest.importorskip("scipy")
        monkeypatch.setattr(encodings, "_DENSE", 2)
    n = 30
    i = torch.arange(n - 1)
    index = torch.stack([i, i + 1])
    if name == "random":
        index = torch.cat([index, edges(n, n, 20)], 1)
    full, found = laplacian(index, n), laplacian_encoding(index, n, 4).double()
    values, vectors = torch.linalg.eigh(full)
    for column in range(4):
        x, want = found[:, column], vectors[:, column + 1]
        torch.testing.assert_close(full @ x, values[column + 1] * x, rtol=0, atol=1e-5)
        assert abs(abs(x @ want) - 1) < 1e-5
        # In a path's vectors the largest entries come in pairs, in every other one with either sign.
        top = (x.abs() > x.abs().max() - 1e-5).nonzero()
        assert len(top) == (2 if name == "path" else 1) and x[top[0]] > 0
    again = laplacian_encoding(Graph.from_edge_index(index, n), n, 4).double()
    torch.testing.assert_close(again, found)


def test_laplacian_encoding_of_small_graphs() -> None:
    assert laplacian_encoding(torch.zeros(2, 0, dtype=torch.int64), 0, 3).shape == (0, 3)
    assert not laplacian_encoding(torch.zeros(2, 0, dtype=torch.int64), 1, 3).any()
    found = laplacian_encoding(ring(3), 3, 5)
    assert found.isfinite().all() and found[:, :2].any() and not found[:, 2:].any()


def test_random_walk_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "_COLUMNS", 4)
    index = edges(11, 11, 40)
    walk = torch.zeros(11, 11, dtype=torch.float64)
    walk.index_put_((index[0], index[1]), torch.ones(index.shape[1], dtype=torch.float64), accumulate=True)
    walk /= walk.sum(1, keepdim=True).clamp(min=1)
    expected = torch.stack([torch.linalg.matrix_power(walk, s).diagonal() for s in range(1, 6)], 1)
    torch.testing.assert_close(random_walk_encoding(index, 11, 5).double(), expected, rtol=1e-5, atol=1e-7)
    even = random_walk_encoding(ring(6), 6, 4)
    torch.testing.assert_close(even, torch.tensor([0.0, 0.5, 0.0, 0.375]).expand(6, 4))


def test_nothing_imports_torch_geometric() -> None:
    import subprocess

    code = "import sys, saccade, torch; x = torch.ones(2, 2); saccade.nn.GATConv(2, 2)(x, x.long());"
    code += "assert not {'torch_geometric', 'scipy', 'networkx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_is_not_of_size_edges_times_channels() -> None:
    """Of a training step through a layer with edge features: no block as large as E x H x D."""
    n, count, heads, dim = 200, 20_000, 4, 64
    conv = saccade.nn.TransformerConv(32, dim, heads, edge_dim=4)
    x, index, e = torch.randn(n, 32), torch.randint(n, (2, count)), torch.randn(count, 4)
    with torch.profiler.profile(profile_memory=True) as trace:
        conv(x, index, e).sum().backward()
    largest = max((event.self_cpu_memory_usage for event in trace.key_averages()), default=0)
    blocks = [event.cpu_memory_usage for event in trace.events()]
    assert blocks and max(largest, *blocks) < count * heads * dim * 4 / 2
