"""The public functions: options become a checked `Problem`, a backend runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backends
from .autograd_weights import attention_weights
from .masks import Causal, KeyPadding, Mask
from .packed import cache_layout, packed_layout
from .position import Position
from .problem import Options, Problem, accumulator, check_options
from .scores import Additive, GATv2

if TYPE_CHECKING:
    from typing_extensions import Unpack

Result = Tensor | tuple[Tensor, Tensor]
_CAUSAL_FROM_START = Causal(align="start")


def attention(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    causal: bool = False,
    window: tuple[Any, Any] | None = None,
    bias: Tensor | None = None,
    edge_bias: Tensor | None = None,
    edge_attr: tuple[Tensor, Tensor] | None = None,
    position: Position | None = None,
    scale: float | None = None,
    score: str | Additive | GATv2 = "dot",
    activation: str = "softmax",
    sink: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Any:
    """Attention of `q` [B, H, Sq, D] over `k` [B, Hk, Sk, D] and `v` [B, Hk, Sk, Dv], or without the batch
    dimension.

    Hk divides H; head h reads key head h // (H // Hk). fp64, fp32, bf16, fp16; any strides. Queries are
    aligned with the end of the keys. A row that keeps no key gives 0 (lse -inf) and zero gradients.

    Args:
        mask: which pairs are kept: Causal, Window, Band, KeyPadding, Segments, Chunks, Graph, joined with
            `&`.
        causal, window: joined to `mask` as Causal() and Window(*window).
        bias: float, broadcasts to [B, H, Sq, Sk]; added to the logits; -inf masks its pair.
        edge_bias: [E] or [H, E], added to the logit of each edge of the mask's Graph; of several graphs
            joined with `&`, E counts the edges of the first.
        edge_attr: (e [E, De], W [H, D, De]): logits take q.(k + W e), outputs v + W e (TransformerConv of
            2009.03509).
        position: ALiBi, T5, Shaw, TransformerXL or RoPE.
        scale: default D ** -0.5, and 1 for the additive scores.
        score: "dot", Additive(weight) or GATv2(weight, slope), which take edge features themselves.
        activation: "softmax", "relu", "sigmoid", or "softmax1" (a sink of 0).
        sink: [H]: exp(sink_h) joins the row's denominator.
        softcap: logits become softcap * tanh(logits / softcap) before bias and position are added.
        dropout_p, seed: weights that `dropout_mask(seed, dropout_p, ...)` drops are 0, the others divided by
            1 - dropout_p. Without a seed one is drawn from torch's generator of the device.
        return_lse: also return the log-sum-exp of each row, [B, H, Sq], fp32 (fp64 for fp64).
        deterministic: None follows torch.are_deterministic_algorithms_enabled().
        backend: None for the best that can, or a name of `saccade.backends()`.

    Returns:
        [B, H, Sq, Dv] in q's dtype, laid out in memory as q; with `return_lse` a pair.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or value, by name.
        NotImplementedError: no backend, or not the named one, can run this; with each one's reasons.
    """
    problem = Problem.of(
        q, k, v, mask, causal=causal, window=window, bias=bias, edge_bias=edge_bias, edge_attr=edge_attr,
        position=position, scale=scale, score=score, activation=activation, sink=sink, softcap=softcap,
        dropout_p=dropout_p, seed=seed, return_lse=return_lse, deterministic=deterministic,
    )  # fmt: skip
    return finish(problem, backend, return_lse)


def finish(problem: Problem, backend: str | None, return_lse: bool) -> Any:
    """Run a problem and give its results the shape of the caller's tensors."""
    out, lse = backends.run(problem, backend)
    if not problem.batched:
        out = out.squeeze(0)
    if not return_lse:
        return out
    lse = lse.to(accumulator(out.dtype))  # kernels keep it in fp64 for their own backward pass
    return out, lse if problem.batched else lse.squeeze(0)


