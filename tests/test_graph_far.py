"""Graphs whose rows outgrow a core's cache: the passes then read one tensor each and ask for rows ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import saccade
import torch
from saccade import Graph
from saccade.testing import Shape, check_attention, make_inputs, tensor_map
from torch import Tensor

FAR = 9000  # rows of 2 heads of 64 + 64 fp32 numbers: 9 MB
# One work item: where rows are cut stays the same when more are added.
HEADS, NODES, EDGES, DIM = (
    2,
    150,
    700,
    64,
)


def features() -> dict[str, Any]:
    return {
        "edge_attr": (
            torch.randn(EDGES, 3, requires_grad=True),
            torch.randn(HEADS, DIM, 3, requires_grad=True),
        )
    }


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "bias": lambda: {"edge_bias": torch.randn(HEADS, EDGES, requires_grad=True)},
    "features": features,
    "dropout": lambda: {"dropout_p": 0.3, "seed": 4},
    "band": lambda: {"window": (40, None), "align": "start"},
    "sink": lambda: {"sink": torch.randn(HEADS, requires_grad=True), "softcap": 2.0},
    "gatv2": lambda: {"score": saccade.GATv2(torch.randn(HEADS, DIM, requires_grad=True))},
    "sigmoid": lambda: {"activation": "sigmoid"},
    "one_key_head": dict,
    "two_entries": dict,
    "bf16": dict,
}


def call(qkv: list[Tensor], graph: Graph, options: dict[str, Any]) -> list[Tensor]:
    """The output and the gradients of q, k, v and of the options' tensors."""
    leaves = list(qkv)
    tensor_map(lambda x: leaves.append(x) or x if x.requires_grad else x, tuple(options.values()))
    mask: saccade.Mask = graph
    if "window" in options:
        options = dict(options)
        mask = graph & saccade.Window(*options.pop("window"), align=options.pop("align"))
    out = saccade.attention(*qkv, mask, backend="cpu", **options)
    return [out, *torch.autograd.grad(out.sin().sum(), leaves)]


@pytest.mark.parametrize("side", ["keys", "queries"])
@pytest.mark.parametrize("name", OPTIONS)
def test_far_rows_change_no_bit(name: str, side: str) -> None:
    """The same edges among more rows, which take no part: other passes, the same numbers."""
    options = OPTIONS[name]()
    index = torch.randint(NODES, (2, EDGES))
    batch, heads_k = 1 + (name == "two_entries"), 1 if name == "one_key_head" else HEADS
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    sizes = {"keys": NODES, "queries": NODES} | {side: FAR * (1 + (heads_k == 1) + (name == "bf16"))}
    far = [
        torch.randn(batch, heads, sizes[of], DIM).to(dtype).requires_grad_()
        for heads, of in ((HEADS, "queries"), (heads_k, "keys"), (heads_k, "keys"))
    ]
    near = [x.detach()[:, :, :NODES].clone().requires_grad_() for x in far]
    found = call(far, Graph.from_edge_index(index, (sizes["keys"], sizes["queries"])), options)
    expected = call(near, Graph.from_edge_index(index, NODES), options)
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        if place < 4:
            assert not a[:, :, NODES:].any()
            a = a[:, :, :NODES]
        assert torch.equal(a, b), place


@pytest.mark.parametrize("nodes", [FAR, 2 * FAR])  # twice as many outgrow what cores share as well
@pytest.mark.parametrize("needs", ["q", "k", "v", "kv"])
def test_only_some_gradients_of_far_rows(needs: str, nodes: int) -> None:
    index = torch.randint(nodes, (2, 3000))
    graph = Graph.from_edge_index(index, nodes)
    qkv = [x.detach() for x in make_inputs(Shape(1, HEADS, HEADS, nodes, nodes, DIM, DIM))]
    out = saccade.attention(*(x.requires_grad_() for x in qkv), graph)
    every = dict(zip("qkv", torch.autograd.grad(out.sin().sum(), qkv), strict=True))
    some = {n: x.detach().requires_grad_(n in needs) for n, x in zip("qkv", qkv, strict=True)}
    out = saccade.attention(*some.values(), graph)
    for name, grad in zip(needs, torch.autograd.grad(out.sin().sum(), [some[n] for n in needs]), strict=True):
        assert torch.equal(grad, every[name])


@pytest.mark.parametrize("hubs", ["queries", "keys"])
def test_hubs_among_far_rows(hubs: str) -> None:
    """Rows of thousands of edges are cut and merged in every pass."""
    ends = torch.stack([torch.randint(FAR, (15_000,)), torch.randint(5, (15_000,))])
    index, sizes = (ends, (FAR, 40)) if hubs == "queries" else (ends.flip(0), (40, FAR))
    shape = Shape(1, HEADS, HEADS, sizes[1], sizes[0], DIM, DIM)
    bias = torch.randn(15_000, requires_grad=True)
    check_attention(make_inputs(shape), Graph.from_edge_index(index, sizes), "cpu", edge_bias=bias)
