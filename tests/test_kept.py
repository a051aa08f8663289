"""What masks, graphs and layers keep between calls serves every later call, whatever mode it was made in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import saccade
import torch
from saccade import Graph, KeyPadding, Segments, Window
from saccade.nn._kept import Kept
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


def outputs(kind: str) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[], Tensor]]:
    """A tensor of values that are looked at, what is computed with it, and other values for it."""
    if kind == "edges":
        conv, x = saccade.nn.GATv2Conv(3, 4), torch.randn(9, 3)
        return torch.randint(0, 9, (2, 30)), lambda t: conv(x, t), lambda: torch.randint(0, 9, (2, 30))
    if kind == "sparse edges":
        conv, x = saccade.nn.TransformerConv(3, 4), torch.randn(9, 3)

        def sparse(t: Tensor) -> Tensor:
            return conv(x, matrix if t is values else torch.sparse_csr_tensor(matrix.crow_indices(), t, data))

        data, values = torch.ones(18), torch.randint(0, 9, (18,))
        matrix = torch.sparse_csr_tensor(torch.arange(0, 19, 2), values, data)  # on the memory of `values`
        return values, sparse, lambda: torch.randint(0, 9, (18,))
    layer = saccade.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    if kind == "padding":
        packed, x = saccade.nn.TransformerEncoder(layer, 1, packed=True), torch.randn(2, 5, 8)
        return torch.zeros(2, 5).bool(), lambda t: packed(x, None, t), lambda: torch.rand(2, 5) > 0.5
    causal, x = torch.ones(70, 70).bool().triu(1), torch.randn(2, 70, 8)
    if kind == "band":
        return causal, lambda t: layer.self_attn(x, x, x, attn_mask=t)[0], lambda: causal.triu(3)
    encoder = saccade.nn.TransformerEncoder(layer, 1)
    mask = torch.zeros(70, 70).masked_fill_(causal, -torch.inf)
    return mask, lambda t: encoder(x, mask=t), lambda: torch.randn(70, 70)


def _assign(old: Tensor, new: Tensor) -> None:
    old.data = new


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "in place": lambda old, new: old.copy_(new),
    "data": lambda old, new: old.data.copy_(new),
    "data =": _assign,
    "numpy": lambda old, new: old.numpy().__setitem__(slice(None), new.numpy()),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", ["band", "causal", "padding", "edges", "sparse edges"])
def test_every_way_of_writing_counts(kind: str, write: str, inference: bool) -> None:
    if kind == "sparse edges" and write == "data =":
        pytest.skip("the sparse tensor keeps the memory it has")
    with torch.inference_mode(inference):
        given, compute, draw = outputs(kind)
        before, new = compute(given), draw()
        assert torch.equal(compute(given), before)
        WRITES[write](given, new)
        after = compute(given)
        torch.testing.assert_close(after, compute(new))
        assert not torch.equal(after, before)


def test_what_is_found_is_found_once() -> None:
    kept, calls = Kept(), []
    many = torch.randint(0, 99, (2, 1 << 16))
    forms = [many, many.int(), many.t(), torch.randn(7, 3), torch.tensor([torch.nan] * 2), torch.zeros(0, 4)]
    for x in forms:
        for _ in range(3):
            kept.of(x, "asked", lambda: calls.append(0))
    assert len(calls) == len(forms) and kept.known(forms[0], "other", 5) == 5
    for x in forms[:3]:
        for first, second in ((0, 1), (3, 19), (3, 3 + 1024), (5, 65535)):  # two edges change places
            edges = x if x.shape[0] == 2 else x.t()
            edges.data[:, first], edges.data[:, second] = torch.tensor([[1, 2], [3, 4]])
            kept.of(x, "asked", lambda: calls.append(0))
            calls.clear()
            edges.data[:, [first, second]] = edges.data[:, [second, first]]
            kept.of(x, "asked", lambda: calls.append(0))
            assert len(calls) == 1


def test_what_the_backward_pass_reads_is_not_the_callers() -> None:
    q, cache = torch.randn(5, 2, 8, requires_grad=True), torch.randn(2, 2, 6, 8, requires_grad=True)
    ends, lengths = torch.tensor([0, 3, 5]), torch.tensor([4, 6])
    table = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)

    def calls() -> Any:
        yield saccade.attention_varlen(q, q, q, ends, ends, 3, 3), ends, q
        yield saccade.attention_decode(cache[:, :, :1], cache, cache, lengths), lengths, cache
        yield saccade.attention_decode(cache[:, :, :1], cache, cache, lengths, table), table, cache

    for (out, numbers, x), (same, _, _) in zip(calls(), calls(), strict=True):
        want = torch.autograd.grad(same.sum(), x)[0]
        saved = numbers.clone()
        numbers.fill_(1)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], want)
        numbers.copy_(saved)


@pytest.mark.parametrize("num_keys", [4, 1 << 33])
def test_graphs_own_their_memory(num_keys: int) -> None:
    indptr, indices, edges = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]), torch.tensor([[0, 2], [0, 1]])
    graphs = [Graph.from_csr(indptr, indices, num_keys), Graph.from_edge_index(edges, (num_keys, 2))]
    for x in (indptr, indices, edges):
        x.fill_(0)
    assert [g.indices.tolist() for g in graphs] == [[0, 2, 1], [0, 2]]
    assert [g.indptr.tolist() for g in graphs] == [[0, 2, 3], [0, 1, 2]]