def attend_with_weights(
    problem: Problem, average: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """(out, weights) of a dense problem: weights [B, H, Sq, Sk'] after dropout, or [B, Sq, Sk'] averaged over
    heads.

    Sk' counts Sk keys, then the extra key, then the zero column of softmax1. Both outputs have derivatives.
    """
    module = backends.choose(problem, backend)
    if hasattr(module, "run_with_weights"):
        return module.run_with_weights(problem, average)
    out, lse = module.run(problem)
    return out, attention_weights(problem, lse, average)


def attention_varlen(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    mask: Mask | None = None,
    *,
    return_lse: bool = False,
    backend: str | None = None,
    **options: Unpack[Options],
) -> Any:
    """Attention of packed sequences: `q` [total_q, H, D], `k` [total_k, Hk, D], `v` [total_k, Hk, Dv].

    Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]; both `cu_seqlens` are [B + 1] ints from 0 to the
    totals, and no sequence is longer than its `max_seqlen`. On the CPU this is checked (ValueError); on a GPU
    it is the caller's promise. `options` are those of `attention`; `bias` and a Graph serve dense calls only
    (pack graphs with Graph.batch). Returns [total_q, H, Dv], with `return_lse` also lse [H, total_q].
    """
    check_options("attention_varlen", options)
    layout = packed_layout(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    problem = Problem.of(q, k, v, mask, layout=layout, return_lse=return_lse, **options)
    return finish(problem, backend, return_lse)


def attention_decode(  # noqa: PLR0913
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    page_table: Tensor | None = None,
    beam: Tensor | None = None,
    mask: Mask | None = None,
    *,
    return_lse: bool = False,
    backend: str | None = None,
    **options: Unpack[Options],
) -> Any:
    """Attention of few queries `q` [B, H, Sq, D] over a cache of which sequence b uses `lengths[b]` keys ([B]
    ints).

    The cache is [B, Hk, S, D] (values [B, Hk, S, Dv]); with `page_table` [B, pages] ints it is [num_pages,
    Hk, page_size, D] and key j of sequence b lies in page `page_table[b, j // page_size]`; with `beam` [B, S]
    ints key j of sequence b is read from cache row `beam[b, j]`. Queries are aligned with the end of the keys
    in use. Lengths are checked on the CPU and clamped on a GPU. `options` are those of `attention`, but for
    `bias` and a Graph. Returns [B, H, Sq, Dv], with `return_lse` also lse [B, H, Sq].
    """
    check_options("attention_decode", options)
    layout = cache_layout(q, k_cache, lengths, page_table, beam)
    problem = Problem.of(q, k_cache, v_cache, mask, layout=layout, return_lse=return_lse, **options)
    return finish(problem, backend, return_lse)


def scaled_dot_product_attention(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: same arguments, same meaning (is_causal is
    top-left).
    """
    _check_sdpa(query, key, value, attn_mask, enable_gqa)
    outer, q, k, v = _same_dims(query, key, value, enable_gqa)
    mask: Mask | None = _CAUSAL_FROM_START if is_causal else None
    bias = None
    if attn_mask is not None:
        full = (*outer, query.shape[-2], key.shape[-2])
        _check_broadcast(attn_mask, full)
        bias, padding = _dense_mask(attn_mask, full, q)
        if padding is not None:
            mask = padding if mask is None else mask & padding
    out = attention(
        q, k, v, mask, bias=bias, dropout_p=_plain("dropout_p", dropout_p), scale=_plain("scale", scale)
    )
    return out if len(outer) == 2 else out.reshape(*outer, *out.shape[-2:])


def _check_sdpa(query: Any, key: Any, value: Any, attn_mask: Any, grouped: bool) -> None:
    """What `attention` would refuse by its own names."""
    named = {"query": query, "key": key, "value": value}
    for name, x in (named if attn_mask is None else {**named, "attn_mask": attn_mask}).items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if any(x.dim() < 2 for x in named.values()):
        raise ValueError("query, key, value: expected at least two dimensions")
    heads = {x.shape[-3] for x in named.values() if x.dim() > 2} - {1}
    if len(heads) > 1 and not grouped:
        raise ValueError(
            f"key, value: expected the heads of query, got {sorted(heads)}; enable_gqa=True shares key heads"
        )
    if attn_mask is not None and attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"attn_mask: expected dtype bool or float, got {attn_mask.dtype}")


def _same_dims(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> Any:
    """The output's dimensions before its rows, and the three with four dimensions, broadcast as in torch."""
    qs, ks, vs = query.shape, key.shape, value.shape
    if len(qs) == len(ks) == len(vs) == 4 and qs[0] == ks[0] == vs[0] and ks[1] == vs[1]:
        if grouped or qs[1] == ks[1]:  # nothing to broadcast: torch's function for that is slow
            return qs[:2], query, key, value
    lead = torch.broadcast_shapes(qs[:-3], ks[:-3], vs[:-3])
    if not grouped and max(map(len, (qs, ks, vs))) > 2:
        heads = torch.broadcast_shapes(qs[-3:-2], ks[-3:-2], vs[-3:-2])
        query, key, value = (_expand_heads(x, heads) for x in (query, key, value))
    return (*lead, *query.shape[-3:-2]), *(_four_dims(x, lead) for x in (query, key, value))


def _check_broadcast(attn_mask: Tensor, full: tuple[int, ...]) -> None:
    sizes = zip(reversed(attn_mask.shape), reversed(full), strict=False)
    if attn_mask.dim() > max(len(full), 4) or any(n != 1 and n != want for n, want in sizes):
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to {list(full)}, got {list(attn_mask.shape)}"
        )


def _plain(name: str, value: Any) -> Any:
    """torch takes tensors of one number where it asks for a float."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1 or value.requires_grad:
        raise TypeError(f"{name}: expected a float, got a tensor that is not one number or requires grad")
    return value.item()


def _expand_heads(x: Tensor, heads: Any) -> Tensor:
    return x if x.dim() < 3 and not heads else x.expand(*x.shape[:-3], *heads, *x.shape[-2:])


def _four_dims(x: Tensor, lead: Any) -> Tensor:
    if x.dim() == 2:
        return x[None, None]
    x = x.expand(*lead, *x.shape[-3:])
    return x[None] if not lead else (x if len(lead) == 1 else x.flatten(0, len(lead) - 1))


def _dense_mask(attn_mask: Tensor, full: tuple[int, ...], q: Tensor) -> tuple[Tensor | None, Mask | None]:
    """A bias, or key padding where a boolean mask is the same for every head and row."""
    if attn_mask.dtype == torch.bool:
        padded = (1,) * (len(full) - attn_mask.dim()) + tuple(attn_mask.shape)
        if len(full) == 4 and len(padded) == 4 and padded[1] == padded[2] == 1:
            keys = attn_mask.reshape(padded[0], padded[3]).expand(q.shape[0], full[-1])
            return None, KeyPadding(keep=keys)
        hidden = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~attn_mask, -torch.inf)
        attn_mask = hidden
    if len(full) <= 4:
        return attn_mask[(None,) * max(0, 4 - attn_mask.dim())] if len(full) < 4 else attn_mask, None
    padded = (1,) * (len(full) - attn_mask.dim()) + tuple(attn_mask.shape)
    lead = full[:-3]
    return attn_mask.reshape(padded).expand(*lead, *padded[-3:]).flatten(0, len(lead) - 1), None


def merge(outs: Any, lses: Any) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint key sets: `outs`, a sequence of [..., Dv], and `lses`, one of [...].

    Returns (out, lse), differentiable. Empty rows (lse -inf) take no part. Give a sink to one part only.
    """
    for name, given in (("outs", outs), ("lses", lses)):
        if isinstance(given, Tensor):
            raise TypeError(
                f"merge: expected {name} as a sequence of tensors, got one of {list(given.shape)}"
            )
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"merge: expected as many outs as lses, at least one, got {len(outs)} and {len(lses)}"
        )
    for out, lse in zip(outs, lses, strict=True):
        if not isinstance(out, Tensor) or not isinstance(lse, Tensor):
            raise TypeError(f"merge: expected tensors, got {type(out).__name__} and {type(lse).__name__}")
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"merge: expected lse {list(outs[0].shape[:-1])}, got {list(lse.shape)} for {list(out.shape)}"
            )
    stacked = torch.stack(lses)
    peak = stacked.detach().amax(0)
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    present = stacked != -torch.inf
    shares = torch.where(present, torch.exp(torch.where(present, stacked, peak) - peak), 0.0)
    total = shares.sum(0)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    weights = (shares / total)[..., None]
    parts = torch.where(present[..., None], torch.stack(outs), 0.0)  # an empty row may hold NaN
    out = (weights * parts.to(weights.dtype)).sum(0).to(outs[0].dtype)
    return out, torch.where(empty, -torch.inf, torch.log(total) + peak)
