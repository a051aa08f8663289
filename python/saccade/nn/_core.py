"""Attention on projected tensors, its output laid out for the projection that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..backends import run
from ..functional import attend_with_weights, attention_varlen
from ..problem import Layout, Problem

BATCH_FIRST = Layout(out_order=(0, 2, 1, 3))  # [B, H, S, D] in memory as [B, S, H, D]
SEQ_FIRST = Layout(out_order=(2, 0, 1, 3))  # ... as [S, B, H, D]


@dataclass(slots=True)
class Options:
    """What of a forward does not depend on the layout of its inputs."""

    need_weights: bool
    average: bool
    dropout_p: float
    terms: dict[str, Any]  # activation, score, position of `saccade.attention`, where not the default


def attend(qkv: tuple[Tensor, Tensor, Tensor], layout: Layout, options: Options, **masks: Any) -> tuple[Tensor, Tensor | None]:
    """(out [B, H, L, Dv], weights or None) of q [B, H, L, D], k and v [B, Hk, S, D], any strides."""
    problem = Problem.of(*qkv, layout=layout, dropout_p=options.dropout_p, **options.terms, **masks)
    if options.need_weights:
        return attend_with_weights(problem, options.average)
    return run(problem)[0], None


def attend_packed(qkv: tuple[Tensor, Tensor, Tensor], lengths: tuple[Any, ...], options: Options, mask: Any, **extra: Any) -> Tensor:
    """out [total, H, Dv] of packed q, k, v; `lengths` is cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
    return attention_varlen(*qkv, *lengths, mask, dropout_p=options.dropout_p, **options.terms, **extra)
