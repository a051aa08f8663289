"""The CUDA kernels of the gather body, run on the host simulator, against the yardstick."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from saccade import Band, Graph, KeyPadding, Segments, Window
from saccade.ops import GATHER
from saccade.testing import ORDERS, Shape, derivatives, make_inputs, pairwise, poisoned
from simulated import needs_compiler
from test_cuda_tiled import check, check_gradients, simulated
from torch import Tensor

pytestmark = needs_compiler

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUERIES, KEYS = 70, 83


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def graph_of(name: str) -> Graph:
    """Edges of a kind: few in each row, a row and a key that meet everything, none at all."""
    queries, keys = (
        torch.randint(0, QUERIES, (300,), generator=drawn(1)),
        torch.randint(0, KEYS, (300,), generator=drawn(2)),
    )
    match name:
        case "repeats":
            index = torch.stack([keys, queries])[:, torch.arange(400) % 300]
        case "hubs":  # rows and keys of several items, one after another
            rows = [torch.stack([torch.arange(KEYS), torch.full((KEYS,), i)]) for i in (11, 12, 69)]
            column = torch.stack([torch.full((QUERIES,), 5), torch.arange(QUERIES)])
            index = torch.cat(
                [torch.stack([keys, queries])[:, :60], *rows, *rows, *rows[1:], column, column], 1
            )
        case "path":  # ends of rows and of items meet in every way
            index = torch.stack([torch.arange(QUERIES), torch.arange(QUERIES)])
        case _:
            index = torch.empty(2, 0, dtype=torch.int64)
    return Graph.from_edge_index(index, (KEYS, QUERIES))


def bias_of(graph: Graph, heads: int) -> Tensor:
    """With some edges hidden."""
    size = (heads, graph.num_edges) if heads > 1 else (graph.num_edges,)
    bias = torch.randn(size, generator=drawn(3))
    return bias.masked_fill(torch.rand(size, generator=drawn(4)) < 0.1, -torch.inf).requires_grad_()


IDS = [torch.randint(0, 3, (2, n), generator=drawn(5)) for n in (QUERIES, KEYS)]
MASKS: dict[str, Any] = {
    "none": None,
    "window": Window(40, 5),
    "lengths": KeyPadding(torch.tensor([50, 0])),
    "keep": KeyPadding(torch.rand(2, KEYS, generator=drawn(6)) < 0.7),
    "segments": Segments(*IDS),
}
TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "negative scale": {"scale": -0.3},
    "sink": {"sink": torch.tensor([0.5, -2.0, 0.0, 4.0], requires_grad=True)},
    "softmax1": {"activation": "softmax1"},
    "dropout": {"dropout_p": 0.3, "seed": 11},
}
CASES = pairwise(
    {
        "graph": ["repeats", "hubs", "path", "none"],
        "mask": list(MASKS),
        "terms": list(TERMS),
        "edge_bias": [0, 1, 4],
        "heads_k": [1, 4],
        "dims": [(32, 24), (64, 64), (128, 96), (40, 256), (7, 5)],
        "dtype": [BF16, FP16, FP32],
    }
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_options(case: dict[str, Any]) -> None:
    graph, options = graph_of(case["graph"]), dict(TERMS[case["terms"]])
    if case["edge_bias"]:
        options["edge_bias"] = bias_of(graph, case["edge_bias"])
    mask = graph if case["mask"] == "none" else graph & MASKS[case["mask"]]
    inputs = make_inputs(Shape(2, 4, case["heads_k"], QUERIES, KEYS, *case["dims"]), case["dtype"])
    check_gradients(inputs, mask, body=GATHER, **options)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("order", ORDERS)
def test_layouts(order: str, dtype: torch.dtype) -> None:
    shape = Shape(2, 2, 2, QUERIES, KEYS, 32, 16)
    check_gradients(make_inputs(shape, dtype, order), graph_of("repeats"), body=GATHER)


@pytest.mark.parametrize("degree", [63, 64, 65, 127, 128, 129, 1000])
def test_heavy_rows(degree: int) -> None:
    """Rows and keys of so many edges begin and end at every place of an item."""
    keys = torch.arange(degree) % 9
    index = torch.cat([torch.stack([keys, torch.full_like(keys, i)]) for i in (0, 2)], 1)
    for ends, sizes in ((index, (9, 4)), (index.flip(0), (4, 9))):
        graph = Graph.from_edge_index(ends, sizes)
        check_gradients(make_inputs(Shape(1, 1, 1, sizes[1], sizes[0], 32, 32)), graph, body=GATHER)


@pytest.mark.parametrize("schedule", range(3))
def test_results_repeat(schedule: int) -> None:
    """Bitwise, whatever the schedule; and a head's results do not depend on the others'."""
    inputs, options = make_inputs(Shape(1, 2, 1, QUERIES, KEYS, 64, 64), BF16), {"dropout_p": 0.2, "seed": 3}
    graph, found = graph_of("hubs"), []
    bias = bias_of(graph, 2)
    for s in (schedule, 9):
        outputs = simulated(80, inputs, graph, s, GATHER, edge_bias=bias, **options)
        found.append([*outputs, *derivatives(outputs, (*inputs, bias))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bounds_per_head() -> None:
    band = Band(torch.tensor([5, 70, 0, 33]), torch.tensor([0, 2, 0, 70]))
    inputs = make_inputs(Shape(1, 4, 2, QUERIES, KEYS, 32, 32), BF16)
    check_gradients(inputs, graph_of("hubs") & band, body=GATHER)


def test_edges_left_out_have_no_gradient() -> None:
    """An intersection of graphs keeps the numbers of the first."""
    graph = graph_of("repeats")
    both = graph & graph_of("hubs")
    inputs = make_inputs(Shape(2, 2, 1, QUERIES, KEYS, 32, 32), BF16)
    for heads in (1, 2):
        check_gradients(inputs, both, body=GATHER, edge_bias=bias_of(graph, heads))


@pytest.mark.parametrize("name", ["no edge", "keep", "edge_bias"])
def test_dead_keys_are_never_read(name: str) -> None:
    graph, options, mask = graph_of("repeats"), {}, graph_of("repeats")
    dead = torch.zeros(1, 1, KEYS, dtype=torch.bool)
    if name == "no edge":
        dead[..., graph.edge_index[0].bincount(minlength=KEYS) == 0] = True
    else:
        dead[..., 20:30] = True
    if name == "keep":
        mask = graph & KeyPadding(~dead[0])
    if name == "edge_bias":
        options["edge_bias"] = torch.where(dead[0, 0, graph.edge_index[0]], -torch.inf, 0.5)
    assert dead.any()
    q, k, v = make_inputs(Shape(1, 2, 1, QUERIES, KEYS, 32, 32), BF16)
    found = []
    for inputs in ((q, poisoned(k, dead), poisoned(v, dead)), (q, k, v)):
        outputs = simulated(80, inputs, mask, body=GATHER, **options)
        found.append([*outputs, *derivatives(outputs, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("sizes", [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_small_sizes(sizes: tuple[int, int]) -> None:
    index = torch.zeros(2, 3 if all(sizes) else 0, dtype=torch.int64)
    check_gradients(
        make_inputs(Shape(2, 2, 2, sizes[1], sizes[0], 16, 16)),
        Graph.from_edge_index(index, sizes),
        body=GATHER,
    )


def test_what_is_not_served_is_named() -> None:
    inputs = make_inputs(Shape(1, 2, 2, QUERIES, KEYS, 16, 16), torch.float64)
    with pytest.raises(RuntimeError, match="gather_forward does not serve tensors other than fp32, bf16"):
        check(80, inputs, graph_of("path"), body=GATHER)
