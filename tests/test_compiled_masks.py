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
