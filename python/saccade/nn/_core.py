"""Attention on projected tensors, its output laid out for the projection that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..backends import run
from ..functional import attend_with_weights
from ..packed import packed_layout
from ..problem import Layout, Problem
from . import _checks, _extras
from ._masks import join, resolve_masks
from ._projections import extra_key, project_out
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


def options_of(module: Any, flags: tuple[bool, bool], seqlen_q: int, seqlen_k: int) -> Options:
    """The options of a module's call; `flags` is (need_weights, average_attn_weights)."""
    dropout_p = module.dropout if module.training else 0.0
    return Options(*flags, dropout_p, _extras.terms(module, seqlen_q, seqlen_k))


def attend_heads(
    module: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None],
    flags: tuple[bool, bool],
    is_causal: bool,
    mask: Any,
    first: bool,
) -> tuple[Tensor, Tensor | None]:
    """What follows the projections of q, k and v, [N, S, H, D] (`first`) or [S, N, H, D]: attention under
    torch's masks and ours, and the output's projection.
    """
    at = 1 if first else 0  # the dimension of the sequence
    batch, tgt_len, src_len = qkv[0].shape[1 - at], qkv[0].shape[at], qkv[1].shape[at]
    _checks.check_sizes(module, (batch, tgt_len, src_len), qkv[1], masks)
    own, bias = resolve_masks(masks, is_causal, (batch, module.num_heads), qkv[0].dtype)
    options = options_of(module, flags, tgt_len, src_len)
    q, k, v = (x.transpose(1, 2) if first else x.permute(1, 2, 0, 3) for x in qkv)
    out, weights = attend(
        (q, k, v), BATCH_FIRST if first else SEQ_FIRST, options,
        mask=join(own, _extras.get_window(module), mask), bias=bias, **extra_key(module),
    )  # fmt: skip
    rows = out.transpose(1, 2) if first else out.permute(2, 0, 1, 3)
    if weights is not None and module.activation == "softmax1":
        weights = weights[..., :-1]  # its zero column belongs to add_zero_attn alone
    return project_out(module, rows), weights


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
    layout = packed_layout(qkv[0], qkv[1], *lengths)
    return run(Problem.of(*qkv, mask, layout=layout, **given))[0]
