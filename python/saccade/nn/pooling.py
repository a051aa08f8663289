"""One vector of a sequence by attention, and a loss that keeps the vectors of classes apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..checks import int_at_least
from ..functional import attention
from ..masks import KeyPadding
from ._asked import check_padding, check_shape


class SelfAttentionPooling(nn.Module):
    """Self-attention pooling (Safari, India, Hernando: 2008.01077): of a sequence H, with a learned vector w,

        E = softmax(w H^T) H

    the attention of one query over keys and values that are the same tensor. With `num_queries` n there are n
    such vectors (pooling by multihead attention of 1810.00825 without its projections), joined in the result.

    forward: x [N, S, d_model], padding bool [N, S] (True = padding) -> [N, num_queries * d_model], in x's
    dtype. Padding is not seen; a sequence of padding alone gives zeros. `weights` are [N, num_queries, S].
    """

    def __init__(self, d_model: int, num_queries: int = 1, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.d_model = int_at_least("d_model", d_model, 1)
        size = (int_at_least("num_queries", num_queries, 1), d_model)
        self.query = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        nn.init.normal_(self.query, std=d_model**-0.5)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """x [N, S, d_model], padding bool [N, S] (True = padding) -> [N, num_queries * d_model]."""
        mask = self._mask(x, padding)
        query = self.query.to(x.dtype).expand(x.shape[0], 1, -1, -1)
        return attention(query, x[:, None], x[:, None], mask, scale=1.0).flatten(1)

    @torch.no_grad()
    def weights(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """[N, num_queries, S]: what each frame counts, for pictures."""
        self._mask(x, padding)
        scores = self.query.to(x.dtype) @ x.transpose(1, 2)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None], -torch.inf)
        return torch.softmax(scores, -1).nan_to_num(0.0)

    def _mask(self, x: Tensor, padding: Tensor | None) -> KeyPadding | None:
        check_shape("x", x, f"[N, S, {self.d_model}]", (3,), self.d_model)
        check_padding("padding", padding, *x.shape[:2])
        return None if padding is None else KeyPadding(keep=~padding)


class AdditiveMarginSoftmax(nn.Module):
    """The additive margin softmax loss (Wang et al., 1801.05599): with both vectors of length 1,

        L = -log(e^(s (cos_y - m)) / (e^(s (cos_y - m)) + sum over j != y of e^(s cos_j)))

    Args:
        d_model, num_classes: `weight` is [num_classes, d_model], one vector per class.
        scale, margin: s and m; the paper's 30 and 0.35.
        chunk: classes at a time. The logits [N, num_classes] are then never written, forward or backward: for
            very many classes.

    forward(x [N, d_model], target [N] int64) -> the mean loss, a scalar. `logits(x)` are s cos [N,
    num_classes], without a margin: what to predict from.
    """

    def __init__(
        self,
        d_model: int,
        num_classes: int,
        scale: float = 30.0,
        margin: float = 0.35,
        *,
        chunk: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.d_model, self.num_classes = (
            int_at_least("d_model", d_model, 1),
            int_at_least("num_classes", num_classes, 1),
        )
        self.scale, self.margin = scale, margin
        self.chunk = None if chunk is None else int_at_least("chunk", chunk, 1)
        self.weight = nn.Parameter(torch.empty(num_classes, d_model, device=device, dtype=dtype))
        nn.init.xavier_normal_(self.weight)

    def logits(self, x: Tensor) -> Tensor:
        """s cos(x, weight_j), [N, num_classes]."""
        check_shape("x", x, f"[N, {self.d_model}]", (2,), self.d_model)
        return self.scale * F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=-1).t()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """x [N, d_model], target [N] ints -> the mean loss, a scalar."""
        check_shape("x", x, f"[N, {self.d_model}]", (2,), self.d_model)
        if target.shape != x.shape[:1] or target.is_floating_point():
            raise ValueError(f"target: expected ints [{x.shape[0]}], got {target.dtype} {list(target.shape)}")
        if self.chunk is not None:
            return self._chunked(x, target)
        logits = self.logits(x)
        margin = torch.zeros_like(target[:, None], dtype=logits.dtype).fill_(-self.scale * self.margin)
        return F.cross_entropy(logits.scatter_add(1, target[:, None], margin), target)

    def _chunked(self, x: Tensor, target: Tensor) -> Tensor:
        unit, weight = F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1)
        own = self.scale * ((unit * weight.index_select(0, target)).sum(-1) - self.margin)
        parts = []
        assert self.chunk is not None
        for first in range(0, self.num_classes, self.chunk):
            part = weight[first : first + self.chunk]
            # Only the sums are kept; the logits of a chunk are computed again in the backward pass.
            inputs = (self.scale * unit, part, target - first)
            parts.append(checkpoint(_log_sum_others, *inputs, use_reentrant=False))
        # log((e^own + e^others) / e^own), with all its digits where it is small.
        return F.softplus(torch.stack(parts).logsumexp(0) - own).mean()

    def extra_repr(self) -> str:
        return f"{self.d_model}, {self.num_classes}, scale={self.scale}, margin={self.margin}"


def _log_sum_others(unit: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """log of the sum of exp(unit . weight_j) over all j but the target, [N]."""
    hidden = torch.arange(weight.shape[0], device=weight.device) == target[:, None]
    # A row whose only class is its own adds nothing; -inf would make its gradient NaN.
    logits = unit @ weight.t()
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min).logsumexp(-1)
