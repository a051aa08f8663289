"""The equations of graph convolutions in plain torch, with gather and scatter: what layers are checked by."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_over_edges(logits: Tensor, values: Tensor, i: Tensor, n: int) -> Tensor:
    """Of the values [E, H, D] of edges by the softmax of their logits [E, H], over those that share a target
    `i`; gives [n, H, D].
    """
    heads = logits.shape[1]
    where = i[:, None].expand_as(logits)
    peak = logits.new_full((n, heads), -torch.inf).scatter_reduce(0, where, logits.detach(), "amax")
    powers = torch.exp(logits - peak[i])
    weights = powers / powers.new_zeros(n, heads).index_add(0, i, powers)[i]
    return values.new_zeros(n, *values.shape[1:]).index_add(0, i, weights[..., None] * values)


class Formula(torch.nn.Module):
    """One layer's equation, with copies of the modules and weights of `layer` that `names` lists.

    `node_maps` counts its linear maps of nodes, `per_edge` its operations for each edge and channel beside
    W e and the sum of values.
    """

    names: tuple[str, ...]
    node_maps: int
    per_edge: int

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.heads = layer.heads
        for name in self.names:
            setattr(self, name, copy.deepcopy(getattr(layer, name)))

    def by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class GATv2(Formula):
    """Brody et al., 2105.14491."""

    names = ("lin_l", "lin_r", "lin_edge", "att", "bias", "negative_slope")
    node_maps, per_edge = 2, 4  # q + k + W e, and w . phi

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        """`x` [N, F], `edges` [2, E], `features` [E, De]; gives [N, H * D]."""
        j, i = edges
        keys, queries = self.by_head(self.lin_l(x)), self.by_head(self.lin_r(x))
        sums = queries[i] + keys[j] + self.by_head(self.lin_edge(features))
        logits = (F.leaky_relu(sums, self.negative_slope) * self.att).sum(-1)
        return mean_over_edges(logits, keys[j], i, len(x)).flatten(1) + self.bias


class GAT(Formula):
    """Velickovic et al., 1710.10903, with features of edges as PyTorch Geometric has them."""

    names = ("lin", "lin_edge", "att_src", "att_dst", "att_edge", "bias", "negative_slope")
    node_maps, per_edge = 1, 2  # a . W e

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        """As `GATv2.forward`."""
        j, i = edges
        nodes, joined = self.by_head(self.lin(x)), self.by_head(self.lin_edge(features))
        sums = (nodes * self.att_dst).sum(-1)[i] + (nodes * self.att_src).sum(-1)[j]
        logits = F.leaky_relu(sums + (joined * self.att_edge).sum(-1), self.negative_slope)
        return mean_over_edges(logits, nodes[j], i, len(x)).flatten(1) + self.bias


class Transformer(Formula):
    """Shi et al., 2009.03509."""

    names = ("lin_query", "lin_key", "lin_value", "lin_edge", "lin_skip")
    node_maps, per_edge = 4, 4  # k + W e, v + W e, and q . k

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        """As `GATv2.forward`."""
        j, i = edges
        queries, keys, values = (self.by_head(m(x)) for m in (self.lin_query, self.lin_key, self.lin_value))
        joined = self.by_head(self.lin_edge(features))
        logits = (queries[i] * (keys[j] + joined)).sum(-1) * queries.shape[-1] ** -0.5
        return mean_over_edges(logits, values[j] + joined, i, len(x)).flatten(1) + self.lin_skip(x)
