"""Attention over the edges of a graph, row by row: forward, and backward by row, by key and by edge.

The work is cut into items of bounded size (`config.ITEM` edges), so that a hub's row is shared by many
programs and a leaf's costs one short one. The pieces of a row that was cut are merged in their order; nothing
is added atomically. Edge features are folded into the query: q . (k + W e) = q . k + (q W) . e, so a kernel
sees q W and returns sum p e (see python/saccade/gather.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .backward import load_statistics
from .mask import row_interval
from .softmax import RELU, SIGMOID, SOFTMAX1, logit_gradient, row_lse, weigh
from .tile import (
    DOT,
    joint,
    joint_slope,
    number,
    pair_stays,
    rows_at,
    score_gradient,
    tanh,
    unit_of,
    vector_at,
)


class Edges(NamedTuple):
    """Edges sorted by row (or by key), and what belongs to them. None where absent. (q W is an argument of
    its own: inside a loop the compiler loses the strides of a tuple in a tuple.)
    """

    rows: Any  # [E] int32, query of each; None where an item's row says it
    keys: Any  # [E] int32, or None likewise
    ids: Any  # [E] int64, the user's number; None where it is the place
    bias: Any = None  # [H or 1, num_edges]
    bias_head: Any = 0
    x: Any = None  # [num_edges, De], contiguous


class Items(NamedTuple):
    """Pieces of rows: edges [first, last) of `row`. `slot` numbers the pieces of cut rows; whole: -1."""

    row: Any
    first: Any
    last: Any
    slot: Any


@triton.jit
def load_at(x, base, r, inside, DIM: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):
    """[E, COLS]: rows r, 0 where not inside and from column DIM on."""
    c = tl.arange(0, COLS)
    at = base + (r.to(tl.int64)[:, None] * x.row + c.to(tl.int64)[None, :] * x.col)
    return tl.load(at, mask=inside[:, None] & (c < DIM)[None, :], other=0.0).to(ACC)


@triton.jit
def load_features(x, ids, inside, DIM: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):
    """[E, COLS]: rows `ids` of a contiguous [., DIM], 0 where not inside and from column DIM on."""
    c = tl.arange(0, COLS)
    at = x + ids.to(tl.int64)[:, None] * DIM + c[None, :]
    return tl.load(at, mask=inside[:, None] & (c < DIM)[None, :], other=0.0).to(ACC)


@triton.jit
def store_at(x, base, r, values, inside, DIM: tl.constexpr, COLS: tl.constexpr):
    """Row r (a scalar) of x."""
    c = tl.arange(0, COLS)
    at = base + r.to(tl.int64) * x.row + c.to(tl.int64) * x.col
    tl.store(at, values.to(x.ptr.dtype.element_ty), mask=(c < DIM) & inside)


@triton.jit
def load_vector(ptr, h, DIM: tl.constexpr, COLS: tl.constexpr):
    """[1, COLS] of row h of a contiguous [H, DIM]."""
    c = tl.arange(0, COLS)
    return tl.load(ptr + h * DIM + c, mask=c < DIM, other=0.0)[None, :]


@triton.jit
def edge_numbers(edges, e, inside):
    if edges.ids is not None:
        return tl.load(edges.ids + e, mask=inside, other=0)
    else:
        return e


@triton.jit
def kept_edges(i, j, inside, b, h, seqlen_q, seqlen_k, band, mask):
    """[E] bool: what the rest of the mask keeps of edges (i, j)."""
    begin, end = row_interval(i, b, h, seqlen_q, seqlen_k, band, mask)
    kept = inside & (j >= begin) & (j < end)
    if mask.keep is not None:
        kept &= tl.load(mask.keep + b.to(tl.int64) * mask.keep_batch + j, mask=inside, other=0) != 0
    if mask.q_ids is not None:
        q_id = tl.load(mask.q_ids + b.to(tl.int64) * mask.q_ids_batch + i, mask=inside, other=0)
        k_id = tl.load(mask.k_ids + b.to(tl.int64) * mask.k_ids_batch + j, mask=inside, other=0)
        kept &= q_id == k_id
    return kept


@triton.jit
def edge_logits(
    qt, kt, eqt, ext, kept, ids, h, terms, edges, S: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """([E] logits in units, tanh of the softcap) of edges; -inf where not kept. Rows: [1, .] or [E, .]."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    if S.score == DOT:
        s = tl.sum(qt * kt, 1)
        if edges.x is not None:
            s += tl.sum(eqt * ext, 1)
    else:
        w = load_vector(terms.weight, h, S.dim, D)
        s = tl.sum(w * joint(qt + kt, number(terms, 2).to(ACC), S), 1)
    bent = 0.0
    if not S.bare:
        scale = number(terms, 0)
        if S.softcap:
            softcap = number(terms, 1)
            bent = tanh(s * (scale / softcap).to(ACC))
            s = bent * softcap.to(ACC)
        else:
            s = s * scale.to(ACC)
        if edges.bias is not None:
            bias = tl.load(edges.bias + h.to(tl.int64) * edges.bias_head + ids, mask=kept, other=0.0).to(ACC)
            s = tl.where(bias == float("-inf"), bias, tl.maximum(s + bias, -1e11))
    return tl.where(kept, s, float("-inf")), bent


