"""Graphs that are measured: Erdos-Renyi, power-law, grid, molecules; 10 thousand to a million edges."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from saccade.graph import Graph
from saccade.maskbase import Mask
from saccade.masks import Causal
from saccade.patterns import grid2d
from torch import Tensor

from .cases import FORWARD, TRAIN, Group

KINDS = ("erdos-renyi", "power-law", "grid", "molecules")
# (edges, heads, head_dim); a million edges with 8 heads of 128 would be 4 GB for each tensor of a peer.
SIZES = ((10_000, 8, 16), (10_000, 4, 64), (100_000, 1, 128), (100_000, 4, 32), (100_000, 8, 64),
         (1_000_000, 1, 64), (1_000_000, 8, 16))  # fmt: skip
_DEGREE = 10
_MOLECULE = 23  # atoms: a ring of six, the rest a chain


@dataclass(frozen=True)
class GraphCase:
    """Attention along the edges of one graph, batch 1."""

    name: str
    kind: str
    edges: int  # asked for; repeated ones are taken out, so a few less are there
    heads: int
    head_dim: int
    dtype: str = "fp32"
    directions: tuple[str, ...] = (FORWARD, TRAIN)
    _: KW_ONLY
    dropout_p: float = 0.0
    edge_bias: bool = False  # with its gradient
    causal: bool = False  # of the edges, those from keys up to the query's own place attend

    def plain(self) -> GraphCase:
        """The same call with nothing but the graph."""
        return replace(self, dropout_p=0.0, edge_bias=False, causal=False)

    def graph(self) -> Graph:
        return build(self.kind, self.edges)

    def mask(self) -> Mask:
        return self.graph() & Causal() if self.causal else self.graph()

    def causal_edges(self) -> Tensor:
        """[E] bool, of the stored edges: those that `causal` keeps."""
        graph = self.graph()
        return graph.indices <= graph.rows

    def flops(self, direction: str) -> int:
        """Useful operations: q.k and p v of every edge that attends, and five products more backward."""
        edges = int(self.causal_edges().sum()) if self.causal else self.graph().num_edges
        return 2 * edges * self.heads * self.head_dim * (7 if direction == TRAIN else 2)

    def describe(self) -> dict[str, object]:
        """The columns of a result row that say what was measured. Edges per second are `edges` / `ms`."""
        options = {"mask": repr(self.mask()), "bias": self.edge_bias, "dropout_p": self.dropout_p}
        return columns(self) | options


def columns(case: Any) -> dict[str, object]:
    """Of a case with a name, dtype, graph, heads and head_dim: the columns that say what was measured."""
    graph = case.graph()
    return {
        "case": case.name, "dtype": case.dtype, "batch": 1, "heads": case.heads, "heads_k": case.heads,
        "seqlen_q": graph.num_queries, "seqlen_k": graph.num_keys, "head_dim": case.head_dim,
        "head_dim_v": case.head_dim, "mask": repr(graph), "edges": graph.num_edges,
        "bias": False, "dropout_p": 0.0,
    }  # fmt: skip


@lru_cache(maxsize=4)
def build(kind: str, edges: int) -> Graph:
    """The graph of a kind with about so many edges, ready for the kernels. No edge stands twice."""
    draw = torch.Generator().manual_seed(0)
    if kind == "grid":
        side = round((edges / 9) ** 0.5)
        return grid2d(side, side, 1).prepare()
    if kind == "molecules":
        index = _molecules(max(1, edges // (2 * _MOLECULE)))
        return Graph.from_edge_index(index, int(index.max()) + 1).prepare()
    nodes = edges // _DEGREE
    if kind == "erdos-renyi":
        index = torch.randint(nodes, (2, edges), generator=draw)
    else:
        # Targets by a Zipf law, in no order of degree: the first of them has a percent of all edges and more.
        law = (torch.arange(nodes) + 1.0) ** -0.8
        ends = torch.multinomial(law, edges, True, generator=draw)
        targets = torch.randperm(nodes, generator=draw)[ends]
        index = torch.stack([torch.randint(nodes, (edges,), generator=draw), targets])
    return Graph.from_edge_index(torch.unique(index, dim=1), nodes).prepare()


def _molecules(count: int) -> Tensor:
    """Both directions of the bonds of `count` molecules."""
    chain = torch.arange(_MOLECULE - 1)
    bonds = torch.stack([torch.cat([chain, torch.tensor([5])]), torch.cat([chain + 1, torch.tensor([0])])])
    one = torch.cat([bonds, bonds.flip(0)], 1)
    return (one[:, None] + (torch.arange(count) * _MOLECULE)[None, :, None]).flatten(1)


def graphs() -> list[Group]:
    """One group per kind of graph. `gather` and `traffic` are limits: the copies that it takes."""
    found = []
    for kind in KINDS:
        cases = tuple(GraphCase(f"{kind}-e{e // 1000}k-h{h}-d{d}", kind, e, h, d) for e, h, d in SIZES)
        others = {
            "sparse": {FORWARD: 2.0},
            # 1.3 times the copies of the forward pass, 2 times those of the backward, twice as many.
            "gather": {FORWARD: 1 / 1.3, TRAIN: 3 / (1.3 + 2 * 2.0)},
            "traffic": {},
            "sdpa-mask": {},
        }
        goal = {FORWARD: 9.0, TRAIN: 16.0}
        found.append(Group(kind, cases, "pyg", goal, others=others))  # type: ignore[arg-type]
    return found


def graph_options() -> list[Group]:
    """Dropout, a bias of edges with its gradient, a mask over the graph; beside saccade's own plain call."""
    base = GraphCase("", "erdos-renyi", 100_000, 8, 16)
    cases = (
        replace(base, name="graph-dropout", dropout_p=0.1),
        replace(base, name="graph-edge-bias", edge_bias=True),
        replace(base, name="graph-causal", causal=True),
    )
    return [Group("graph options, beside plain", cases, "saccade-plain", others={"pyg": {}})]  # type: ignore[arg-type]
