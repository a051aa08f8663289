"""Edge features inside additive scores, w . phi(q + k + W e): formed edge by edge, never E x H x D."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade import Additive, GATv2, Graph
from saccade.testing import Shape, check_attention, make_inputs
from torch import Tensor

SCORES = {"additive": Additive, "gatv2": GATv2}


def terms(edges: int, heads: int, dim: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight, e and W, as leaves."""
    sizes = ((heads, dim), (edges, features), (heads, dim, features))
    weight, e, w = (torch.randn(size, requires_grad=True) for size in sizes)
    return weight, e, w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("nodes", "edges", "shape", "features"),
    [
        (70, 300, (6, 2, 2, 5, 8), 3),
        (150, 2000, (2, 4, 2, 16, 19), 7),  # a batch, shared key heads
        (120, 5000, (1, 3, 3, 33, 33), 1),  # more edges than a work item
        (60, 9000, (1, 2, 1, 8, 11), 20),  # rows that are cut
        (400, 500, (1, 4, 4, 32, 32), 16),  # rows of no, one and two edges
    ],
)
def test_matches_the_reference(
    nodes: int, edges: int, shape: tuple[int, ...], features: int, score: str, dtype: torch.dtype
) -> None:
    batch, heads, heads_k, dim, dim_v = shape
    graph = Graph.from_edge_index(torch.randint(nodes, (2, edges)), nodes)
    weight, e, w = terms(edges, heads, dim, features)
    inputs = make_inputs(Shape(batch, heads, heads_k, nodes, nodes, dim, dim_v), dtype)
    check_attention(inputs, graph, "cpu", score=SCORES[score](weight, edge_attr=(e, w)))


@pytest.mark.parametrize(
    "options",
    [
        {"dropout_p": 0.3, "seed": 5},
        {"softcap": 3.0, "scale": 0.5},
        {"activation": "sigmoid"},
        {"edge_bias": True, "return_lse": True},
    ],
    ids=lambda o: next(iter(o)),
)
def test_goes_with_other_options(options: dict[str, Any]) -> None:
    graph = Graph.from_edge_index(torch.randint(90, (2, 800)), 90)
    if "edge_bias" in options:
        options = {**options, "edge_bias": torch.randn(4, 800, requires_grad=True)}
    weight, e, w = terms(800, 4, 12, 5)
    score = GATv2(weight, 0.1, edge_attr=(e, w))
    mask = graph & saccade.Window(60, None)
    check_attention(make_inputs(Shape(1, 4, 4, 90, 90, 12, 12)), mask, "cpu", score=score, **options)


@pytest.mark.parametrize("far", ["keys", "queries"])
def test_rows_that_outgrow_the_cache(far: str) -> None:
    sizes = {"keys": 50, "queries": 50} | {far: 9000}
    ends = [torch.randint(sizes[side], (6000,)) for side in ("keys", "queries")]
    graph = Graph.from_edge_index(torch.stack(ends), (sizes["keys"], sizes["queries"]))
    weight, e, w = terms(6000, 2, 64, 4)
    shape = Shape(1, 2, 2, sizes["queries"], sizes["keys"], 64, 64)
    check_attention(make_inputs(shape), graph, "cpu", score=GATv2(weight, edge_attr=(e, w)))


@pytest.mark.parametrize("needs", ["e", "w", "q", "weight"])
def test_only_some_gradients(needs: str) -> None:
    graph = Graph.from_edge_index(torch.randint(40, (2, 300)), 40)
    q, k, v = (x.detach() for x in make_inputs(Shape(1, 2, 2, 40, 40, 8, 8)))
    weight, e, w = (x.detach() for x in terms(300, 2, 8, 3))
    given = {"q": q, "weight": weight, "e": e, "w": w}

    def gradients(of: str) -> list[Tensor]:
        x = {name: t.clone().requires_grad_(name in of.split()) for name, t in given.items()}
        score = Additive(x["weight"], edge_attr=(x["e"], x["w"]))
        out = saccade.attention(x["q"], k, v, graph, score=score, backend="cpu")
        return list(torch.autograd.grad(out.sin().sum(), [x[name] for name in of.split()]))

    every = dict(zip(given, gradients("q weight e w"), strict=True))
    assert torch.equal(gradients(needs)[0], every[needs])


