"""Attention over the edges of a graph, row by row: the forward pass.

The work is cut into items of bounded size (`config.ITEM` edges), so that a hub's row is shared by many
programs and a leaf's costs one short one. The pieces of a row that was cut are merged in their order; nothing
is added atomically. Edge features are folded into the query: q . (k + W e) = q . k + (q W) . e, so a kernel
sees q W and returns sum p e (see python/saccade/gather.py). Those that join an additive score belong to each
pair: W e is added to the query, edge by edge.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import RUNTIME
from .edges import (
    edge_logits,
    edge_numbers,
    item_of,
    kept_edges,
    load_at,
    load_features,
    store_at,
    with_features,
)
from .softmax import RELU, SIGMOID, SOFTMAX1, row_lse, weigh
from .tile import number, pair_stays, rows_at, unit_of, vector_at


@triton.jit(do_not_specialize=RUNTIME)
def gather_forward(
    q, k, v, edge_q, out, out_edge, lse, parts, edges, work, terms, mask,
    seqlen_q, seqlen_k, left_end, right_end, left_start, right_start, items, slots,
    S: tl.constexpr, E: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One program for each (sequence, head, item). `parts` [B, H, slots, 2 + DV + DE] takes the state of
    pieces: peak, total, sums. EDGE is De, 0 without edge features.
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    b, h, row, first, last, slot = item_of(work, items, S.heads)
    band = (left_end, right_end, left_start, right_start)
    unit, factor = unit_of(terms, S)
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
        own = with_features(qt, ids, kept, h, edges, S, E, D)
        s, bent = edge_logits(own, kt, eqt, ext, kept, ids, h, terms, edges, S, D)
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
            mixed += tl.sum(tl.where(kept[:, None], p[:, None] * ext, 0.0), 0)
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


@triton.jit(do_not_specialize=RUNTIME)
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
