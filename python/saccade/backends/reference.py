"""The oracle: attention in plain PyTorch, for reading. Any dtype, any device, differentiable any number of
times.

One formula serves two layouts of the pairs (i, j): all of them ([B, H, Sq, Sk]) or the edges of a graph ([B,
H, E]). Numbers that a mask hides are replaced by 0 before they are used (and again after a logarithm or a
division), so that NaN and inf in them reach neither the output nor a derivative of any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dropout import kept as dropout_kept
from ..layout import in_order, memory_order
from ..position import QueryRelative
from ..problem import ADDITIVE, DOT, NORMALISED, RELU, SOFTMAX1, Problem, Spec, accumulator, is_autocast
from .pairs import Dense, Edges, Pairs, Row

NAME = "reference"
_INF = float("inf")


def unsupported(problem: Problem) -> list[str]:
    """Reasons against this problem: none, ever."""
    return []


def kernel(problem: Problem) -> str:
    """The name of the body that would run."""
    return "edges" if problem.spec.args.graph is not None else "dense"


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked problem."""
    return attend(problem.spec, problem.tensors, problem.position)


def attend(
    spec: Spec, tensors: tuple[Tensor | None, ...], position: QueryRelative | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) from the tensors of `Problem.tensors`; lse is empty where the activation has none."""
    result = weigh(spec, tensors, position, weights=False)
    q = tensors[0]
    assert q is not None
    out = in_order(result[0].to(q.dtype), spec.layout.out_order or memory_order(q))
    return out, result[1]


def weigh(
    spec: Spec,
    tensors: tuple[Tensor | None, ...],
    position: QueryRelative | None = None,
    wide: torch.dtype | None = None,
    weights: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, weights) in `wide`, the accumulator's dtype. weights [B, H, Sq, Sk'] are dense calls' only
    that ask for them, else empty.
    """
    assert tensors[0] is not None
    device = tensors[0].device.type
    if is_autocast(device):  # would make the products narrow again
        with torch.autocast(device, enabled=False):
            return weigh(spec, tensors, position, wide, weights)
    wide = wide or accumulator(tensors[0].dtype)
    q, k, v, *terms = (None if x is None else x.to(wide) for x in tensors)
    assert q is not None and k is not None and v is not None
    bias, rel_bias, *rest = terms
    joined: tuple[Any, ...] = (*rest, position)
    if spec.layout.is_dense:
        row = Row(spec, 0, q, _per_head(k, 1, spec), _per_head(v, 1, spec), bias, rel_bias, *joined)
        return _attend_rows(row, weights)
    parts = [
        _attend_rows(Row(spec, b, qb, kb, vb, bias, _own_relative(spec, rel_bias, b), *joined), False)
        for b, (qb, kb, vb) in enumerate(_sequences(spec, q, k, v))
    ]
    return (*_join_sequences(spec, parts, q, v), q.new_empty(0))


def _own_relative(spec: Spec, rel_bias: Tensor | None, b: int) -> Tensor | None:
    """The relative bias of one sequence: its rows where queries have their own."""
    starts = spec.layout.cu_seqlens_q
    if rel_bias is None or rel_bias.dim() == 2:
        return rel_bias
    if starts is None:
        return rel_bias[b : b + 1]
    begin, end = _starts(starts, rel_bias.transpose(0, 1))[b : b + 2]
    return rel_bias[None, :, begin:end]


def _starts(ends: Tensor, rows: Tensor) -> list[int]:
    """Where each of the packed sequences begins, and the end. Without values, on meta, the last has all."""
    return [0] * (ends.shape[0] - 1) + [rows.shape[0]] if ends.is_meta else ends.tolist()


