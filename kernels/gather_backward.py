"""Attention over the edges of a graph: gradients by row, by key and by edge. Work is cut into items, and
pieces are summed in their order, as in the forward pass (gather.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import RUNTIME, plain
from .edges import (
    edge_gradients,
    edge_numbers,
    item_of,
    kept_edges,
    load_at,
    load_features,
    load_query_side,
    load_vector,
    store_at,
    with_features,
)
from .tile import DOT, joint, joint_slope, number, rows_at, unit_of


@triton.jit(do_not_specialize=RUNTIME)
def gather_backward_rows(
    q, k, v, edge_q, dout, dout_edge, dq, dedge_q, dweight, stats, parts, edges, work, terms, mask,
    seqlen_q, seqlen_k, left_end, right_end, left_start, right_start, items, slots,
    S: tl.constexpr, E: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dQ and the gradient of q W of each item's row; pieces of cut rows go to parts [B, H, slots, D + DE].
    dweight [B, H, items, D] takes each item's share of the score's weight.
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
    qt, dot_, eqt, deot, high, low, delta = load_query_side(
        q, dout, edge_q, dout_edge, stats, row + one, here, here, b, h, S, D, DV, DE, EDGE
    )
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
        own = with_features(qt, ids, kept, h, edges, S, E, D)
        used, ds, dscore = edge_gradients(
            own, kt, dot_, vt, eqt, ext, deot, i, j, kept, ids, high, low, delta, b, h, terms, edges, factor,
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
            x = own + kt
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
        item = tl.program_id(0) % items
        at = dweight + ((b.to(tl.int64) * S.heads + h) * items + item) * S.dim + d
        tl.store(at, dw * scale, mask=d < S.dim)


@triton.jit(do_not_specialize=RUNTIME)
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
    b, hk, key, first, last, slot = item_of(work, items, HEADS)
    band = (left_end, right_end, left_start, right_start)
    unit, factor = unit_of(terms, S)
    zero = b.to(tl.int64) * 0
    one = tl.arange(0, 1)
    here = one < seqlen_k
    kt = load_at(k, rows_at(k, b, hk, zero), key + one, here, S.dim, D, ACC)
    vt = load_at(v, rows_at(v, b, hk, zero), key + one, here, S.dim_v, DV, ACC)
    dk_acc = tl.zeros((D,), ACC)
    dv_acc = tl.zeros((DV,), ACC)
    for g in range(S.group):
        h = hk * S.group + g
        for e0 in range(first, last, E):
            e = e0 + tl.arange(0, E)
            inside = e < last
            i = tl.load(edges.rows + e, mask=inside, other=0)
            j = key + i * 0
            ids = edge_numbers(edges, e, inside)
            kept = kept_edges(i, j, inside, b, h, seqlen_q, seqlen_k, band, mask)
            qt, dot_, eqt, deot, high, low, delta = load_query_side(
                q, dout, edge_q, dout_edge, stats, i, inside, kept, b, h, S, D, DV, DE, EDGE
            )
            ext = qt
            if EDGE > 0:
                ext = load_features(edges.x, ids, kept, EDGE, DE, ACC)
            own = with_features(qt, ids, kept, h, edges, S, E, D)
            used, ds, dscore = edge_gradients(
                own, kt, dot_, vt, eqt, ext, deot, i, j, kept, ids, high, low, delta, b, h, terms, edges,
                factor, S, E, D, EDGE,
            )  # fmt: skip
            seen = (used != 0.0) | (dscore != 0.0)
            dv_acc += tl.sum(tl.where(seen[:, None], used[:, None] * dot_, 0.0), 0)
            if S.score == DOT:
                dk_acc += tl.sum(tl.where(seen[:, None], dscore[:, None] * qt, 0.0), 0)
            else:
                w = load_vector(terms.weight, h, S.dim, D)
                slopes = joint_slope(own + kt, number(terms, 2).to(ACC), S)
                dk_acc += tl.sum(tl.where(seen[:, None], dscore[:, None] * w * slopes, 0.0), 0)
    dk_acc = dk_acc * number(terms, 0).to(ACC)
    if slot >= 0:
        at = parts + ((b.to(tl.int64) * HEADS + hk) * slots + slot) * (D + DV)
        tl.store(at + tl.arange(0, D), dk_acc)
        tl.store(at + D + tl.arange(0, DV), dv_acc)
    else:
        store_at(dk, rows_at(dk, b, hk, zero), key, dk_acc, True, S.dim, D)
        store_at(dv, rows_at(dv, b, hk, zero), key, dv_acc, True, S.dim_v, DV)


@triton.jit(do_not_specialize=RUNTIME)
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


@triton.jit(do_not_specialize=RUNTIME)
def gather_backward_edges(
    q, k, v, edge_q, dout, dout_edge, dedge_bias, dedge_x, dweight, stats, edges, terms, mask,
    seqlen_q, seqlen_k, left_end, right_end, left_start, right_start, count, batch, span,
    S: tl.constexpr, E: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DE: tl.constexpr, EDGE: tl.constexpr,
    PER_HEAD: tl.constexpr,
):  # fmt: skip
    """The gradients of what belongs to an edge, summed over the batch, and over heads unless PER_HEAD; one
    program for each `span` edges. dedge_bias, dedge_x (Rows) and dweight may be None; dweight [programs, H,
    De, D] takes each program's share of the W of features that join the score.
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    begin = tl.program_id(0).to(tl.int64) * span
    end = tl.minimum(begin + span, count).to(tl.int32)
    band = (left_end, right_end, left_start, right_start)
    unit, factor = unit_of(terms, S)
    scale = number(terms, 0).to(ACC)
    for e0 in range(begin.to(tl.int32), end, E):
        e = e0 + tl.arange(0, E)
        inside = e < end
        i = tl.load(edges.rows + e, mask=inside, other=0)
        j = tl.load(edges.keys + e, mask=inside, other=0)
        ids = edge_numbers(edges, e, inside)
        x_grad = tl.zeros((E, DE), ACC)
        bias_grad = tl.zeros((E,), ACC)
        for h_at in range(S.heads):
            h = h_at + tl.program_id(0) * 0
            if PER_HEAD:
                bias_grad = tl.zeros((E,), ACC)
            joined = tl.zeros((E, D), ACC)
            live = e < 0
            for b_at in range(batch):
                b = b_at + tl.program_id(0) * 0
                zero = b.to(tl.int64) * 0
                kept = kept_edges(i, j, inside, b, h, seqlen_q, seqlen_k, band, mask)
                qt, dot_, eqt, deot, high, low, delta = load_query_side(
                    q, dout, edge_q, dout_edge, stats, i, inside, kept, b, h, S, D, DV, DE, EDGE
                )
                kt = load_at(k, rows_at(k, b, h // S.group, zero), j, kept, S.dim, D, ACC)
                vt = load_at(v, rows_at(v, b, h // S.group, zero), j, kept, S.dim_v, DV, ACC)
                ext = qt
                if EDGE > 0:
                    ext = load_features(edges.x, ids, kept, EDGE, DE, ACC)
                own = with_features(qt, ids, kept, h, edges, S, E, D)
                used, ds, dscore = edge_gradients(
                    own, kt, dot_, vt, eqt, ext, deot, i, j, kept, ids, high, low, delta, b, h, terms, edges,
                    factor, S, E, D, EDGE,
                )  # fmt: skip
                bias_grad += ds
                if EDGE > 0:
                    seen = (used != 0.0) | (dscore != 0.0)
                    sent = scale * dscore[:, None] * eqt + used[:, None] * deot
                    x_grad += tl.where(seen[:, None], sent, 0.0)
                if S.joint > 0:
                    seen = dscore != 0.0
                    live = live | seen
                    w = load_vector(terms.weight, h, S.dim, D) * joint_slope(
                        own + kt, number(terms, 2).to(ACC), S
                    )
                    joined += tl.where(seen[:, None], dscore[:, None] * w, 0.0)
            if PER_HEAD and dedge_bias is not None:
                tl.store(dedge_bias + h.to(tl.int64) * plain(edges.bias_head) + ids, bias_grad, mask=inside)
            if S.joint > 0:
                send_to_features(
                    joined * scale, live, inside, ids, h, e0 == begin, dedge_x, dweight, edges, S, D
                )
        if not PER_HEAD and dedge_bias is not None:
            tl.store(dedge_bias + ids, bias_grad, mask=inside)
        if EDGE > 0 and dedge_x is not None:
            c = tl.arange(0, DE)
            at = dedge_x + ids.to(tl.int64)[:, None] * EDGE + c[None, :]
            tl.store(at, x_grad, mask=inside[:, None] & (c < EDGE)[None, :])


@triton.jit
def send_to_features(
    joined, live, inside, ids, h, is_first, dedge_x, dweight, edges, S: tl.constexpr, D: tl.constexpr
):
    """From the gradient J [E, D] of q + k + W e in one head: de += J W of the edges, and this program's share
    dW += J^T e. What is added to was written by this program: by that of an earlier head, of an earlier block
    of edges (not is_first).
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    d = tl.arange(0, D)
    ids = ids.to(tl.int64)
    tl.debug_barrier()  # another lane of the warp may have written what is read here
    weight = edges.weight + h.to(tl.int64) * (S.joint * S.dim) + d
    for c in range(S.joint):
        if dedge_x is not None:
            w = tl.load(weight + c * S.dim, mask=d < S.dim, other=0.0)
            at = dedge_x + ids * S.joint + c
            before = tl.load(at, mask=inside & (h > 0), other=0.0)
            tl.store(at, before + tl.sum(joined * w[None, :], 1), mask=inside)
        if dweight is not None:
            x = tl.load(edges.x + ids * S.joint + c, mask=live, other=0.0).to(ACC)
            program = tl.program_id(0).to(tl.int64)
            at = dweight + ((program * S.heads + h) * S.joint + c) * S.dim + d
            before = tl.load(at, mask=(d < S.dim) & (is_first == 0), other=0.0)
            tl.store(at, before + tl.sum(joined * x[:, None], 0), mask=d < S.dim)
