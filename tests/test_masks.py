"""Masks: the definition against plain loops, every other form against the definition."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import saccade
import torch
from saccade import Band, Causal, Chunks, Graph, KeyPadding, Mask, Segments, Window, ops
from saccade.masks import Dims
from torch import Tensor

SIZES = [(1, 1), (5, 5), (3, 8), (8, 3), (0, 4), (4, 0), (70, 131)]
HEADS = torch.tensor([0, 2, 5])


def dense(sq: int, sk: int, keep: Callable[[int, int], bool]) -> Tensor:
    rows = [[keep(i, j) for j in range(sk)] for i in range(sq)]
    return torch.tensor(rows, dtype=torch.bool).reshape(sq, sk)


@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_bands_are_their_definition(sq: int, sk: int) -> None:
    cases: list[tuple[Mask, Callable[[int, int], bool]]] = [
        (Band(2, 1), lambda i, j: -2 <= j - (i + sk - sq) <= 1),
        (Band(-1, None), lambda i, j: 1 <= j - (i + sk - sq)),
        (Band(None, -2, align="start"), lambda i, j: j - i <= -2),
        (Band(), lambda i, j: True),
        (Causal(), lambda i, j: j <= i + sk - sq),
        (Causal(align="start"), lambda i, j: j <= i),
        (Window(3, 0), lambda i, j: 0 <= i + sk - sq - j <= 3),
        (
            Causal() & Window(2, 7) & Causal(align="start"),
            lambda i, j: j <= i and -2 <= j - (i + sk - sq) <= 0,
        ),
        (Chunks(3, 1), lambda i, j: (i + sk - sq) // 3 - 1 <= j // 3 <= (i + sk - sq) // 3),
        (Chunks(2, align="end"), lambda i, j: j // 2 <= (i + sk - sq) // 2),
    ]
    for mask, keep in cases:
        if not (type(mask) is Chunks and mask.align is None and sq != sk):
            assert torch.equal(mask.materialize(sq, sk), dense(sq, sk, keep)), mask


def test_parts_with_tensors_are_their_definition() -> None:
    lengths, keep = torch.tensor([0, 2, 4]), torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    expected = torch.stack([dense(3, 4, lambda i, j, n=n: j < n) for n in (0, 2, 4)])
    assert torch.equal(KeyPadding(lengths).materialize(3, 4), expected)
    assert torch.equal(KeyPadding(keep).materialize(3, 4), keep[:, None].expand(2, 3, 4))
    assert torch.equal(KeyPadding(keep=keep[0]).materialize(3, 4), keep[0].expand(3, 4))
    assert torch.equal(KeyPadding(2).materialize(3, 4), dense(3, 4, lambda i, j: j < 2))

    assert KeyPadding(keep=keep[:, :0]).materialize(3, 0).shape == (2, 3, 0)
    assert KeyPadding(lengths[:0]).materialize(3, 4).shape == (0, 3, 4)
    assert Segments(lengths[:, None], lengths[:, None][:, :0]).materialize(1, 0).shape == (3, 1, 0)

    q_ids, k_ids = torch.tensor([[7, 1 << 40, -1]]), torch.tensor([[-1, 7, 7, 1 << 40]])
    expected = q_ids[:, :, None] == k_ids[:, None]
    assert torch.equal(Segments(q_ids, k_ids).materialize(3, 4), expected)
    assert torch.equal(Segments(k_ids[0]).materialize(4, 4), k_ids[0][:, None] == k_ids[0])

    per_head = Window(HEADS, 1) & Causal(align="start")
    expected = torch.stack(
        [dense(6, 9, lambda i, j, n=n: -n <= j - (i + 3) <= 1 and j <= i) for n in HEADS.tolist()]
    )
    assert torch.equal(per_head.materialize(6, 9), expected)
    both = per_head & KeyPadding(torch.tensor([4, 9]))
    assert both.materialize(6, 9).shape == (2, 3, 6, 9)
    assert torch.equal(both.materialize(6, 9)[0], expected & (torch.arange(9) < 4))


def some_masks(sq: int, sk: int, batch: int) -> list[Mask]:
    draw = torch.Generator().manual_seed(sq * 31 + sk)

    def ids(n: int) -> Tensor:
        return torch.randint(0, 3, (batch, n), generator=draw)

    def graph(share: float) -> Graph:
        return Graph.from_dense(torch.rand(sq, sk, generator=draw) < share)

    lengths = torch.randint(0, sk + 1, (batch,), generator=draw)
    keep = torch.rand(batch, sk, generator=draw) < 0.6
    segments = Segments(ids(sq), ids(sk))
    return [
        Causal(), Window(4, 2), Band(9, -3) & Window(3, None, align="start"),
        Window(HEADS, 3) & Band(2, HEADS),
        KeyPadding(lengths), KeyPadding(keep), KeyPadding(keep) & KeyPadding(~keep | (torch.arange(sk) < 3)),
        KeyPadding(lengths) & KeyPadding(lengths.flip(0)), segments, segments & Segments(ids(sq), ids(sk)),
        Chunks(4, 1, align="end"), Chunks(4, 1, align="end") & Chunks(7, 0, align="end"),
        graph(0.3), graph(0.9) & graph(0.5), graph(0.0), graph(0.5) & Causal() & KeyPadding(keep) & segments,
    ]  # fmt: skip


@pytest.mark.skipif(not ops.LOADED, reason="no operator library")
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (5, 5), (3, 8), (8, 3), (70, 131)])
def test_the_normal_form_in_cpp_is_the_definition(sq: int, sk: int) -> None:
    batch, heads = 2, 3
    none = (None,) * 5
    for mask in some_masks(sq, sk, batch):
        args = mask.resolve(Dims(batch, heads, sq, sk, torch.device("cpu")))
        tiles = (None,) * 3 if args.graph is None else args.graph.tiles()
        tensors = (args.head_bounds, args.lengths, args.keep, args.q_ids, args.k_ids)
        got = torch.ops.saccade.keep(
            *tensors, *none, *tiles, args.band, args.chunks, 0, 0, batch, heads, sq, sk, torch.empty(0)
        )
        expected = mask.materialize(sq, sk)
        if mask.num_heads is None:
            expected = expected.unsqueeze(-3)
        assert torch.equal(got, expected.expand(batch, heads, sq, sk)), mask


def test_masks_are_immutable_and_travel() -> None:
    for mask in some_masks(6, 9, 2):
        with pytest.raises(AttributeError):
            mask.left = 3  # type: ignore[attr-defined]
        mask.resolve(Dims(2, 3, 6, 9, torch.device("cpu")))
        for twin in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), mask.to("cpu")):
            assert torch.equal(twin.materialize(6, 9), mask.materialize(6, 9))
            assert repr(twin) == repr(mask)


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = (Causal() & KeyPadding(torch.tensor([3, 5]))).plot(4, 5)
    assert len(axes) == 2 and len(axes[0].images) == 1
    axes = Causal().plot(4, 5)
    assert axes.images[0].get_array().shape == (4, 5)


# -- graphs
# -------------------------------------------------------------------------------------------------------

EDGES = torch.tensor([[3, 0, 2, 2, 0, 1], [1, 0, 2, 0, 1, 2]])  # sources, targets: not sorted


def adjacency(edges: Tensor, num_queries: int, num_keys: int) -> Tensor:
    found = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    found[edges[1], edges[0]] = True
    return found


def test_graph_forms_agree() -> None:
    graph = Graph.from_edge_index(EDGES, (4, 3))
    expected = adjacency(EDGES, 3, 4)
    assert (graph.num_queries, graph.num_keys, graph.num_edges) == (3, 4, 6)
    assert torch.equal(graph.edge_index, EDGES)
    assert torch.equal(graph.materialize(), expected)
    for twin in (
        Graph.from_dense(expected),
        Graph.from_dense(expected.to_sparse()),
        Graph.from_dense(expected.float().to_sparse_csr()),
        Graph.from_csr(graph.indptr, graph.indices, 4),
        graph.to("cpu"),
        graph.prepare(),
    ):
        assert torch.equal(twin.materialize(), expected)
    assert graph.to("cpu") is graph.to(torch.device("cpu")) is graph
    assert graph.indptr.dtype == torch.int64 and graph.indices.dtype == torch.int32
    turned = graph.transpose()
    assert torch.equal(turned.edge_index, EDGES.flip(0)) and torch.equal(turned.materialize(), expected.t())


def test_graph_batch_is_block_diagonal() -> None:
    a, b = Graph.from_edge_index(EDGES, (4, 3)), Graph.from_dense(torch.rand(5, 2) < 0.5)
    joined = Graph.batch([a, b])
    assert torch.equal(
        joined.materialize(), torch.block_diag(a.materialize().int(), b.materialize().int()).bool()
    )
    assert torch.equal(joined.edge_index[:, :6], EDGES)
    assert torch.equal(joined.edge_index[:, 6:], b.edge_index + torch.tensor([[4], [3]]))


def test_self_loops_are_added_after_the_edges_and_only_where_missing() -> None:
    edges = torch.tensor([[2, 1, 0], [0, 1, 2]])
    looped = Graph.from_edge_index(edges, 3).add_self_loops()
    assert torch.equal(looped.edge_index, torch.tensor([[2, 1, 0, 0, 2], [0, 1, 2, 0, 2]]))
    assert looped.add_self_loops().num_edges == 5


def test_repeated_edges_are_kept() -> None:
    twice = torch.cat([EDGES, EDGES[:, :2]], 1)
    graph = Graph.from_edge_index(twice, (4, 3))
    assert graph.num_edges == 8 and graph.has_repeats
    assert torch.equal(graph.edge_index, twice)
    assert torch.equal(graph.prepare().materialize(), adjacency(EDGES, 3, 4))
    with pytest.raises(ValueError, match="repeated"):
        graph.tiles()


def test_joined_graphs_keep_the_numbers_of_the_first() -> None:
    left = Graph.from_edge_index(EDGES, (4, 3))
    right = Graph.from_edge_index(EDGES[:, [4, 1, 0]], (4, 3))
    q, k, v = torch.randn(1, 3, 8), torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    bias = torch.randn(6)
    got = saccade.attention(q, k, v, left & right, edge_bias=bias)
    want = saccade.attention(
        q, k, v, Graph.from_edge_index(EDGES[:, [0, 1, 4]], (4, 3)), edge_bias=bias[[0, 1, 4]]
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (64, 64), (65, 130), (200, 70)])
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_tiles_hold_every_edge(shape: tuple[int, int], share: float) -> None:
    expected = torch.rand(shape) < share
    ptr, col, bits = Graph.from_dense(expected).tiles()
    assert ptr.dtype == bits.dtype == torch.int64 and col.dtype == torch.int32
    assert ptr.numel() == -(-shape[0] // 64) + 1 and int(ptr[-1]) == col.numel() == bits.shape[0]
    found = torch.zeros(-(-shape[0] // 64) * 64, -(-shape[1] // 64) * 64, dtype=torch.bool)
    words = ((bits[:, :, None] >> torch.arange(64)) & 1).bool()
    for row in range(ptr.numel() - 1):
        for tile in range(int(ptr[row]), int(ptr[row + 1])):
            at = int(col[tile]) * 64
            found[row * 64 : row * 64 + 64, at : at + 64] = words[tile]
    assert torch.equal(found[: shape[0], : shape[1]], expected) and found.sum() == expected.sum()


@pytest.mark.parametrize("kind", ["lengths", "keep", "q_ids"])
def test_writing_into_the_callers_tensor_does_not_change_a_mask(kind: str) -> None:
    """It is read again in the backward pass, and a value checked once stays as it was checked."""
    values = torch.tensor([3]) if kind == "lengths" else torch.ones(1, 5, dtype=torch.bool)
    values = torch.zeros(1, 5, dtype=torch.int32) if kind == "q_ids" else values
    mask = Segments(values) if kind == "q_ids" else KeyPadding(**{kind: values})
    want = mask.materialize(5, 5).clone()
    values[..., 0] = 9
    values.flatten()[-1] = 0
    assert torch.equal(mask.materialize(5, 5), want)


def test_graphs_joined_keep_the_edges_of_all_and_the_numbers_of_the_first() -> None:
    first, second = (torch.rand(6, 9, generator=torch.Generator().manual_seed(n)) < 0.6 for n in (1, 2))
    mask = Graph.from_dense(first) & Causal() & Graph.from_dense(second)
    assert mask.graph is not None and torch.equal(mask.graph.materialize(), first & second)
    assert mask.graph.num_edges == int(first.sum())
    assert mask.prepare() is mask and "tiles" in mask.graph._cache


@pytest.mark.parametrize("kind", ["lengths", "keep", "segments", "window"])
def test_numbers_of_a_mask_are_not_mapped_over(kind: str) -> None:
    q, n = torch.randn(3, 1, 2, 6, 8), torch.tensor([[2, 1], [4, 2], [6, 3]])
    masks = {
        "lengths": lambda n: KeyPadding(n[:1]),
        "keep": lambda n: KeyPadding(keep=torch.arange(6)[None] < n[:1, None]),
        "segments": lambda n: Segments(torch.arange(6)[None] // n[:1, None]),
        "window": lambda n: Window(n, 0),
    }
    with pytest.raises(ValueError, match="vmap maps over no numbers of a mask"):
        torch.func.vmap(lambda q, n: saccade.attention(q, q, q, masks[kind](n)))(q, n)
    fixed = masks[kind](n[1])  # one mask for all entries is no number that is mapped
    found = torch.func.vmap(lambda q: saccade.attention(q, q, q, fixed))(q)
    torch.testing.assert_close(found, torch.stack([saccade.attention(x, x, x, fixed) for x in q]))
