"""What memory costs on a graph: the rows that attention along edges must read, copied by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cases import TRAIN
from .measure import Call

if TYPE_CHECKING:
    from .graph import Inputs

LIMITS = ("gather", "traffic")
_BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 25}  # copied at a time when the gather bandwidth is measured


def gather(inputs: Inputs, direction: str) -> Call:
    """The rows of every edge read by index_select, no arithmetic. Forward k and v; backward k and v once more
    by target, and q and dout by source.
    """
    rows = [(inputs.k, inputs.sources), (inputs.v, inputs.sources)]
    if direction == TRAIN:
        by_source = inputs.graph.columns()[1].long()
        rows += [*rows, (inputs.q, by_source), (inputs.dout, by_source)]
    width = inputs.case.heads * inputs.case.head_dim
    step = max(1, _BLOCK_BYTES[inputs.q.device.type] // (width * inputs.q.element_size()))
    block = inputs.q.new_empty(step, width)
    # A block is written again and again, so that only reading goes past the cache.
    pieces = [(x.detach().flatten(1), part) for x, index in rows for part in index.split(step)]

    def copies() -> list[Tensor]:
        for x, part in pieces:
            torch.index_select(x, 0, part, out=block[: part.numel()])
        return [block]

    return copies


def traffic(inputs: Inputs, direction: str) -> Call:
    """`gather`, and what is read and written once for every node: q read and out written; with the backward
    pass also q, k, v read once more and their gradients written. The results' memory is at hand.
    """
    copies, nodes = gather(inputs, direction), _nodes(inputs, direction)
    results = [torch.empty_like(x) for x in nodes]

    def moves() -> list[Tensor]:
        for x, result in zip(nodes, results, strict=True):
            result.copy_(x)
        return [*copies(), *results]

    return moves


def _nodes(inputs: Inputs, direction: str) -> list[Tensor]:
    read = [inputs.q] + ([inputs.q, inputs.k, inputs.v] if direction == TRAIN else [])
    return [x.detach() for x in read]


def fault(inputs: Inputs, name: str, direction: str, call: Call) -> str:
    """Run a limit once: the last rows copied must be those of the last edges. Empty when they are."""
    block, *results = call()  # type: ignore[misc]
    x, index = inputs.v, inputs.sources
    if direction == TRAIN:
        x, index = inputs.dout, inputs.graph.columns()[1].long()
    last = index.split(len(block))[-1]
    if not torch.equal(block[: len(last)], x.flatten(1)[last]):
        return "other rows were copied"
    nodes = _nodes(inputs, direction) if name == "traffic" else []
    same = len(results) == len(nodes) and all(map(torch.equal, results, nodes))
    return "" if same else "other nodes were copied"
