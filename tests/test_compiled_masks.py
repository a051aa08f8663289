"""Masks inside torch.compile(fullgraph=True): what may be made there, and what says how to make it before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import saccade
import torch
from torch import Tensor

N = 20
SEEDED = torch.Generator().manual_seed(0)
KEPT = torch.rand(N, N, generator=SEEDED) < 0.4
ALSO = torch.rand(N, N, generator=SEEDED) < 0.6


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(run: Callable[..., Any], fullgraph: bool = True) -> Callable[..., Any]:
    return torch.compile(run, fullgraph=fullgraph, backend="aot_eager")


def inputs() -> Tensor:
    return torch.randn(1, 2, N, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()


MADE: dict[str, Callable[[Tensor], saccade.Mask]] = {
    "lengths": lambda x: saccade.KeyPadding(torch.full((1,), 7)) & saccade.Causal(),
    "keep": lambda x: saccade.KeyPadding(keep=x[:, 0, :, 0] > 0),
    "segments": lambda x: saccade.Segments(torch.arange(N)[None] // 7),
    "far apart": lambda x: saccade.Segments((torch.arange(N)[None] // 7) << 40),
    "two": lambda x: saccade.Segments(torch.arange(N) // 7) & saccade.Segments(torch.arange(N) // 3),
    "heads": lambda x: saccade.Window(torch.tensor([2, 5]), 0),
    "chunks": lambda x: saccade.Chunks(4, 1),
}


@pytest.mark.parametrize("name", list(MADE))
def test_masks_made_inside(name: str) -> None:
    x = inputs()

    def run(x: Tensor) -> Tensor:
        return saccade.attention(x, x, x, MADE[name](x.detach()))

    got, want = compiled(run)(x), run(x)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(out.pow(2).sum(), x)[0] for out in (got, want))
    torch.testing.assert_close(*grads)


def test_lengths_beyond_the_keys_mean_all_of_them_where_they_cannot_be_read() -> None:
    x = inputs().detach()

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        return saccade.attention(x, x, x, saccade.KeyPadding(lengths))

    torch.testing.assert_close(compiled(run)(x, torch.tensor([500])), saccade.attention(x, x, x))
    with pytest.raises(ValueError, match="length of 500"):
        run(x, torch.tensor([500]))


@pytest.mark.parametrize("weights", [False, True])
def test_one_tensor_in_several_places(weights: bool) -> None:
    x = inputs()

    def run(x: Tensor) -> Any:
        if not weights:
            return saccade.attention(x, x, x, causal=True)
        problem = Problem.of(x, x, x, saccade.Causal())
        return attend_with_weights(problem)[1]

    from saccade.functional import attend_with_weights
    from saccade.problem import Problem

    got, want = compiled(run)(x), run(x)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(out.pow(2).sum(), x)[0] for out in (got, want))
    torch.testing.assert_close(*grads)


def test_graphs_joined_and_prepared_before() -> None:
    x = inputs()
    mask = (saccade.Graph.from_dense(KEPT) & saccade.Graph.from_dense(ALSO) & saccade.Causal()).prepare()

    def run(x: Tensor) -> Tensor:
        return saccade.attention(x, x, x, mask)

    got = compiled(run)(x)
    torch.testing.assert_close(got, run(x))
    both = saccade.Graph.from_dense(KEPT & ALSO & saccade.Causal().materialize(N, N))
    torch.testing.assert_close(got, saccade.attention(x, x, x, both))


GRAPH, OTHER = saccade.Graph.from_dense(KEPT).prepare(), saccade.Graph.from_dense(ALSO).prepare()
BEFORE: dict[str, tuple[str, Callable[[], saccade.Mask]]] = {
    "joined": ("join them with & before", lambda: GRAPH & OTHER),
    "made": ("make it before, and .prepare() it", lambda: saccade.Graph.from_dense(KEPT)),
    "edges": (
        "make it before, and .prepare() it",
        lambda: saccade.Graph.from_edge_index(torch.tensor([[0, 1], [1, 2]]), N),
    ),
    "loops": ("make it before, and .prepare() it", lambda: GRAPH.add_self_loops()),
}


@pytest.mark.parametrize("name", list(BEFORE))
def test_what_must_be_made_before_says_so(name: str) -> None:
    message, make = BEFORE[name]
    x = inputs()

    def run(x: Tensor) -> Tensor:
        return saccade.attention(x, x, x, make())

    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="saccade builds outside of compiled functions"
    ) as e:
        compiled(run)(x)
    assert message in str(e.value)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(run, fullgraph=False)(x), run(x))


def test_a_graph_that_is_not_prepared_says_so() -> None:
    graph, x = saccade.Graph.from_dense(KEPT), inputs()

    def run(x: Tensor) -> Tensor:
        return saccade.attention(x, x, x, graph)

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call \.prepare\(\) on the mask"):
        compiled(run)(x)
    graph.prepare()
    torch.testing.assert_close(compiled(run)(x), run(x))


def test_a_convolution_on_edge_indices_says_so() -> None:
    x, edges = torch.randn(N, 8), GRAPH.edge_index
    layer = saccade.nn.GATv2Conv(8, 4, heads=2)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="pass a saccade.Graph"):
        compiled(layer)(x, edges)
    torch._dynamo.reset()
    run = compiled(layer, fullgraph=False)
    for _ in range(2):
        torch.testing.assert_close(run(x, edges), layer(x, edges))


def random_edges(nodes: int, edges: int) -> Tensor:
    draw = torch.Generator().manual_seed(nodes)
    return torch.randint(nodes, (2, edges), generator=draw)


SIZES = [(70 + 7 * n, 300 + 41 * n) for n in range(8)]


@pytest.mark.skipif(not saccade.ops.LOADED, reason="no operator library")
def test_graphs_of_any_size_share_a_compilation() -> None:
    """The second graph opens the lengths; from there on nothing is compiled again."""
    run = compiled(lambda x, graph: saccade.attention(x, x, x, graph))
    for step, (nodes, edges) in enumerate(SIZES):
        graph = saccade.Graph.from_edge_index(random_edges(nodes, edges).unique(dim=1), nodes).prepare()
        x = torch.randn(1, 2, nodes, 8, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            got, want = run(x, graph), saccade.attention(x, x, x, graph)
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(out.pow(2).sum(), x)[0] for out in (got, want))
        torch.testing.assert_close(*grads)


@pytest.mark.skipif(not saccade.ops.LOADED, reason="no operator library")
@pytest.mark.parametrize("kind", ["TransformerConv", "GATConv", "GATv2Conv"])
def test_edge_indices_of_any_size_share_their_compilations(kind: str) -> None:
    """What is built from their values is built outside; what is compiled is not compiled for each."""
    layer = getattr(saccade.nn, kind)(8, 4, heads=2)
    run = compiled(layer, fullgraph=False)
    for step, (nodes, edges) in enumerate(SIZES):
        x, index = torch.randn(nodes, 8), random_edges(nodes, edges)
        with torch._dynamo.config.patch(error_on_recompile=step > 2):
            torch.testing.assert_close(run(x, index), layer(x, index))


def test_many_empty_tiles_are_not_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit for every pair of a large random graph would take a thousand times the memory of its edges."""
    monkeypatch.setattr(saccade.graph, "_MANY_TILES", 10)
    sparse = saccade.Graph.from_edge_index(torch.arange(2000).expand(2, -1), 2000).prepare()
    assert sparse.num_tiles == 32 and "tiles" in sparse._cache  # 62 edges in each
    pairs = torch.stack([torch.arange(2000), (torch.arange(2000) * 777) % 2000])
    empty = saccade.Graph.from_edge_index(pairs, 2000).prepare()
    assert empty.num_tiles > 500 and "tiles" not in empty._cache
    x = torch.randn(1, 2, 2000, 4)
    bias = torch.randn(1, 1, 2000, 2000)
    want = saccade.attention(x, x, x, empty, bias=bias, backend="reference")
    torch.testing.assert_close(saccade.attention(x, x, x, empty, bias=bias), want)


