"""What masks, graphs and layers keep between calls serves every later call, whatever mode it was made in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import saccade
import torch
from saccade import Graph, KeyPadding, Segments, Window
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

EDGES = torch.tensor([[0, 1, 1, 2], [0, 0, 0, 3]])
MASKS: dict[str, Callable[[], Any]] = {
    "repeated edges": lambda: Graph.from_edge_index(EDGES, 6),
    "tiles": lambda: Graph.from_dense(torch.ones(6, 6).bool()),
    "graph and padding": lambda: Graph.from_dense(torch.eye(6).bool()) & KeyPadding(torch.tensor([5])),
    "bounds by head": lambda: Window(torch.tensor([2, 3]), 1),
    "segments": lambda: Segments(torch.tensor([[0, 0, 1, 1, 1, 1]])),
    "paddings": lambda: KeyPadding(torch.tensor([3])) & KeyPadding(keep=torch.ones(1, 6).bool()),
}
QUERIES = torch.randn(1, 2, 6, 4)


def gradient(mask: Any) -> Tensor:
    q = QUERIES.clone().requires_grad_()
    saccade.attention(q, q, q, mask).sum().backward()
    assert type(q.grad) is torch.Tensor
    return q.grad


@pytest.mark.parametrize("name", MASKS)
def test_export_then_train(name: str) -> None:
    mask = MASKS[name]()

    class Layer(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return saccade.attention(q, q, q, mask)

    exported = torch.export.export(Layer(), (QUERIES,))
    expected = saccade.attention(QUERIES, QUERIES, QUERIES, MASKS[name]())
    torch.testing.assert_close(exported.module()(QUERIES), expected)
    torch.testing.assert_close(gradient(mask), gradient(MASKS[name]()))


@pytest.mark.parametrize("name", MASKS)
def test_fake_tensors_then_real_ones(name: str) -> None:
    mask = MASKS[name]()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q = mode.from_tensor(QUERIES)
        assert saccade.attention(q, q, q, mask).shape == q.shape
    torch.testing.assert_close(gradient(mask), gradient(MASKS[name]()))


def test_fake_lengths_are_not_read() -> None:
    with FakeTensorMode():
        q, ends, lengths = torch.randn(7, 4, 8), torch.tensor([0, 3, 7]), torch.tensor([3, 4])
        assert saccade.attention_varlen(q, q, q, ends, ends, 4, 4).shape == q.shape
        query, cache = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 30, 8)
        assert saccade.attention_decode(query, cache, cache, lengths).shape == query.shape
        for mask in (KeyPadding(lengths), Segments(torch.zeros(2, 30).long())):
            assert saccade.attention(cache, cache, cache, mask).shape == cache.shape


def test_a_graph_of_fake_edges_is_refused() -> None:
    with FakeTensorMode() as mode:
        edges = mode.from_tensor(EDGES)
        with pytest.raises(RuntimeError, match="builds from real tensors"):
            Graph.from_edge_index(edges, 6)


@pytest.mark.parametrize("name", MASKS)
def test_inference_then_training(name: str) -> None:
    mask = MASKS[name]()
    with torch.inference_mode():
        saccade.attention(QUERIES, QUERIES, QUERIES, mask)
        if isinstance(mask, Graph):
            mask.prepare()
    torch.testing.assert_close(gradient(mask), gradient(MASKS[name]()))


@pytest.mark.parametrize("given", ["edge_index", "graph", "graph of inference mode"])
@pytest.mark.parametrize("layer", [saccade.nn.GATConv, saccade.nn.GATv2Conv, saccade.nn.TransformerConv])
def test_evaluation_then_training(layer: Any, given: str) -> None:
    edges = torch.randint(0, 6, (2, 15))
    x, features = torch.randn(6, 3), torch.randn(15, 2)
    module = layer(3, 4, heads=2, edge_dim=2)
    with torch.inference_mode(given == "graph of inference mode"):
        index = edges if given == "edge_index" else Graph.from_edge_index(edges, 6)
    with torch.inference_mode():
        module.eval()(x, index, features, return_attention_weights=True)
    features.requires_grad_()
    out, (_, weights) = module.train()(x, index, features, return_attention_weights=True)
    (out.sum() + weights.square().sum()).backward()
    assert features.grad is not None and bool(features.grad.isfinite().all())


def test_graphs_move_to_meta() -> None:
    moved = Graph.from_edge_index(EDGES, 6).to("meta")
    assert moved.has_repeats and moved.num_edges == 4 and moved.device.type == "meta"
