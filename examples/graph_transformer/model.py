"""Graph Transformers: layers of attention along edges, for nodes and for whole graphs."""

from __future__ import annotations

import torch
from saccade import Graph
from saccade.nn import GraphTransformerLayer
from torch import Tensor, nn


class NodeClassifier(nn.Module):
    """A class for every node."""

    def __init__(
        self, features: int, classes: int, width: int = 32, layers: int = 2, edge_dim: int | None = None
    ):
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.layers = nn.ModuleList(
            GraphTransformerLayer(width, 4, dropout=0.1, norm_first=True, edge_dim=edge_dim)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def nodes(self, x: Tensor, graph: Graph, bonds: Tensor | None = None) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h, graph, bonds)
        return self.norm(h)

    def forward(self, x: Tensor, graph: Graph, bonds: Tensor | None = None) -> Tensor:
        return self.head(self.nodes(x, graph, bonds))

    def attention(self, x: Tensor, graph: Graph, bonds: Tensor | None = None) -> Tensor:
        """[E]: the weight of each edge in the last layer, averaged over heads."""
        h = self.embed(x)
        for layer in self.layers[:-1]:
            h = layer(h, graph, bonds)
        last = self.layers[-1]
        return last.self_attn(last.norm1(h), graph, edge_attr=bonds, need_weights=True)[1].mean(-1)


class GraphClassifier(NodeClassifier):
    """A class for every graph of a batch: the mean over its nodes decides."""

    def forward(self, x: Tensor, graph: Graph, bonds: Tensor, of: Tensor, count: int) -> Tensor:  # type: ignore[override]
        h = self.nodes(x, graph, bonds)
        mean = h.new_zeros(count, h.shape[1]).index_add(0, of, h)
        return self.head(mean / torch.bincount(of, minlength=count)[:, None])