@triton.jit(do_not_specialize=[
    "seqlen_q", "seqlen_k", "left_end", "right_end", "left_start", "right_start", "items", "slots",
])  # fmt: skip
def gather_forward(
    q, k, v, edge_q, out, out_edge, lse, parts, edges, work, terms, mask,
    seqlen_q, seqlen_k, left_end, right_end, left_start, right_start, items, slots,
    S: tl.constexpr, E: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One program for each (sequence, head, item). `parts` [B, H, slots, 2 + DV + DE] takes the state of
    pieces: peak, total, sums. EDGE is De, 0 without edge features.
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    program = tl.program_id(0)
    item = program % items
    h = program // items % S.heads
    b = program // items // S.heads
    band = (left_end, right_end, left_start, right_start)
    unit, factor = unit_of(terms, S)
    row = tl.load(work.row + item)
    first = tl.load(work.first + item)
    last = tl.load(work.last + item)
    slot = tl.load(work.slot + item)
    zero = b.to(tl.int64) * 0
    one = tl.arange(0, 1)
    here = one < seqlen_q
    k_base = rows_at(k, b, h // S.group, zero)
    v_base = rows_at(v, b, h // S.group, zero)
    qt = load_at(q, rows_at(q, b, h, zero), row + one, here, S.dim, D, ACC)
    eqt = qt
    if EDGE > 0:
        eqt = load_at(edge_q, rows_at(edge_q, b, h, zero), row + one, here, EDGE, DE, ACC)
    acc = tl.zeros((DV,), ACC)
    mixed = tl.zeros((DE,), ACC)
    peak = tl.full((1,), float("-inf"), ACC)
    total = tl.zeros((1,), ACC)
    for e0 in range(first, last, E):
        e = e0 + tl.arange(0, E)
        inside = e < last
        j = tl.load(edges.keys + e, mask=inside, other=0)
        i = row + j * 0
        ids = edge_numbers(edges, e, inside)
        kept = kept_edges(i, j, inside, b, h, seqlen_q, seqlen_k, band, mask)
        kt = load_at(k, k_base, j, kept, S.dim, D, ACC)
        ext = kt
        if EDGE > 0:
            ext = load_features(edges.x, ids, kept, EDGE, DE, ACC)
        s, bent = edge_logits(qt, kt, eqt, ext, kept, ids, h, terms, edges, S, D)
        kept = kept & (s != float("-inf"))
        if S.activation == RELU or S.activation == SIGMOID:
            p = weigh(s[None, :], peak, peak, factor, S, False)
        else:
            new = tl.maximum(peak, tl.max(s, 0))
            pivot = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2((s[None, :] - pivot[:, None]) * factor)
            decay = tl.exp2((peak - pivot) * factor)
            total = total * decay + tl.sum(p, 1)
            acc = acc * decay
            mixed = mixed * decay
            peak = new
        p = tl.sum(p, 0)
        if S.dropout:
            p = tl.where(pair_stays(i, j, b, h, terms), p, 0.0)
        vt = load_at(v, v_base, j, kept, S.dim_v, DV, ACC)
        acc += tl.sum(p[:, None] * vt, 0)
        if EDGE > 0:
            mixed += tl.sum(tl.where(kept, p, 0.0)[:, None] * ext, 0)
    if slot >= 0:
        at = parts + ((b.to(tl.int64) * S.heads + h) * slots + slot) * (2 + DV + DE)
        tl.store(at + one, peak)
        tl.store(at + 1 + one, total)
        tl.store(at + 2 + tl.arange(0, DV), acc)
        tl.store(at + 2 + DV + tl.arange(0, DE), mixed)
    else:
        finish_row(
            acc, mixed, peak, total, row, out, out_edge, lse, b, h, terms, unit, factor, S, DV, DE, EDGE
        )


@triton.jit
def finish_row(
    acc, mixed, peak, total, row, out, out_edge, lse, b, h, terms, unit, factor,
    S: tl.constexpr, DV: tl.constexpr, DE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """From a row's whole state to its results: the sink joins, sums are divided."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    zero = b.to(tl.int64) * 0
    one = tl.arange(0, 1)
    here = one == 0
    if S.dropout:
        acc = acc * number(terms, 3).to(ACC)
        mixed = mixed * number(terms, 3).to(ACC)
    if S.activation != RELU and S.activation != SIGMOID:
        if terms.sink is not None or S.activation == SOFTMAX1:
            sink = tl.zeros((1,), ACC)
            if terms.sink is not None:
                sink += (tl.load(terms.sink + h).to(tl.float64) / unit).to(ACC)
            new = tl.maximum(peak, sink)
            decay = tl.exp2((peak - new) * factor)
            total = total * decay + tl.exp2((sink - new) * factor)
            acc = acc * decay
            mixed = mixed * decay
            peak = new
        share = 1.0 / tl.where(total == 0.0, 1.0, total)
        acc = acc * share
        mixed = mixed * share
        tl.store(vector_at(lse, b, h, zero) + row + one, row_lse(peak, total, unit), mask=here)
    store_at(out, rows_at(out, b, h, zero), row, acc, True, S.dim_v, DV)
    if EDGE > 0:
        store_at(out_edge, rows_at(out_edge, b, h, zero), row, mixed, True, EDGE, DE)


@triton.jit(do_not_specialize=["cut", "slots"])
def merge_rows(
    out, out_edge, lse, parts, cut_row, cut_first, terms, cut, slots,
    S: tl.constexpr, DV: tl.constexpr, DE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The rows that were cut: pieces cut_first[n] to cut_first[n + 1] of row cut_row[n]."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    program = tl.program_id(0)
    n = program % cut
    h = program // cut % S.heads
    b = program // cut // S.heads
    unit, factor = unit_of(terms, S)
    one = tl.arange(0, 1)
    acc = tl.zeros((DV,), ACC)
    mixed = tl.zeros((DE,), ACC)
    peak = tl.full((1,), float("-inf"), ACC)
    total = tl.zeros((1,), ACC)
    for slot in range(tl.load(cut_first + n), tl.load(cut_first + n + 1)):
        at = parts + ((b.to(tl.int64) * S.heads + h) * slots + slot) * (2 + DV + DE)
        part_peak = tl.load(at + one)
        part_total = tl.load(at + 1 + one)
        part_acc = tl.load(at + 2 + tl.arange(0, DV))
        part_mixed = tl.load(at + 2 + DV + tl.arange(0, DE))
        if S.activation == RELU or S.activation == SIGMOID:
            acc += part_acc
            mixed += part_mixed
        else:
            new = tl.maximum(peak, part_peak)
            pivot = tl.where(new == float("-inf"), 0.0, new)
            old = tl.exp2((peak - pivot) * factor)
            more = tl.exp2((part_peak - pivot) * factor)
            acc = acc * old + part_acc * more
            mixed = mixed * old + part_mixed * more
            total = total * old + part_total * more
            peak = new
    row = tl.load(cut_row + n)
    finish_row(acc, mixed, peak, total, row, out, out_edge, lse, b, h, terms, unit, factor, S, DV, DE, EDGE)


@triton.jit
def edge_gradients(
    qt, kt, dot_, vt, eqt, ext, deot, i, j, kept, ids, high, low, delta, b, h, terms, edges, factor,
    S: tl.constexpr, E: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """(weights after dropout, dL/dlogit, dL/dscore) [E] of edges; 0 where not kept."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    s, bent = edge_logits(qt, kt, eqt, ext, kept, ids, h, terms, edges, S, D)
    p = tl.sum(weigh(s[:, None], high, low, factor, S, False), 1)
    dp = tl.sum(dot_ * vt, 1)
    if EDGE > 0:
        dp += tl.sum(deot * ext, 1)
    used = p
    if S.dropout:
        stays = pair_stays(i, j, b, h, terms)
        rest = number(terms, 3).to(ACC)
        dp = tl.where(stays, dp * rest, 0.0)
        used = tl.where(stays, p * rest, 0.0)
    ds = tl.sum(logit_gradient(s[:, None], p[:, None], dp[:, None], delta, S, False), 1)
    hidden = s == float("-inf")
    ds = tl.where(hidden, 0.0, ds)
    return tl.where(hidden, 0.0, used), ds, score_gradient(ds, bent, S)


@triton.jit(do_not_specialize=[
    "seqlen_q", "seqlen_k", "left_end", "right_end", "left_start", "right_start", "items", "slots",
])  # fmt: skip
def gather_backward_rows(
    q, k, v, edge_q, dout, dout_edge, dq, dedge_q, dweight, stats, parts, edges, work, terms, mask,
    seqlen_q, seqlen_k, left_end, right_end, left_start, right_start, items, slots,
    S: tl.constexpr, E: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dQ and the gradient of q W of each item's row; pieces of cut rows go to parts [B, H, slots, D + DE].
    dweight [B, H, items, D] takes each item's share of the score's weight.
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    program = tl.program_id(0)
    item = program % items
    h = program // items % S.heads
    b = program // items // S.heads
    band = (left_end, right_end, left_start, right_start)
    unit, factor = unit_of(terms, S)
    row = tl.load(work.row + item)
    first = tl.load(work.first + item)
    last = tl.load(work.last + item)
    slot = tl.load(work.slot + item)
    zero = b.to(tl.int64) * 0
    one = tl.arange(0, 1)
    here = one < seqlen_q
    k_base = rows_at(k, b, h // S.group, zero)
    v_base = rows_at(v, b, h // S.group, zero)
    qt = load_at(q, rows_at(q, b, h, zero), row + one, here, S.dim, D, ACC)
    dot_ = load_at(dout, rows_at(dout, b, h, zero), row + one, here, S.dim_v, DV, ACC)
    high, low, delta = load_statistics(stats, b, h, zero, row + one, here, S)
    eqt = qt
    deot = qt
    if EDGE > 0:
        eqt = load_at(edge_q, rows_at(edge_q, b, h, zero), row + one, here, EDGE, DE, ACC)
        deot = load_at(dout_edge, rows_at(dout_edge, b, h, zero), row + one, here, EDGE, DE, ACC)
    grad = tl.zeros((D,), ACC)
    edge_grad = tl.zeros((DE,), ACC)
    dw = tl.zeros((D,), ACC)
    for e0 in range(first, last, E):
        e = e0 + tl.arange(0, E)
        inside = e < last
        j = tl.load(edges.keys + e, mask=inside, other=0)
        i = row + j * 0
        ids = edge_numbers(edges, e, inside)
        kept = kept_edges(i, j, inside, b, h, seqlen_q, seqlen_k, band, mask)
        kt = load_at(k, k_base, j, kept, S.dim, D, ACC)
        vt = load_at(v, v_base, j, kept, S.dim_v, DV, ACC)
        ext = kt
        if EDGE > 0:
            ext = load_features(edges.x, ids, kept, EDGE, DE, ACC)
        used, ds, dscore = edge_gradients(
            qt, kt, dot_, vt, eqt, ext, deot, i, j, kept, ids, high, low, delta, b, h, terms, edges, factor,
            S, E, D, EDGE,
        )  # fmt: skip
        seen = dscore != 0.0
        if S.score == DOT:
            grad += tl.sum(tl.where(seen[:, None], dscore[:, None] * kt, 0.0), 0)
            if EDGE > 0:
                edge_grad += tl.sum(tl.where(seen[:, None], dscore[:, None] * ext, 0.0), 0)
        else:
            slope = number(terms, 2).to(ACC)
            w = load_vector(terms.weight, h, S.dim, D)
            x = qt + kt
            grad += tl.sum(tl.where(seen[:, None], dscore[:, None] * w * joint_slope(x, slope, S), 0.0), 0)
            dw += tl.sum(tl.where(seen[:, None], dscore[:, None] * joint(x, slope, S), 0.0), 0)
    scale = number(terms, 0).to(ACC)
    if slot >= 0:
        at = parts + ((b.to(tl.int64) * S.heads + h) * slots + slot) * (D + DE)
        tl.store(at + tl.arange(0, D), grad * scale)
        tl.store(at + D + tl.arange(0, DE), edge_grad * scale)
    else:
        store_at(dq, rows_at(dq, b, h, zero), row, grad * scale, True, S.dim, D)
        if EDGE > 0:
            store_at(dedge_q, rows_at(dedge_q, b, h, zero), row, edge_grad * scale, True, EDGE, DE)
    if dweight is not None:
        d = tl.arange(0, D)
        at = dweight + ((b.to(tl.int64) * S.heads + h) * items + item) * S.dim + d
        tl.store(at, dw * scale, mask=d < S.dim)


@triton.jit(do_not_specialize=[
    "seqlen_q", "seqlen_k", "left_end", "right_end", "left_start", "right_start", "items", "slots",
])  # fmt: skip
def gather_backward_keys(
    q, k, v, edge_q, dout, dout_edge, dk, dv, stats, parts, edges, work, terms, mask,
    seqlen_q, seqlen_k, left_end, right_end, left_start, right_start, items, slots,
    S: tl.constexpr, E: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dK and dV of each item's key, summed over the query heads of its head; edges are sorted by key. Pieces
    of cut keys go to parts [B, Hk, slots, D + DV].
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    HEADS: tl.constexpr = S.heads // S.group
    program = tl.program_id(0)
    item = program % items
    hk = program // items % HEADS
    b = program // items // HEADS
    band = (left_end, right_end, left_start, right_start)
    unit, factor = unit_of(terms, S)
    key = tl.load(work.row + item)
    first = tl.load(work.first + item)
    last = tl.load(work.last + item)
    slot = tl.load(work.slot + item)
    zero = b.to(tl.int64) * 0
    one = tl.arange(0, 1)
    here = one < seqlen_k
    kt = load_at(k, rows_at(k, b, hk, zero), key + one, here, S.dim, D, ACC)
    vt = load_at(v, rows_at(v, b, hk, zero), key + one, here, S.dim_v, DV, ACC)
    dk_acc = tl.zeros((D,), ACC)
    dv_acc = tl.zeros((DV,), ACC)
    for g in range(S.group):
        h = hk * S.group + g
        q_base = rows_at(q, b, h, zero)
        do_base = rows_at(dout, b, h, zero)
        for e0 in range(first, last, E):
            e = e0 + tl.arange(0, E)
            inside = e < last
            i = tl.load(edges.rows + e, mask=inside, other=0)
            j = key + i * 0
            ids = edge_numbers(edges, e, inside)
            kept = kept_edges(i, j, inside, b, h, seqlen_q, seqlen_k, band, mask)
            qt = load_at(q, q_base, i, kept, S.dim, D, ACC)
            dot_ = load_at(dout, do_base, i, kept, S.dim_v, DV, ACC)
            high, low, delta = load_statistics(stats, b, h, zero, i, inside, S)
            eqt = qt
            deot = qt
            ext = qt
            if EDGE > 0:
                eqt = load_at(edge_q, rows_at(edge_q, b, h, zero), i, kept, EDGE, DE, ACC)
                deot = load_at(dout_edge, rows_at(dout_edge, b, h, zero), i, kept, EDGE, DE, ACC)
                ext = load_features(edges.x, ids, kept, EDGE, DE, ACC)
            used, ds, dscore = edge_gradients(
                qt, kt, dot_, vt, eqt, ext, deot, i, j, kept, ids, high, low, delta, b, h, terms, edges,
                factor, S, E, D, EDGE,
            )  # fmt: skip
            seen = (used != 0.0) | (dscore != 0.0)
            dv_acc += tl.sum(tl.where(seen[:, None], used[:, None] * dot_, 0.0), 0)
            if S.score == DOT:
                dk_acc += tl.sum(tl.where(seen[:, None], dscore[:, None] * qt, 0.0), 0)
            else:
                w = load_vector(terms.weight, h, S.dim, D)
                slopes = joint_slope(qt + kt, number(terms, 2).to(ACC), S)
                dk_acc += tl.sum(tl.where(seen[:, None], dscore[:, None] * w * slopes, 0.0), 0)
    dk_acc = dk_acc * number(terms, 0).to(ACC)
    if slot >= 0:
        at = parts + ((b.to(tl.int64) * HEADS + hk) * slots + slot) * (D + DV)
        tl.store(at + tl.arange(0, D), dk_acc)
        tl.store(at + D + tl.arange(0, DV), dv_acc)
    else:
        store_at(dk, rows_at(dk, b, hk, zero), key, dk_acc, True, S.dim, D)
        store_at(dv, rows_at(dv, b, hk, zero), key, dv_acc, True, S.dim_v, DV)


@triton.jit(do_not_specialize=["cut", "slots"])
def sum_pieces(
    first_grad, second_grad, parts, cut_row, cut_first, cut, slots,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM2: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of the rows that were cut, from parts [B, HEADS, slots, D + D2], in the pieces' order."""
    program = tl.program_id(0)
    n = program % cut
    h = program // cut % HEADS
    b = program // cut // HEADS
    zero = b.to(tl.int64) * 0
    one = tl.zeros((D,), ACC)
    two = tl.zeros((D2,), ACC)
    for slot in range(tl.load(cut_first + n), tl.load(cut_first + n + 1)):
        at = parts + ((b.to(tl.int64) * HEADS + h) * slots + slot) * (D + D2)
        one += tl.load(at + tl.arange(0, D))
        two += tl.load(at + D + tl.arange(0, D2))
    row = tl.load(cut_row + n)
    store_at(first_grad, rows_at(first_grad, b, h, zero), row, one, True, DIM, D)
    if DIM2 > 0:
        store_at(second_grad, rows_at(second_grad, b, h, zero), row, two, True, DIM2, D2)


@triton.jit(do_not_specialize=[
    "seqlen_q", "seqlen_k", "left_end", "right_end", "left_start", "right_start", "count", "batch",
])  # fmt: skip
def gather_backward_edges(
    q, k, v, edge_q, dout, dout_edge, dedge_bias, dedge_x, stats, edges, terms, mask,
    seqlen_q, seqlen_k, left_end, right_end, left_start, right_start, count, batch,
    S: tl.constexpr, E: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DE: tl.constexpr, EDGE: tl.constexpr,
    PER_HEAD: tl.constexpr,
):  # fmt: skip
    """The gradients of what belongs to an edge, summed over the batch, and over heads unless PER_HEAD. Either
    of dedge_bias and dedge_x (Rows) may be None.
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    e = tl.program_id(0) * E + tl.arange(0, E)
    inside = e < count
    band = (left_end, right_end, left_start, right_start)
    unit, factor = unit_of(terms, S)
    i = tl.load(edges.rows + e, mask=inside, other=0)
    j = tl.load(edges.keys + e, mask=inside, other=0)
    ids = edge_numbers(edges, e, inside)
    scale = number(terms, 0).to(ACC)
    x_grad = tl.zeros((E, DE), ACC)
    bias_grad = tl.zeros((E,), ACC)
    for h_at in range(S.heads):
        h = h_at + tl.program_id(0) * 0
        if PER_HEAD:
            bias_grad = tl.zeros((E,), ACC)
        for b_at in range(batch):
            b = b_at + tl.program_id(0) * 0
            zero = b.to(tl.int64) * 0
            kept = kept_edges(i, j, inside, b, h, seqlen_q, seqlen_k, band, mask)
            qt = load_at(q, rows_at(q, b, h, zero), i, kept, S.dim, D, ACC)
            kt = load_at(k, rows_at(k, b, h // S.group, zero), j, kept, S.dim, D, ACC)
            vt = load_at(v, rows_at(v, b, h // S.group, zero), j, kept, S.dim_v, DV, ACC)
            dot_ = load_at(dout, rows_at(dout, b, h, zero), i, kept, S.dim_v, DV, ACC)
            high, low, delta = load_statistics(stats, b, h, zero, i, inside, S)
            eqt = qt
            deot = qt
            ext = qt
            if EDGE > 0:
                eqt = load_at(edge_q, rows_at(edge_q, b, h, zero), i, kept, EDGE, DE, ACC)
                deot = load_at(dout_edge, rows_at(dout_edge, b, h, zero), i, kept, EDGE, DE, ACC)
                ext = load_features(edges.x, ids, kept, EDGE, DE, ACC)
            used, ds, dscore = edge_gradients(
                qt, kt, dot_, vt, eqt, ext, deot, i, j, kept, ids, high, low, delta, b, h, terms, edges,
                factor, S, E, D, EDGE,
            )  # fmt: skip
            bias_grad += ds
            if EDGE > 0:
                seen = (used != 0.0) | (dscore != 0.0)
                sent = scale * dscore[:, None] * eqt + used[:, None] * deot
                x_grad += tl.where(seen[:, None], sent, 0.0)
        if PER_HEAD and dedge_bias is not None:
            tl.store(dedge_bias + h.to(tl.int64) * edges.bias_head + ids, bias_grad, mask=inside)
    if not PER_HEAD and dedge_bias is not None:
        tl.store(dedge_bias + ids, bias_grad, mask=inside)
    if dedge_x is not None:
        c = tl.arange(0, DE)
        at = dedge_x + ids.to(tl.int64)[:, None] * EDGE + c[None, :]
        tl.store(at, x_grad, mask=inside[:, None] & (c < EDGE)[None, :])
