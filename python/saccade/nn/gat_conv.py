"""`GATConv` and `GATv2Conv`, the twins of PyTorch Geometric's, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends import cpu, triton
from ..graph import Graph
from ..scores import GATv2
from ._conv import (
    AttentionConv,
    Channels,
    attend,
    both,
    check_arguments,
    dropped,
    edge_weights,
    index_of,
    node_features,
)
from ._edges import Edges, edge_features, edge_logits, edges_of
from ._linear import Linear, glorot, linear, weight_of


class GATBase(AttentionConv):
    """Scores made of a nonlinearity; loops; a residual."""

    negative_slope: float
    add_self_loops: bool
    edge_dim: int | None
    fill_value: float | Tensor | str
    bias: nn.Parameter | None
    res: Linear | None
    lin_edge: Linear | None

    def _set(self, in_channels: Channels, out_channels: int, heads: int, concat: bool, slope: float) -> None:
        self.in_channels, self.out_channels, self.heads = in_channels, out_channels, heads
        self.concat, self.negative_slope = concat, slope

    def _residual(self, targets: Tensor | None) -> Tensor | None:
        # First of all layers, so that lazy ones draw their initial values in PyTorch Geometric's order.
        return None if self.res is None or targets is None else self.res(targets)

    def _finish(self, out: Tensor, residual: Tensor | None) -> Tensor:
        out = self._together(out)
        out = out if residual is None else out + residual
        return out if self.bias is None else out + self.bias

    def _attend(self, score: dict[str, Any], values: Tensor, edges: Edges, wanted: bool) -> Any:
        """(out [H, N, C], lse or None, dropout and its seed)."""
        p, seed = self._seed(values)
        qkv = (score.pop("q"), score.pop("k"), values)
        return (*attend(qkv, edges.graph, wanted, dropout_p=p, seed=seed, **score), (p, seed))

    def _weights(
        self, logits: Callable[[], Tensor], score: dict[str, Any], lse: Tensor, edges: Edges, drop: Any
    ) -> Tensor:
        bias = score.get("edge_bias")  # the logits, where they are computed already
        known = logits() if bias is None else bias.t()
        return dropped(edge_weights(known, lse, edges).to(known.dtype), edges, *drop)

    def _score(
        self,
        rows: tuple[Tensor, Tensor],
        weight: Tensor,
        joined: tuple[Tensor, Tensor] | None,
        logits: Callable[[], Tensor],
    ) -> dict[str, Any]:
        """w . leaky_relu(q + k + W e) of q and k [n, H, D] for `attention`; `joined` is e and W, or None.

        Where no kernel joins them, `logits` become the bias of each edge, on queries and keys of zeros.
        """
        if joined is None or _joins_features(rows[0]):
            return {"q": rows[0], "k": rows[1], "score": GATv2(weight, self.negative_slope, joined)}
        q, k = (x.new_zeros(x.shape[0], self.heads, 1) for x in rows)
        return {"q": q, "k": k, "edge_bias": logits().t()}


def _joins_features(x: Tensor) -> bool:
    """The kernels of these backends form W e edge by edge; the reference would hold it for all edges."""
    return not (cpu.missing() if x.device.type == "cpu" else triton.reasons_against(x.device))


def _total_width(out_channels: int, heads: int, concat: bool) -> int:
    return out_channels * (heads if concat else 1)


class GATConv(GATBase):
    """`torch_geometric.nn.GATConv`, graph attention (Velickovic et al., 1710.10903):

    out_i = sum_j alpha_ij W x_j, alpha = softmax_j(leaky_relu(a_s . W x_j + a_t . W x_i + a_e . W_e e_ij)).

    The score is GATv2's with one channel, so the kernels serve it, and edge features join it there. On
    devices without kernels the logits [E, H] are computed beforehand. Arguments are PyTorch Geometric's.
    """

    def __init__(
        self,
        in_channels: Channels,
        out_channels: int,
        heads: int = 1,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        add_self_loops: bool = True,
        edge_dim: int | None = None,
        fill_value: float | Tensor | str = "mean",
        bias: bool = True,
        residual: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_arguments(heads, kwargs)
        self._set(in_channels, out_channels, heads, concat, negative_slope)
        self.dropout, self.add_self_loops, self.edge_dim = dropout, add_self_loops, edge_dim
        self.fill_value, self.residual = fill_value, residual
        width, total = heads * out_channels, _total_width(out_channels, heads, concat)
        self.lin: Linear | None = None
        self.lin_src: Linear | None = None
        self.lin_dst: Linear | None = None
        if isinstance(in_channels, int):
            self.lin = linear(in_channels, width, False, "glorot")
        else:
            self.lin_src = linear(in_channels[0], width, False, "glorot")
            self.lin_dst = linear(in_channels[1], width, False, "glorot")
        self.att_src = nn.Parameter(torch.empty(1, heads, out_channels))
        self.att_dst = nn.Parameter(torch.empty(1, heads, out_channels))
        self.lin_edge = None if edge_dim is None else linear(edge_dim, width, False, "glorot")
        self.att_edge = None if edge_dim is None else nn.Parameter(torch.empty(1, heads, out_channels))
        targets = in_channels if isinstance(in_channels, int) else in_channels[1]
        self.res = linear(targets, total, False, "glorot") if residual else None
        self.bias = nn.Parameter(torch.empty(total)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values as PyTorch Geometric draws them."""
        for layer in (self.lin, self.lin_src, self.lin_dst, self.lin_edge, self.res):
            if layer is not None:
                layer.reset_parameters()
        for weight in (self.att_src, self.att_dst, self.att_edge):
            glorot(weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor | None],
        edge_index: Tensor | Graph,
        edge_attr: Tensor | None = None,
        size: tuple[int, int] | None = None,
        return_attention_weights: bool | None = None,
    ) -> Any:
        """out [N, heads * out_channels] (the mean over heads without `concat`) of x [N, F] or (sources,
        targets).

        The targets may be None: then they have no share in the score, and `size` (sources, targets) says how
        many there are. With a true `return_attention_weights` the result is (out, (edge_index, alpha [E,
        heads])), self-loops included, alpha after dropout.
        """
        residual = self._residual(x[1] if isinstance(x, tuple | list) else x)
        sources, targets = self._project(x)
        count = sources.shape[0] if size is None else size[1]
        count = count if targets is None else targets.shape[0]
        if size is not None and tuple(size) != (sources.shape[0], count):
            raise ValueError(f"size: expected {(sources.shape[0], count)} as in x, got {tuple(size)}")
        edges = edges_of(edge_index, (sources.shape[0], count), self.add_self_loops)
        key = (sources * self.att_src).sum(-1, keepdim=True)  # [N, H, 1]
        query = key.new_zeros(count, self.heads, 1)
        if targets is not None:
            query = (targets * self.att_dst).sum(-1, keepdim=True)
        wanted = bool(return_attention_weights)
        joined = None if edge_attr is None else self._features(edges, edge_attr)

        def logits() -> Tensor:
            return self._logits(query, key, edges, joined)

        score = self._score((query, key), key.new_ones(self.heads, 1), joined, logits)
        out, lse, drop = self._attend(score, sources, edges, wanted)
        out = self._finish(out, residual)
        if not wanted:
            return out
        return out, (index_of(edge_index, edges), self._weights(logits, score, lse, edges, drop))

    def _project(self, x: Any) -> tuple[Tensor, Tensor | None]:
        """W x [N, H, C] of the sources and of the targets."""
        if isinstance(x, tuple | list):
            sources, targets = (
                node_features(x[0], "x[0]"),
                None if x[1] is None else node_features(x[1], "x[1]"),
            )
        else:
            sources = targets = node_features(x)
        shape = (self.heads, self.out_channels)
        if self.lin is not None:
            first = self.lin(sources).unflatten(-1, shape)
            if targets is sources:
                return first, first
            second = None if targets is None else self.lin(targets).unflatten(-1, shape)
            return first, second
        assert self.lin_src is not None and self.lin_dst is not None
        first = self.lin_src(sources).unflatten(-1, shape)
        return first, None if targets is None else self.lin_dst(targets).unflatten(-1, shape)

    def _features(self, edges: Edges, edge_attr: Tensor) -> tuple[Tensor, Tensor] | None:
        """e [E', De] and W_e^T a_e [H, 1, De], since a_e . (W_e e) = (W_e^T a_e) . e."""
        if self.lin_edge is None:
            return None
        assert self.att_edge is not None
        e = edge_features(edges, edge_attr, self.fill_value)
        weight = weight_of(self.lin_edge, e).unflatten(0, (self.heads, self.out_channels))
        return e, torch.einsum("hcd,hc->hd", weight, self.att_edge[0])[:, None]

    def _logits(
        self, query: Tensor, key: Tensor, edges: Edges, joined: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        sources, targets = edges.pairs
        logits = query[targets, :, 0] + key[sources, :, 0]
        if joined is not None:
            logits = logits + joined[0] @ joined[1][:, 0].t()
        return F.leaky_relu(logits, self.negative_slope)


class GATv2Conv(GATBase):
    """`torch_geometric.nn.GATv2Conv` (Brody, Alon, Yahav: 2105.14491):

    out_i = sum_j alpha_ij W_l x_j, alpha = softmax_j(a . leaky_relu(W_l x_j + W_r x_i + W_e e_ij)).

    With edge features the score does not split into parts of query, key and edge: the kernels for CPUs and
    GPUs form W_e e edge by edge, nothing of size E x H x C is held. On devices without kernels the logits
    [E, H] are computed in plain torch, a chunk of edges at a time. Arguments are PyTorch Geometric's.
    """

    def __init__(
        self,
        in_channels: Channels,
        out_channels: int,
        heads: int = 1,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        add_self_loops: bool = True,
        edge_dim: int | None = None,
        fill_value: float | Tensor | str = "mean",
        bias: bool = True,
        share_weights: bool = False,
        residual: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_arguments(heads, kwargs)
        self._set(in_channels, out_channels, heads, concat, negative_slope)
        self.dropout, self.add_self_loops, self.edge_dim = dropout, add_self_loops, edge_dim
        self.fill_value, self.residual, self.share_weights = fill_value, residual, share_weights
        sources, targets = (in_channels, in_channels) if isinstance(in_channels, int) else in_channels
        width, total = heads * out_channels, _total_width(out_channels, heads, concat)
        self.lin_l = linear(sources, width, bias, "glorot")
        self.lin_r = self.lin_l if share_weights else linear(targets, width, bias, "glorot")
        self.att = nn.Parameter(torch.empty(1, heads, out_channels))
        self.lin_edge = None if edge_dim is None else linear(edge_dim, width, False, "glorot")
        self.res = linear(targets, total, False, "glorot") if residual else None
        self.bias = nn.Parameter(torch.empty(total)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values as PyTorch Geometric draws them."""
        for layer in (self.lin_l, self.lin_r, self.lin_edge, self.res):
            if layer is not None:
                layer.reset_parameters()
        glorot(self.att)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Tensor | Graph,
        edge_attr: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> Any:
        """out [N, heads * out_channels] (the mean over heads without `concat`) of x [N, F] or (sources,
        targets).

        With a true `return_attention_weights` the result is (out, (edge_index, alpha [E, heads])), self-loops
        included, alpha after dropout.
        """
        sources, targets = both(x)
        if edge_attr is not None and self.lin_edge is None:
            raise ValueError("edge_attr: a layer with edge_dim=None was given some")
        residual = self._residual(targets)
        edges = edges_of(edge_index, (sources.shape[0], targets.shape[0]), self.add_self_loops)
        shape = (self.heads, self.out_channels)
        left = self.lin_l(sources).unflatten(-1, shape)
        shared = self.share_weights and targets is sources
        right = left if shared else self.lin_r(targets).unflatten(-1, shape)
        features = None if edge_attr is None else edge_features(edges, edge_attr, self.fill_value)
        wanted, joined = bool(return_attention_weights), None
        if features is not None and self.lin_edge is not None:
            joined = features, weight_of(self.lin_edge, features).unflatten(0, shape)

        def logits() -> Tensor:
            return edge_logits(self._logits, edges, (right, left), features)

        score = self._score((right, left), self.att[0], joined, logits)
        out, lse, drop = self._attend(score, left, edges, wanted)
        out = self._finish(out, residual)
        if not wanted:
            return out
        return out, (index_of(edge_index, edges), self._weights(logits, score, lse, edges, drop))

    def _logits(self, right: Tensor, left: Tensor, features: Tensor | None) -> Tensor:
        joint = right + left
        if features is not None:
            assert self.lin_edge is not None
            joint = joint + self.lin_edge(features).view_as(joint)
        return (F.leaky_relu(joint, self.negative_slope) * self.att).sum(-1)
