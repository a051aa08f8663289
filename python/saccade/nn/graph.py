"""Attention along the edges of a graph, and a Transformer layer made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import int_at_least, probability
from ..functional import attention
from ..graph import Graph
from ..scores import Additive, GATv2
from ._edges import Edges, edge_features, edge_logits, edges_of

_SCORES = ("dot", "additive", "gatv2")
_ACTIVATIONS = ("softmax", "softmax1", "relu", "sigmoid")
_SLOPE = 0.2


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")


class GraphMultiheadAttention(nn.Module):
    """Multi-head attention in which node i attends to the sources of the edges that point to it.

    Args:
        embed_dim, num_heads: features of a node, and heads of embed_dim // num_heads (or `head_dim`)
            channels.
        dropout: probability of dropping a weight in training.
        bias: of the projections.
        kdim, vdim: features of the keys' and values' nodes, where they are others.
        num_kv_heads: fewer key and value heads.
        edge_dim: features of an edge.
        edge_mode: "value": W e joins the edge's key and value, as in TransformerConv (2009.03509; dot score);
            "bias": w . e joins its logit, as in Graphormer (2106.05234).
        score: "dot", "additive" or "gatv2", the latter with a weight [H, D] of their own.
        activation: "softmax", "softmax1", "relu" or "sigmoid".

    Parameters: q_proj, k_proj, v_proj, out_proj; edge_proj and score_weight where asked for. Raises
    ValueError naming the argument.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        edge_dim: int | None = None,
        edge_mode: str = "value",
        score: str = "dot",
        activation: str = "softmax",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _one_of("edge_mode", edge_mode, ("value", "bias"))
        _one_of("score", score, _SCORES)
        _one_of("activation", activation, _ACTIVATIONS)
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if embed_dim < 1 or num_heads < 1 or self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(
                "num_heads: expected at least 1, a multiple of num_kv_heads, "
                f"got {num_heads} and {num_kv_heads}"
            )
        if head_dim is not None:
            int_at_least("head_dim", head_dim, 1)
        probability("dropout", dropout)
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"num_heads: expected to divide embed_dim {embed_dim}, got {num_heads}")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.edge_dim, self.edge_mode, self.score, self.activation = edge_dim, edge_mode, score, activation
        if edge_dim is not None and edge_mode == "value" and score != "dot":
            raise ValueError(f'edge_mode: "value" needs the dot score, got {score!r}; take "bias"')
        factory = {"device": device, "dtype": dtype}
        width, width_k = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, width, bias, **factory)
        self.k_proj = nn.Linear(kdim or embed_dim, width_k, bias, **factory)
        self.v_proj = nn.Linear(vdim or kdim or embed_dim, width_k, bias, **factory)
        self.out_proj = nn.Linear(width, embed_dim, bias, **factory)
        edge_width = width if edge_mode == "value" else num_heads
        self.edge_proj = None if edge_dim is None else nn.Linear(edge_dim, edge_width, False, **factory)
        needs_weight = score != "dot"
        self.score_weight = (
            nn.Parameter(torch.empty(num_heads, self.head_dim, **factory)) if needs_weight else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot weights, zero biases."""
        for name, p in self.named_parameters():
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.xavier_uniform_(p)

    def forward(
        self,
        query: Tensor,
        edge_index: Tensor | Graph,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        edge_attr: Tensor | None = None,
        edge_bias: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        """out [N, embed_dim], or [B, N, embed_dim] where one graph holds for a batch of features.

        `edge_index` is a `saccade.Graph` or [2, E] (row 0 the sources, whose keys are read; row 1 the
        targets, whose queries ask). `key` defaults to `query`, `value` to `key`. `edge_attr` [E, edge_dim]
        needs edge_dim; `edge_bias` [E] or [H, E] joins the logits. With `need_weights` also the weights of
        the edges [E, H] (or [B, E, H]), before dropout.
        """
        key = query if key is None else key
        value = key if value is None else value
        edges = edges_of(edge_index, (key.shape[-2], query.shape[-2]))
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2) for x in (q, k, v))
        terms = self._terms(edges, edge_attr, edge_bias)
        wants_lse = need_weights and self.activation.startswith("softmax")
        found = attention(
            q, k, v, edges.graph, score=self._score(), activation=self.activation, return_lse=wants_lse,
            dropout_p=self.dropout if self.training else 0.0, **terms,
        )  # fmt: skip
        out, lse = found if wants_lse else (found, None)
        out = self.out_proj(out.transpose(-3, -2).flatten(-2))
        return (out, self._weights(edges, (q, k), lse, terms)) if need_weights else out

    def _score(self) -> Any:
        if self.score_weight is None:
            return "dot"
        return Additive(self.score_weight) if self.score == "additive" else GATv2(self.score_weight, _SLOPE)

    def _terms(self, edges: Edges, edge_attr: Tensor | None, edge_bias: Tensor | None) -> dict[str, Any]:
        if (edge_attr is None) != (self.edge_proj is None):
            given = "none" if edge_attr is None else "some"
            raise ValueError(f"edge_attr: a module with edge_dim={self.edge_dim} was given {given}")
        if edge_attr is None or self.edge_proj is None:
            return {"edge_bias": edge_bias}
        features = edge_features(edges, edge_attr, 0.0)
        if features.shape[1] != self.edge_dim:
            raise ValueError(
                f"edge_attr: expected {self.edge_dim} features of each edge, got {features.shape[1]}"
            )
        if self.edge_mode == "value":
            weight = self.edge_proj.weight.unflatten(0, (self.num_heads, self.head_dim))
            return {"edge_bias": edge_bias, "edge_attr": (features, weight)}
        learned = self.edge_proj(features).t()
        return {"edge_bias": learned if edge_bias is None else learned + edge_bias}

    def _weights(
        self, edges: Edges, qk: tuple[Tensor, Tensor], lse: Tensor | None, terms: dict[str, Any]
    ) -> Tensor:
        if qk[0].dim() == 4:
            rows = [
                self._weights(edges, (q, k), None if lse is None else lse[b], terms)
                for b, (q, k) in enumerate(zip(*qk, strict=True))
            ]
            if not rows:
                return qk[0].sum((-1, -2))[:, None].expand(0, edges.pairs[0].numel(), self.num_heads)
            return torch.stack(rows)
        q, k = (x.transpose(0, 1) for x in qk)
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, 1)
        attr = terms.get("edge_attr")
        logits = edge_logits(self._logits, edges, (q, k), None if attr is None else attr[0])
        if terms["edge_bias"] is not None:
            bias = terms["edge_bias"]
            logits = logits + (bias[:, None] if bias.dim() == 1 else bias.t())
        if lse is not None:
            return torch.exp(logits - lse.t()[edges.pairs[1]]).to(q.dtype)
        return torch.relu(logits) if self.activation == "relu" else torch.sigmoid(logits)

    def _logits(self, q: Tensor, k: Tensor, features: Tensor | None) -> Tensor:
        if features is not None and self.edge_proj is not None:
            k = k + self.edge_proj(features).view_as(k)
        if self.score_weight is None:
            return (q * k).sum(-1) * self.head_dim**-0.5
        joint = torch.tanh(q + k) if self.score == "additive" else F.leaky_relu(q + k, _SLOPE)
        return (joint * self.score_weight).sum(-1)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, edge_dim={self.edge_dim}"


class GraphTransformerLayer(nn.Module):
    """Attention along edges, then a feed-forward network, each with a residual and a norm (Dwivedi and
    Bresson, 2012.09699, in the shape of nn.TransformerEncoderLayer).

    Args:
        d_model, nhead: features of a node, heads.
        dim_feedforward: width of the feed-forward network; default 2 * d_model, as in that paper.
        dropout: after attention and in the feed-forward network; `attention_dropout` is that of the weights.
        activation: of the feed-forward network.
        norm: "layer" or "batch" (over nodes).
        norm_first: normalise what enters a block instead of what leaves it.
        attention: further arguments of `GraphMultiheadAttention`: edge_dim, edge_mode, score, ...
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        activation: Callable[[Tensor], Tensor] = F.relu,
        *,
        attention_dropout: float = 0.0,
        norm: str = "layer",
        norm_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        _one_of("norm", norm, ("layer", "batch"))
        factory = {"device": device, "dtype": dtype}
        width = 2 * d_model if dim_feedforward is None else dim_feedforward
        self.self_attn = GraphMultiheadAttention(d_model, nhead, attention_dropout, **attention, **factory)
        self.linear1, self.linear2 = (
            nn.Linear(d_model, width, **factory),
            nn.Linear(width, d_model, **factory),
        )
        made = nn.LayerNorm if norm == "layer" else _NodeNorm
        self.norm1, self.norm2 = made(d_model, **factory), made(d_model, **factory)
        self.dropout, self.activation, self.norm_first = nn.Dropout(dropout), activation, norm_first

    def forward(self, x: Tensor, edge_index: Tensor | Graph, edge_attr: Tensor | None = None) -> Tensor:
        """[N, d_model] (or [B, N, d_model]) to the same; arguments as in `GraphMultiheadAttention`."""
        if self.norm_first:
            x = x + self._attend(self.norm1(x), edge_index, edge_attr)
            return x + self._feed(self.norm2(x))
        x = self.norm1(x + self._attend(x, edge_index, edge_attr))
        return self.norm2(x + self._feed(x))

    def _attend(self, x: Tensor, edge_index: Tensor | Graph, edge_attr: Tensor | None) -> Tensor:
        return self.dropout(self.self_attn(x, edge_index, edge_attr=edge_attr))

    def _feed(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class _NodeNorm(nn.BatchNorm1d):
    """Batch norm over all nodes of [..., N, F]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)