@pytest.mark.parametrize("backend", [name for name in saccade.backends() if name in ("cpu", "triton")])
def test_what_no_row_keeps_may_be_nan(backend: str) -> None:
    """A masked edge's key, query and features reach nothing."""
    index = torch.tensor([[0, 1, 2, 5, 0, 2], [0, 1, 2, 1, 1, 1]])
    graph, n = Graph.from_edge_index(index, 6), 6
    mask = graph & saccade.Window(2, 2)  # the edge 5 -> 1 is too long
    q, k, v = (x.detach() for x in make_inputs(Shape(1, 2, 2, n, n, 8, 8)))
    k[:, :, 5] = v[:, :, 5] = float("nan")
    weight, e, w = terms(6, 2, 8, 3)
    with torch.no_grad():
        e[3] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)] + [weight, e, w]
    out = saccade.attention(q, k, v, mask, score=GATv2(weight, edge_attr=(e, w)), backend=backend)
    grads = torch.autograd.grad(out.sin().sum(), leaves)
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert not grads[4][3].any() and grads[4][4].any()


def test_no_edges() -> None:
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), 4)
    q, k, v = make_inputs(Shape(1, 2, 2, 4, 4, 8, 8))
    leaves = [q, k, v, *terms(0, 2, 8, 3)]
    out = saccade.attention(q, k, v, graph, score=GATv2(leaves[3], edge_attr=(leaves[4], leaves[5])))
    assert not out.any()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in grads] == [x.shape for x in leaves] and not any(g.any() for g in grads)


def test_second_derivatives_and_compile() -> None:
    graph = Graph.from_edge_index(torch.randint(9, (2, 30)), 9).prepare()
    q, k, v = (x.detach().double().requires_grad_() for x in make_inputs(Shape(1, 2, 2, 9, 9, 4, 4)))
    weight, e, w = (x.detach().double().requires_grad_() for x in terms(30, 2, 4, 3))

    def call(*x: Tensor) -> Tensor:
        return saccade.attention(*x[:3], graph, score=Additive(x[3], edge_attr=(x[4], x[5])), backend="cpu")

    leaves = (q, k, v, weight, e, w)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), call(*leaves))


def test_bad_features_are_refused() -> None:
    graph = Graph.from_edge_index(torch.zeros(2, 2, dtype=torch.int64), 3)
    x, weight, e, w = torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(2, 4, 5)

    def call(**options: Any) -> Tensor:
        return saccade.attention(x, x, x, options.pop("mask", graph), **options)

    with pytest.raises(TypeError, match=r"edge_attr: expected a pair \(e, W\), got Tensor"):
        GATv2(weight, edge_attr=e)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"edge_attr's e: expected shape \[2, De\], got \[3, 5\]"):
        call(score=GATv2(weight, edge_attr=(torch.zeros(3, 5), w)))
    with pytest.raises(ValueError, match=r"edge_attr's W: expected shape \[2, 4, 5\], got \[2, 5, 4\]"):
        call(score=Additive(weight, edge_attr=(e, w.mT)))
    with pytest.raises(ValueError, match="needs a Graph in the mask"):
        call(score=GATv2(weight, edge_attr=(e, w)), mask=saccade.Causal())
    with pytest.raises(ValueError, match=r"edge_attr: needs the dot score; others bring theirs: GATv2"):
        call(score=GATv2(weight), edge_attr=(e, w))
    reasons = saccade.explain(x, x, x, graph, score=GATv2(weight, edge_attr=(e, w))).reasons
    assert any("scores other than the dot product" in why for why in reasons["cuda"])