@pytest.mark.skipif(not saccade.ops.LOADED, reason="no operator library")
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("edge_dim", [None, 3])
@pytest.mark.parametrize("kind", ["TransformerConv", "GATConv", "GATv2Conv"])
def test_a_convolution_on_a_graph_is_one_program(kind: str, edge_dim: int | None, weights: bool) -> None:
    """Loops included, once the layer has seen the prepared graph (and it may have seen it before that)."""
    layer = getattr(saccade.nn, kind)(8, 4, heads=2, edge_dim=edge_dim)
    graph = saccade.Graph.from_edge_index(random_edges(30, 120), 30)
    x = torch.randn(30, 8, requires_grad=True)
    given = (x, graph) if edge_dim is None else (x, graph, torch.randn(120, edge_dim))
    options = {"return_attention_weights": True} if weights else {}
    with torch.no_grad():  # asks for fewer forms than training
        layer(*given, **options)
        graph.prepare()
        layer(*given, **options)
    got = compiled(layer)(*given, **options)
    want = layer(*given, **options)
    torch.testing.assert_close(got, want)
    grads = ([out[0] if weights else out, [x, *layer.parameters()]] for out in (got, want))
    results = [torch.autograd.grad(out.pow(2).sum(), wanted, allow_unused=True) for out, wanted in grads]
    torch.testing.assert_close(*results)


def test_neighbourhoods_of_images_are_built_outside() -> None:
    layer = saccade.nn.PixelAttention(8, 2, radius=1)
    images = [torch.randn(1, 8, n, n + 1) for n in (5, 6)]
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"neighbourhood\(height, width"):
        compiled(layer)(images[0])
    torch._dynamo.reset()
    run = compiled(layer, fullgraph=False)
    for x in images:
        torch.testing.assert_close(run(x), layer(x))
    torch._dynamo.reset()
    for x in images:
        graph = layer.neighbourhood(*x.shape[2:], x.device)
        assert graph is not None
        graph.prepare()
        torch.testing.assert_close(compiled(layer)(x), layer(x))
