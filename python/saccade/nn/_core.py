"""Attention on projected tensors, its output laid out for the projection that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..backends import run
from ..functional import attend_with_weights, attention_varlen
from ..problem import Layout, Problem
from .positions import SinusoidalXL

BATCH_FIRST = Layout(out_order=(0, 2, 1, 3))  # [B, H, S, D] in memory as [B, S, H, D]
SEQ_FIRST = Layout(out_order=(2, 0, 1, 3))  # ... as [S, B, H, D]


@dataclass(slots=True)
class Options:
    """What of a forward does not depend on the layout of its inputs."""

    need_weights: bool
    average: bool
    dropout_p: float
    terms: dict[str, Any]  # activation, score, position of `saccade.attention`, where not the default


def attend(
    qkv: tuple[Tensor, Tensor, Tensor], layout: Layout, options: Options, **masks: Any
) -> tuple[Tensor, Tensor | None]:
    """(out [B, H, L, Dv], weights or None) of q [B, H, L, D], k and v [B, Hk, S, D], any strides."""
    q, k, v = qkv
    terms, position = options.terms, options.terms.get("position")
    if isinstance(position, SinusoidalXL) and "score" not in terms and q.element_size() > 2:
        # As a longer dot product it runs in every kernel. Half precision would round the angles' features.
        terms = {n: x for n, x in terms.items() if n != "position"} | {"scale": q.shape[-1] ** -0.5}
        q, k = position.expand(q, k)
    problem = Problem.of(q, k, v, layout=layout, dropout_p=options.dropout_p, **terms, **masks)
    if options.need_weights:
        return attend_with_weights(problem, options.average)
    return run(problem)[0], None


def attend_packed(
    qkv: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[Tensor, Tensor, int, int],
    options: Options,
    mask: Any,
    **extra: Any,
) -> Tensor:
    """out [total, H, Dv] of packed q, k, v; `lengths` is both cu_seqlens, then both max_seqlen."""
    given: dict[str, Any] = {**options.terms, **extra, "dropout_p": options.dropout_p}
    (q, k, v), (cu_q, cu_k, max_q, max_k) = qkv, lengths
    return attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, mask, **given)
