"""The pairs (query, key) as the reference sees them: all of them, or the edges of a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph import Graph
from ..position import QueryRelative
from ..problem import DOT, Spec

_INF = float("inf")


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One dense sequence (or a batch of equal ones) with everything that joins it."""

    spec: Spec
    first: int  # the batch entry this one is, for masks and dropout
    q: Tensor  # [B, H, Sq, D] in the accumulator's dtype, as all that follow
    k: Tensor  # [B, H, Sk, D]
    v: Tensor  # [B, H, Sk, Dv]
    bias: Tensor | None
    rel_bias: Tensor | None
    weight: Tensor | None
    sink: Tensor | None
    extra_k: Tensor | None
    extra_v: Tensor | None
    edge_bias: Tensor | None
    edge_e: Tensor | None
    edge_w: Tensor | None
    position: QueryRelative | None


class Dense:
    """All pairs: a quantity of pairs is [B, H, Sq, Sk]."""

    def __init__(self, row: Row) -> None:
        self.sq, self.sk = row.q.shape[2], row.k.shape[2]
        self.i = torch.arange(self.sq, device=row.q.device)[:, None]
        self.j = torch.arange(self.sk, device=row.q.device)[None]
        self.parts = row.spec.mask.parts if row.spec.mask is not None else ()
        self.size = (row.q.shape[0], row.spec.heads, self.sq, self.sk)

    def query(self, x: Tensor) -> Tensor:  # [B, H, Sq, ...] broadcast to the pairs
        return x[:, :, :, None]

    def key(self, x: Tensor) -> Tensor:  # [B, H, Sk, ...] broadcast to the pairs
        return x[:, :, None]

    def joint(self, q: Tensor, k: Tensor) -> Tensor:  # what an additive score looks at, [B, H, Sq, Sk, D]
        return self.query(q) + self.key(k)

    def head(self, x: Tensor) -> Tensor:  # [H, D] broadcast to the pairs
        return x[:, None, None]

    def dot(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2)

    def of(self, bias: Tensor) -> Tensor:  # a [B, H, Sq, Sk] tensor, at the pairs
        return bias

    def sum(self, x: Tensor) -> Tensor:  # over the keys of each query
        return x.sum(-1)

    def max(self, x: Tensor) -> Tensor:
        return x.amax(-1) if self.sk else x.new_full(x.shape[:-1], -_INF)

    def queries_with(self, kept: Tensor) -> Tensor:  # [B, H, Sq]: which keep anything
        return kept.any(-1)

    def keys_with(self, kept: Tensor) -> Tensor:  # [B, H, Sk]: which are kept by anyone
        return kept.any(-2)

    def mix(self, p: Tensor, v: Tensor) -> Tensor:
        return p @ v

    def dense(self, p: Tensor) -> Tensor:
        return p


class Edges:
    """The pairs of a graph, each as often as it stands: a quantity of pairs is [B, H, E]."""

    def __init__(self, row: Row) -> None:
        graph = row.spec.args.graph
        assert graph is not None and row.spec.mask is not None
        self.row = row
        self.sq, self.sk = row.q.shape[2], row.k.shape[2]
        self.i, self.j, self.ids = graph.rows, graph.indices.long(), graph.ids
        self.parts = tuple(p for p in row.spec.mask.parts if not isinstance(p, Graph))
        self.size = (row.q.shape[0], row.spec.heads, self.i.numel())
        self.features: Tensor | None = None  # [H, E, D]: W e of each edge

    def show(self, kept: Tensor) -> None:
        """Read the features of the edges; of one that nobody keeps nothing is read."""
        if self.row.edge_e is None or self.row.edge_w is None:
            return
        features = self.row.edge_e[self.ids]
        features = torch.where(kept.flatten(0, 1).any(0)[:, None], features, torch.zeros_like(features))
        self.features = features @ self.row.edge_w.transpose(-1, -2)

    def query(self, x: Tensor) -> Tensor:
        return x[:, :, self.i]

    def key(self, x: Tensor) -> Tensor:
        return x[:, :, self.j]

    def head(self, x: Tensor) -> Tensor:
        return x[:, None]

    def _with_features(self, x: Tensor) -> Tensor:
        return self.key(x) if self.features is None else self.key(x) + self.features

    def joint(self, q: Tensor, k: Tensor) -> Tensor:
        return self.query(q) + self._with_features(k)

    def dot(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.query(q) * self._with_features(k)).sum(-1)

    def of(self, bias: Tensor) -> Tensor:
        return bias[..., self.i, self.j]

    def _scatter(self, x: Tensor, index: Tensor, size: int) -> Tensor:  # sums [B, H, E, ...] by index
        return x.new_zeros((*x.shape[:2], size, *x.shape[3:])).index_add(2, index, x)

    def sum(self, x: Tensor) -> Tensor:
        return self._scatter(x, self.i, self.sq)

    def max(self, x: Tensor) -> Tensor:
        start = x.new_full((*x.shape[:2], self.sq), -_INF)
        return start.scatter_reduce(2, self.i.expand(x.shape), x, "amax")

    def queries_with(self, kept: Tensor) -> Tensor:
        return self._scatter(kept.int(), self.i, self.sq) > 0

    def keys_with(self, kept: Tensor) -> Tensor:
        return self._scatter(kept.int(), self.j, self.sk) > 0

    def mix(self, p: Tensor, v: Tensor) -> Tensor:
        values = self._with_features(v) if self.row.spec.score == DOT else self.key(v)
        return self._scatter(p[..., None] * values, self.i, self.sq)

    def dense(self, p: Tensor) -> Tensor:
        return self._scatter(p, self.i * self.sk + self.j, self.sq * self.sk).unflatten(2, (self.sq, self.sk))


Pairs = Dense | Edges
