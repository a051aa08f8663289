"""`TransformerConv`, the twin of PyTorch Geometric's, without importing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..graph import Graph
from ._conv import AttentionConv, Channels, attend, both, check_arguments, edge_weights, index_of
from ._edges import Edges, edge_features, edge_logits, edges_of
from ._linear import linear, weight_of


class TransformerConv(AttentionConv):
    """`torch_geometric.nn.TransformerConv`, the graph transformer of UniMP (Shi et al., 2009.03509):

    out_i = W1 x_i + sum_j alpha_ij (W2 x_j + W6 e_ij),
    alpha_ij = softmax_j((W3 x_i) . (W4 x_j + W6 e_ij) / sqrt(C)).

    Args:
        in_channels: features of the nodes, or a pair (sources, targets); -1 takes them from the first input.
        out_channels, heads, concat, beta, dropout, edge_dim, bias, root_weight: PyTorch Geometric's.
    """

    def __init__(
        self,
        in_channels: Channels,
        out_channels: int,
        heads: int = 1,
        concat: bool = True,
        beta: bool = False,
        dropout: float = 0.0,
        edge_dim: int | None = None,
        bias: bool = True,
        root_weight: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_arguments(heads, kwargs)
        self.in_channels, self.out_channels, self.heads = in_channels, out_channels, heads
        self.beta, self.root_weight, self.concat = beta and root_weight, root_weight, concat
        self.dropout, self.edge_dim = dropout, edge_dim
        sources, targets = (in_channels, in_channels) if isinstance(in_channels, int) else in_channels
        width = heads * out_channels
        total = width if concat else out_channels
        self.lin_key = linear(sources, width, bias)
        self.lin_query = linear(targets, width, bias)
        self.lin_value = linear(sources, width, bias)
        self.lin_edge = None if edge_dim is None else linear(edge_dim, width, False)
        self.lin_skip = linear(targets, total, bias)
        self.lin_beta = linear(3 * total, 1, False) if self.beta else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values as PyTorch Geometric draws them."""
        for layer in (
            self.lin_key,
            self.lin_query,
            self.lin_value,
            self.lin_edge,
            self.lin_skip,
            self.lin_beta,
        ):
            if layer is not None:
                layer.reset_parameters()

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Tensor | Graph,
        edge_attr: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> Any:
        """out [N, heads * out_channels] (the mean over heads without `concat`) of x [N, F] or (sources,
        targets).

        `edge_attr` [E, edge_dim] belongs with `edge_dim`. With a bool for `return_attention_weights` the
        result is (out, (edge_index, alpha [E, heads])), alpha before dropout.
        """
        sources, targets = both(x)
        edges = edges_of(edge_index, (sources.shape[0], targets.shape[0]))
        query, key, value = (
            layer(n).unflatten(-1, (self.heads, self.out_channels))
            for layer, n in ((self.lin_query, targets), (self.lin_key, sources), (self.lin_value, sources))
        )
        features, terms = self._edge_terms(edges, edge_attr)
        p, seed = self._seed(query)
        wanted = isinstance(return_attention_weights, bool)
        out, lse = attend((query, key, value), edges.graph, wanted, dropout_p=p, seed=seed, **terms)
        out = self._with_root(self._together(out), targets)
        if lse is None:
            return out
        logits = edge_logits(self._logits, edges, (query, key), features)
        return out, (index_of(edge_index, edges), edge_weights(logits, lse, edges).to(out.dtype))

    def _edge_terms(self, edges: Edges, edge_attr: Tensor | None) -> tuple[Tensor | None, dict[str, Any]]:
        if self.lin_edge is None and edge_attr is None:
            return None, {}
        if self.lin_edge is None or edge_attr is None:
            given = "none" if edge_attr is None else "some"
            raise ValueError(f"edge_attr: a layer with edge_dim={self.edge_dim} was given {given}")
        features = edge_features(edges, edge_attr, 0.0)
        weight = weight_of(self.lin_edge, features)
        return features, {"edge_attr": (features, weight.unflatten(0, (self.heads, self.out_channels)))}

    def _logits(self, query: Tensor, key: Tensor, features: Tensor | None) -> Tensor:
        if self.lin_edge is not None:
            assert features is not None
            key = key + self.lin_edge(features).view_as(key)
        return (query * key).sum(-1) * self.out_channels**-0.5

    def _with_root(self, out: Tensor, targets: Tensor) -> Tensor:
        if not self.root_weight:
            return out
        root = self.lin_skip(targets)
        if self.lin_beta is None:
            return out + root
        share = self.lin_beta(torch.cat([out, root, out - root], -1)).sigmoid()
        return share * root + (1 - share) * out