def _per_head(x: Tensor, dim: int, spec: Spec) -> Tensor:
    """Head h reads key head h // (H // Hk)."""
    return x if spec.heads == spec.heads_k else x.repeat_interleave(spec.heads // spec.heads_k, dim)


def _sequences(spec: Spec, q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    layout = spec.layout
    found: list[Any] = []
    if layout.cu_seqlens_q is not None:
        assert layout.cu_seqlens_k is not None
        starts_q, starts_k = _starts(layout.cu_seqlens_q, q), _starts(layout.cu_seqlens_k, k)
        for b in range(spec.batch):
            rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
            x = (q[rows], _per_head(k[keys], 1, spec), _per_head(v[keys], 1, spec))
            found.append(tuple(t.transpose(0, 1)[None] for t in x))
        return found
    assert layout.seqused_k is not None
    lengths = layout.seqused_k
    for b, used in enumerate([layout.max_seqlen_k] * q.shape[0] if lengths.is_meta else lengths.tolist()):
        caches = (_per_head(_cached(spec, x, b, used), 1, spec) for x in (k, v))
        found.append((q[b : b + 1], *caches))
    return found


def _cached(spec: Spec, cache: Tensor, b: int, used: int) -> Tensor:
    """[1, Hk, used, D]: the keys (or values) that sequence b has in its cache."""
    pages, beam = spec.layout.page_table, spec.layout.beam
    if pages is not None:
        size = cache.shape[2]
        own = pages[b, : -(-used // size) if size else 0].long()
        return cache[own].transpose(0, 1).flatten(1, 2)[None, :, :used]
    if beam is not None:
        steps = torch.arange(used, device=cache.device)
        return cache[beam[b, :used].long(), :, steps].transpose(0, 1)[None]
    return cache[b : b + 1, :, :used]


def _join_sequences(spec: Spec, parts: list[Any], q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    outs, lses = [p[0] for p in parts], [p[1] for p in parts]
    if not parts:
        shape = (q.shape[1], q.shape[0]) if spec.layout.is_varlen else q.shape[:-1]
        return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(shape)
    if not spec.layout.is_varlen:
        return torch.cat(outs), torch.cat(lses)
    out = torch.cat([o[0].transpose(0, 1) for o in outs])
    return out, torch.cat([x[0] for x in lses], 1) if spec.activation in NORMALISED else torch.cat(lses)


def _attend_rows(row: Row, dense: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, weights); those laid out for every pair, of edges too, only where `dense`."""
    spec = row.spec
    pairs: Pairs = Dense(row) if spec.args.graph is None else Edges(row)
    bias = None if row.bias is None else pairs.of(row.bias.to(row.q.dtype).expand(-1, -1, pairs.sq, pairs.sk))
    keep = _kept(row, pairs, bias)

    q = row.q if row.extra_k is not None else _shown(row.q, pairs.queries_with(keep))
    seen = pairs.keys_with(keep)
    k, v = _shown(row.k, seen), _shown(row.v, seen)
    if isinstance(pairs, Edges):
        pairs.show(keep)

    logits = _logits(row, pairs, q, k, bias)
    keep = keep & (logits.detach() != -_INF)
    extra = _extra_logits(row, q)
    weights, extra_weights, lse = _activate(row, pairs, logits, keep, extra)
    if spec.dropout_p:
        weights = _drop(row, weights, pairs.i, pairs.j)
        if extra_weights is not None:
            rows = torch.arange(pairs.sq, device=q.device)
            extra_weights = _drop(row, extra_weights, rows, torch.full_like(rows, spec.seqlen_k))
    out = pairs.mix(weights, v)
    if extra_weights is not None:
        assert row.extra_v is not None
        out = out + extra_weights[..., None] * row.extra_v[:, None]
    if not dense:
        return out, lse, lse.new_empty(0)
    columns = [pairs.dense(weights)] + ([] if extra_weights is None else [extra_weights[..., None]])
    if spec.activation == SOFTMAX1:
        columns.append(_zero_column(row, lse, spec.seqlen_k + len(columns) - 1)[..., None])
    return out, lse, torch.cat(columns, -1)


def _zero_column(row: Row, lse: Tensor, j: int) -> Tensor:
    """[B, H, Sq]: the weight of softmax1's zero, column j of the weights."""
    weights = torch.exp(-lse)
    if not row.spec.dropout_p:
        return weights
    rows = torch.arange(lse.shape[-1], device=lse.device)
    return _drop(row, weights, rows, torch.full_like(rows, j))


def _indices(row: Row, like: Tensor) -> tuple[Tensor, Tensor]:
    """b and h as tensors that broadcast with i and j."""
    pairs = (1,) * like.dim()
    b = torch.arange(row.first, row.first + row.q.shape[0], device=like.device)
    h = torch.arange(row.spec.heads, device=like.device)
    return b.view(-1, 1, *pairs), h.view(-1, *pairs)


def _kept(row: Row, pairs: Pairs, bias: Tensor | None) -> Tensor:
    b, h = _indices(row, pairs.i)
    keep = torch.ones(pairs.size, dtype=torch.bool, device=row.q.device)
    for part in pairs.parts:
        keep = keep & part.keep(b, h, pairs.i, pairs.j, pairs.sq, pairs.sk)
    if row.edge_bias is not None:
        assert isinstance(pairs, Edges)
        keep = keep & (row.edge_bias.detach()[:, pairs.ids] != -_INF)
    return keep if bias is None else keep & (bias.detach() != -_INF)


def _shown(x: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen[..., None], x, torch.zeros_like(x))


def _score(row: Row, pairs: Pairs, q: Tensor, k: Tensor) -> Tensor:
    if row.spec.score == DOT:
        position = row.position
        return pairs.dot(q if position is None else position.content_query(q), k)
    assert row.weight is not None
    return (pairs.head(row.weight) * _joint(row.spec, pairs.joint(q, k))).sum(-1)


def _joint(spec: Spec, x: Tensor) -> Tensor:
    return torch.tanh(x) if spec.score == ADDITIVE else torch.nn.functional.leaky_relu(x, spec.slope)


def _scaled(spec: Spec, score: Tensor) -> Tensor:
    logits = spec.scale * score
    return spec.softcap * torch.tanh(logits / spec.softcap) if spec.softcap else logits


def _logits(row: Row, pairs: Pairs, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    spec, position = row.spec, row.position
    logits = _scaled(spec, _score(row, pairs, q, k))
    if bias is not None:
        logits = logits + bias
    delta = pairs.j - (pairs.i + pairs.sk - pairs.sq)
    if row.rel_bias is not None and row.rel_bias.dim() == 2:
        logits = logits + row.rel_bias[:, delta + spec.seqlen_k - 1]
    elif row.rel_bias is not None:
        reach = row.rel_bias.shape[-1] // 2
        logits = logits + row.rel_bias[..., pairs.i, delta.clamp(-reach, reach) + reach]
    if position is not None:
        table = position.table().to(q.dtype)
        products = position.position_query(q) @ table.transpose(-1, -2)
        logits = logits + spec.scale * products[..., pairs.i, position.index(delta, spec.seqlen_k)]
    if row.edge_bias is not None:
        assert isinstance(pairs, Edges)
        logits = logits + row.edge_bias[:, pairs.ids]
    return logits


def _extra_logits(row: Row, q: Tensor) -> Tensor | None:
    """[B, H, Sq]: the logit of the one more key that every query sees."""
    if row.extra_k is None:
        return None
    if row.spec.score == DOT:
        position = row.position
        content = q if position is None else position.content_query(q)
        return _scaled(row.spec, (content * row.extra_k[:, None]).sum(-1))
    assert row.weight is not None
    return _scaled(row.spec, (row.weight[:, None] * _joint(row.spec, q + row.extra_k[:, None])).sum(-1))


def _activate(
    row: Row, pairs: Pairs, logits: Tensor, keep: Tensor, extra: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The weights of the pairs, those of the extra key, and lse."""
    if row.spec.activation not in NORMALISED:
        act = torch.relu if row.spec.activation == RELU else torch.sigmoid
        weights = torch.where(keep, act(torch.where(keep, logits, 0.0)), 0.0)
        return weights, None if extra is None else act(extra), logits.new_empty(0)
    sink = row.q.new_zeros(row.spec.heads) if row.spec.activation == SOFTMAX1 else row.sink
    return _softmax(pairs, logits, keep, extra, sink)


def _softmax(
    pairs: Pairs, logits: Tensor, keep: Tensor, extra: Tensor | None, sink: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    peak = pairs.max(torch.where(keep, logits, -_INF).detach())
    for other in (extra, None if sink is None else sink[:, None]):
        if other is not None:
            peak = torch.maximum(peak, other.detach())
    peak = torch.where(peak == -_INF, 0.0, peak)  # -inf - -inf is NaN: an empty row gets a finite pivot

    pivot = pairs.query(peak)
    powers = torch.where(keep, torch.exp(torch.where(keep, logits, pivot) - pivot), 0.0)
    total = pairs.sum(powers)
    extra_power = None
    if extra is not None:
        extra_power = torch.exp(extra - peak)
        total = total + extra_power
    if sink is not None:
        total = total + torch.exp(sink[:, None] - peak)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -_INF, torch.log(total) + peak)
    return powers / pairs.query(total), None if extra_power is None else extra_power / total, lse


def _drop(row: Row, weights: Tensor, i: Tensor, j: Tensor) -> Tensor:
    spec = row.spec
    if spec.dropout_p == 1.0:
        return weights * 0.0
    assert spec.seed is not None
    b, h = _indices(row, i)
    stays = dropout_kept(spec.seed, spec.dropout_p, b, h, i, j)
    return torch.where(stays, weights / (1.0 - spec.dropout_p), 0.0)


def run_with_weights(problem: Problem, average: bool) -> tuple[Tensor, Tensor]:
    """(out, weights) of a dense problem, in q's dtype."""
    out, _, weights = weigh(problem.spec, problem.tensors, problem.position)
    weights = weights.mean(1) if average else weights
    order = problem.spec.layout.out_order or memory_order(problem.q)
    return in_order(out.to(problem.q.dtype), order), weights.to(problem.q.dtype)
