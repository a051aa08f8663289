"""What the twins of PyTorch Geometric's attention convolutions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import int_at_least
from ..dropout import as_seed, kept
from ..functional import attention
from ..graph import Graph
from ._edges import Edges

Channels = int | tuple[int, int]
_MESSAGE_PASSING = {
    "aggr": ("add", "sum"), "flow": ("source_to_target",), "node_dim": (0,), "decomposed_layers": (1,),
    "aggr_kwargs": (None,),
}  # fmt: skip


def check_arguments(heads: object, given: dict[str, Any]) -> None:
    """The number of heads, and what of MessagePassing's own arguments means attention as it is written
    here.
    """
    int_at_least("heads", heads, 1)
    for name, value in given.items():
        if name not in _MESSAGE_PASSING:
            raise TypeError(f"{name}: unexpected argument")
        if value not in _MESSAGE_PASSING[name]:
            hint = "; give edge_index.flip(0)" if name == "flow" else ""
            raise NotImplementedError(
                f"{name}: these convolutions have {_MESSAGE_PASSING[name][0]!r} only, got {value!r}{hint}"
            )


def node_features(x: Any, name: str = "x") -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor [N, F] or a pair of them, got {type(x).__name__}")
    if x.dim() != 2:
        raise ValueError(f"{name}: expected shape [N, F], got {list(x.shape)}")
    return x


def both(x: Any) -> tuple[Tensor, Tensor]:
    """(x of the sources, x of the targets)."""
    if isinstance(x, tuple | list):
        if len(x) != 2:
            raise ValueError(f"x: expected a pair (sources, targets), got {len(x)} entries")
        return node_features(x[0], "x[0]"), node_features(x[1], "x[1]")
    return node_features(x), x


def by_head(x: Tensor) -> Tensor:
    """[N, H, C] as [H, N, C]."""
    return x.transpose(0, 1)


def attend(
    qkv: tuple[Tensor, Tensor, Tensor], graph: Graph, return_lse: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """(out [H, N, Dv], lse [H, N] or None) of q, k, v [n, H, D]."""
    q, k, v = map(by_head, qkv)
    if return_lse:
        return attention(q, k, v, graph, return_lse=True, **options)
    return attention(q, k, v, graph, **options), None


def edge_weights(logits: Tensor, lse: Tensor, edges: Edges) -> Tensor:
    """[E, H]: the softmax of logits [E, H] over the edges of each target, whose lse [H, N] is known."""
    return torch.exp(logits - lse.t()[edges.pairs[1]])


def dropped(alpha: Tensor, edges: Edges, p: float, seed: Tensor | None) -> Tensor:
    """Weights of edges [E, H] after the dropout that the kernel applies with this seed."""
    if seed is None:
        return alpha
    sources, targets = edges.pairs
    heads = torch.arange(alpha.shape[1], device=alpha.device)
    stays = kept(seed, p, torch.zeros_like(heads), heads, targets[:, None], sources[:, None])
    return torch.where(stays, alpha / (1 - p), 0.0) if p < 1 else alpha * 0.0


class AttentionConv(nn.Module):
    """Heads, dropout and the joining of heads."""

    in_channels: Channels
    out_channels: int
    heads: int
    concat: bool
    dropout: float

    def _seed(self, x: Tensor) -> tuple[float, Tensor | None]:
        p = float(self.dropout) if self.training else 0.0
        return p, as_seed(None, x.device) if p else None

    def _together(self, out: Tensor) -> Tensor:
        """[H, N, C] to [N, H C], or to the mean over heads [N, C]."""
        out = out.transpose(0, 1)
        return out.flatten(1) if self.concat else out.mean(1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels}, heads={self.heads})"


def index_of(edge_index: Tensor | Graph, edges: Edges) -> Tensor:
    """[2, E'] as the weights are numbered: the caller's own tensor where no loops were added."""
    if isinstance(edge_index, Tensor) and edge_index.layout == torch.strided and edges.kept is None:
        return edge_index
    return torch.stack(edges.pairs)
