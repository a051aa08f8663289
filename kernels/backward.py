"""The tiled backward pass, from lse: one pass over key tiles for dK and dV, one over query tiles for dQ, so
that no two programs add to the same number and every result repeats bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import RUNTIME, plain
from .mask import block_intervals, kept_pairs, key_ranges, row_ranges
from .softmax import RELU, SIGMOID, logit_gradient, split_lse, weigh
from .tile import (
    DOT,
    column_sums,
    dot,
    dropout_kept,
    fresh,
    joint,
    joint_slope,
    load_rows,
    logits,
    number,
    products,
    rows_at,
    score_gradient,
    scores,
    sequence,
    store_rows,
    touched,
    unit_of,
    vector_at,
)


class Statistics(NamedTuple):
    """Three numbers for each row, as `weigh` and `logit_gradient` take them: high, low, delta. `runtime`
    strides.
    """

    ptr: Any  # [3, B, H, Sq], or [3, H, total]
    plane: Any
    batch: Any
    head: Any


@triton.jit(do_not_specialize=RUNTIME)
def row_statistics(
    out, dout, dlse, lse, stats, terms, packed, seqlen_q, blocks,
    S: tl.constexpr, M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta_i = dO_i . O_i - dlse_i: the sum over the row of p dp, less what reaches the logits through lse.
    It is left out where dout is None.
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    program = tl.program_id(0)
    block = program % blocks
    h = (program // blocks) % S.heads
    b = program // blocks // S.heads
    seqlen_q, seqlen_k, q_begin, k_begin = sequence(b, seqlen_q, seqlen_q, packed)
    i = block * M + tl.arange(0, M)
    inside = i < seqlen_q
    at = vector_at(stats, b, h, q_begin) + i
    unit, factor = unit_of(terms, S)
    high, low = split_lse(tl.load(vector_at(lse, b, h, q_begin) + i, mask=inside, other=0.0), unit, S)
    tl.store(at, high, mask=inside)
    tl.store(at + plain(stats.plane), low, mask=inside)
    if dout is not None:
        total = tl.zeros((M,), ACC)
        out_base = rows_at(out, b, h, q_begin)
        do_base = rows_at(dout, b, h, q_begin)
        for column in range(0, S.dim_v, BLOCK_DV):
            x = load_rows(out, out_base, block * M, inside, column, S.dim_v, M, BLOCK_DV, S.far)
            y = load_rows(dout, do_base, block * M, inside, column, S.dim_v, M, BLOCK_DV, S.far)
            total += tl.sum(x.to(ACC) * y.to(ACC), 1)
        if dlse is not None:
            total -= tl.load(vector_at(dlse, b, h, q_begin) + i, mask=inside, other=0.0).to(ACC)
        tl.store(at + 2 * plain(stats.plane), total, mask=inside)


@triton.jit
def load_statistics(stats, b, h, q_begin, i, inside, S: tl.constexpr):
    """(high, low, delta) of rows i."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    zero = tl.zeros(i.shape, ACC)
    if S.activation == RELU or S.activation == SIGMOID:
        return zero, zero, zero
    else:
        at = vector_at(stats, b, h, q_begin) + i
        high = tl.load(at, mask=inside, other=0.0)
        delta = tl.load(at + 2 * plain(stats.plane), mask=inside, other=0.0)
        low = zero
        if S.exact:
            low = tl.load(at + plain(stats.plane), mask=inside, other=0.0)
        return high, low, delta


@triton.jit
def tile_gradient(
    q_tile, q, q_base, do_tile, do, do_base, k_tile, k, k_base, v_tile, v, v_base, i, q_inside, begin, end,
    high, low, delta, j0, k_inside, tile, b, h, seqlen_q, seqlen_k, max_k, rel_size, terms, mask, factor,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHECK: tl.constexpr, TRANSPOSED: tl.constexpr, EXTRA: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """(s, weights after dropout, dL/dlogit, dL/dscore) of a tile, all 0 where the pair is not kept (s: -inf).

    q_tile, do_tile, k_tile and v_tile hold the first block of columns (see `products`).
    """
    j = j0 + tl.arange(0, N)
    s = scores(
        q_tile, q, q_base, i, q_inside, k_tile, k, k_base, j0, None, k_inside, terms, h, S, M, N, BLOCK_D,
        TRANSPOSED,
    )  # fmt: skip
    s, bent = logits(s, i, j, b, h, seqlen_q, seqlen_k, max_k, rel_size, terms, S, TRANSPOSED, EXTRA)
    if CHECK:
        kept = kept_pairs(i, j, begin, end, tile, b, seqlen_q, seqlen_k, mask, TRANSPOSED, EXTRA)
        s = tl.where(kept, s, float("-inf"))
    p = weigh(s, high, low, factor, S, TRANSPOSED)
    dp = products(
        do_tile, do, do_base, tl.min(i, 0), q_inside, v_tile, v, v_base, j0, k_inside, S, S.dim_v,
        BLOCK_DV, M, N, TRANSPOSED,
    )  # fmt: skip
    used = p
    if S.dropout:
        at = max_k + tl.arange(0, N) if EXTRA else j
        stays = dropout_kept(i, at, b, h, terms, N, TRANSPOSED, ALIGNED and not EXTRA)
        rest = number(terms, 3).to(p.dtype)
        dp = tl.where(stays, dp * rest, 0.0)
        used = tl.where(stays, p * rest, 0.0)
    ds = logit_gradient(s, p, dp, delta, S, TRANSPOSED)
    if CHECK or terms.bias is not None:
        ds = tl.where(s == float("-inf"), 0.0, ds)  # whatever a hidden value made of dp
    return s, used, ds, score_gradient(ds, bent, S)


@triton.jit
def additive_gradient(
    total, dscore, q, q_base, i, q_inside, k, k_base, j, k_inside, column, terms, h,
    S: tl.constexpr, BLOCK_D: tl.constexpr, TRANSPOSED: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """total [rows, BLOCK_D] plus what the additive scores of a tile send to the vectors of its rows: q where
    AXIS is that of the keys, k where it is that of the queries.
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    slope = number(terms, 2).to(ACC)
    d_at = tl.arange(0, BLOCK_D)
    for d in range(column, tl.minimum(column + BLOCK_D, S.dim)):
        x = column_sums(q, q_base, i, q_inside, k, k_base, j, None, k_inside, d, TRANSPOSED, ACC)
        w = tl.load(terms.weight + h * S.dim + d)
        # What stands in a hidden key is not to be touched, not even by 0.
        g = tl.where(dscore == 0.0, 0.0, dscore * joint_slope(x, slope, S)) * w
        total += tl.where(d_at == d - column, 1.0, 0.0)[None, :] * tl.sum(g, AXIS)[:, None]
    return total


@triton.jit
def weight_gradient(
    total, dscore, q, q_base, i, q_inside, k, k_base, j, k_inside, column, terms,
    S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """total [BLOCK_D] plus the sum over a tile of dscore * phi(q + k)."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    slope = number(terms, 2).to(ACC)
    d_at = tl.arange(0, BLOCK_D)
    for d in range(column, tl.minimum(column + BLOCK_D, S.dim)):
        x = column_sums(q, q_base, i, q_inside, k, k_base, j, None, k_inside, d, False, ACC)
        g = tl.where(dscore == 0.0, 0.0, dscore * joint(x, slope, S))
        total += tl.where(d_at == d - column, 1.0, 0.0) * tl.sum(tl.sum(g, 1), 0)
    return total


@triton.jit
def query_tile(
    dq, dw, q_tile, q, q_base, do_tile, do, do_base, k, k_base, v, v_base, i, begin, end, high, low, delta,
    j0, k_low, k_end, tile, b, h, column, seqlen_q, seqlen_k, max_k, rel_size, terms, mask, factor,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WEIGHT: tl.constexpr, CHECK: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """dq [M, BLOCK_D] and dw [BLOCK_D] of a query tile after the key tile at j0."""
    j = j0 + tl.arange(0, N)
    q_inside = i < seqlen_q
    k_inside = (j >= k_low) & (j < k_end) if CHECK else None
    k_tile = load_rows(k, k_base, j0, k_inside, 0, S.dim, N, BLOCK_D, S.far)
    v_tile = load_rows(v, v_base, j0, k_inside, 0, S.dim_v, N, BLOCK_DV, S.far)
    s, _, _, dscore = tile_gradient(
        q_tile, q, q_base, do_tile, do, do_base, k_tile, k, k_base, v_tile, v, v_base, i, q_inside, begin,
        end, high, low, delta, j0, k_inside, tile, b, h, seqlen_q, seqlen_k, max_k, rel_size, terms, mask,
        factor, S, M, N, BLOCK_D, BLOCK_DV, CHECK, False, EXTRA, True,
    )  # fmt: skip
    if S.score == DOT:
        if S.dim > BLOCK_D:
            k_tile = load_rows(k, k_base, j0, k_inside, column, S.dim, N, BLOCK_D, S.far)
        k_tile = touched(k_tile, s, 0, CHECK or terms.bias is not None, S)
        dq += dot(dscore.to(k_tile.dtype), k_tile, S)
    else:
        dq = additive_gradient(
            dq, dscore, q, q_base, i, q_inside, k, k_base, j, k_inside, column, terms, h, S, BLOCK_D, False, 1
        )
        if WEIGHT:
            dw = weight_gradient(
                dw, dscore, q, q_base, i, q_inside, k, k_base, j, k_inside, column, terms, S, BLOCK_D
            )
    return dq, dw


@triton.jit(do_not_specialize=RUNTIME)
def tiled_backward_q(
    q, k, v, dout, dq, dweight, stats, terms, mask, packed, tiles,
    seqlen_q, seqlen_k, blocks, left_end, right_end, left_start, right_start, rel_size,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dQ, and each query tile's share of the score's weight: dweight [B, H, blocks, D]; or one of them."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    COLUMNS: tl.constexpr = (S.dim + BLOCK_D - 1) // BLOCK_D
    TIGHT: tl.constexpr = S.tight and BLOCK_D >= 128
    ONE: tl.constexpr = S.irregular or TIGHT  # one loop serves all tiles, and checks them
    WEIGHT: tl.constexpr = dweight is not None
    program = tl.program_id(0)
    column = (program % COLUMNS) * BLOCK_D
    block = blocks - 1 - (program // COLUMNS) % blocks
    h = (program // COLUMNS // blocks) % S.heads
    b = program // COLUMNS // blocks // S.heads
    max_k = seqlen_k
    band = (left_end, right_end, left_start, right_start)
    seqlen_q, seqlen_k, q_begin, k_begin = sequence(b, seqlen_q, seqlen_k, packed)

    i = block * M + tl.arange(0, M)
    begin, end = block_intervals(i, b, h, seqlen_q, seqlen_k, band, mask)
    unit, factor = unit_of(terms, S)
    q_base = rows_at(q, b, h, q_begin)
    do_base = rows_at(dout, b, h, q_begin)
    k_base = rows_at(k, b, h // S.group, k_begin)
    v_base = rows_at(v, b, h // S.group, k_begin)
    q_tile = load_rows(q, q_base, block * M, i < seqlen_q, 0, S.dim, M, BLOCK_D, S.far)
    do_tile = load_rows(dout, do_base, block * M, i < seqlen_q, 0, S.dim_v, M, BLOCK_DV, S.far)
    high, low, deltas = load_statistics(stats, b, h, q_begin, i, i < seqlen_q, S)

    acc = fresh(blocks, M, BLOCK_D, S)
    dw = tl.zeros((BLOCK_D,), ACC)
    if terms.extra_k is not None:
        acc, dw = query_tile(
            acc, dw, q_tile, q, q_base, do_tile, dout, do_base, terms.extra_k, rows_at(terms.extra_k, b,
            h, q_begin * 0), terms.extra_v, rows_at(terms.extra_v, b, h, q_begin * 0), i, begin, end,
            high, low, deltas, 0, 0, 1, 0, b, h, column, seqlen_q, seqlen_k, max_k, rel_size, terms, mask,
            factor, S, M, 16, BLOCK_D, BLOCK_DV, WEIGHT, True, True,
        )  # fmt: skip
    if S.graph:
        row_ptr, whole_end, columns, numbers = tiles
        first = tl.load(row_ptr + block)
        whole = tl.load(whole_end + block)
        last = tl.load(row_ptr + block + 1)
        for t in range(first, whole):
            acc, dw = query_tile(
                acc, dw, q_tile, q, q_base, do_tile, dout, do_base, k, k_base, v, v_base, i, begin, end,
                high, low, deltas, tl.load(columns + t) * N, 0, seqlen_k, 0, b, h, column, seqlen_q,
                seqlen_k, max_k, rel_size, terms, mask, factor, S, M, N, BLOCK_D, BLOCK_DV, WEIGHT, False,
                False,
            )  # fmt: skip
        for t in range(whole, last):
            acc, dw = query_tile(
                acc, dw, q_tile, q, q_base, do_tile, dout, do_base, k, k_base, v, v_base, i, begin, end,
                high, low, deltas, tl.load(columns + t) * N, 0, seqlen_k, tl.load(numbers + t), b, h,
                column, seqlen_q, seqlen_k, max_k, rel_size, terms, mask, factor, S, M, N, BLOCK_D,
                BLOCK_DV, WEIGHT, True, False,
            )  # fmt: skip
    else:
        k_low, first, full_first, full_last, last = key_ranges(i, begin, end, seqlen_q, terms.bias, N)
        if ONE:
            full_first, full_last = first, first
        if S.bounded_left and not ONE:
            for j0 in tl.range(first, full_first, N, disable_licm=TIGHT):
                acc, dw = query_tile(
                    acc, dw, q_tile, q, q_base, do_tile, dout, do_base, k, k_base, v, v_base, i, begin,
                    end, high, low, deltas, j0, k_low, last, 0, b, h, column, seqlen_q, seqlen_k, max_k,
                    rel_size, terms, mask, factor, S, M, N, BLOCK_D, BLOCK_DV, WEIGHT, True, False,
                )  # fmt: skip
        if not ONE:
            for j0 in tl.range(full_first, full_last, N, disable_licm=TIGHT):
                acc, dw = query_tile(
                    acc, dw, q_tile, q, q_base, do_tile, dout, do_base, k, k_base, v, v_base, i, begin,
                    end, high, low, deltas, j0, k_low, last, 0, b, h, column, seqlen_q, seqlen_k, max_k,
                    rel_size, terms, mask, factor, S, M, N, BLOCK_D, BLOCK_DV, WEIGHT, False, False,
                )  # fmt: skip
        for j0 in tl.range(full_last, last, N, disable_licm=TIGHT):
            acc, dw = query_tile(
                acc, dw, q_tile, q, q_base, do_tile, dout, do_base, k, k_base, v, v_base, i, begin, end,
                high, low, deltas, j0, k_low, last, 0, b, h, column, seqlen_q, seqlen_k, max_k, rel_size,
                terms, mask, factor, S, M, N, BLOCK_D, BLOCK_DV, WEIGHT, True, False,
            )  # fmt: skip
    scale = number(terms, 0).to(ACC)
    if dq is not None:
        store_rows(
            dq, rows_at(dq, b, h, q_begin), block * M, seqlen_q, column, acc * scale, S.dim, M, BLOCK_D, S.far
        )
    if WEIGHT:
        d = column + tl.arange(0, BLOCK_D)
        at = dweight + ((b.to(tl.int64) * S.heads + h) * blocks + block) * S.dim + d
        tl.store(at, dw * scale, mask=d < S.dim)


@triton.jit
def key_tile(
    dk, dv, q, q_base, do, do_base, k_tile, k, k_base, v_tile, v, v_base, i0, j0, k_inside, tile,
    stats, b, h, q_begin, k_column, v_column, seqlen_q, seqlen_k, max_k, rel_size, terms, mask, band,
    unit, factor,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHECK: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """dk [N, BLOCK_D] and dv [N, BLOCK_DV] of a key tile after the query tile at i0; tiles are transposed."""
    i = i0 + tl.arange(0, M)
    begin, end = block_intervals(i, b, h, seqlen_q, seqlen_k, band, mask)
    high, low, deltas = load_statistics(stats, b, h, q_begin, i, i < seqlen_q, S)
    # A row that keeps no key is not touched.
    q_inside = (i < seqlen_q if EXTRA else begin < end) if CHECK else None
    q_tile = load_rows(q, q_base, i0, q_inside, 0, S.dim, M, BLOCK_D, S.far)
    do_tile = load_rows(do, do_base, i0, q_inside, 0, S.dim_v, M, BLOCK_DV, S.far)
    s, used, _, dscore = tile_gradient(
        q_tile, q, q_base, do_tile, do, do_base, k_tile, k, k_base, v_tile, v, v_base, i, q_inside, begin,
        end, high, low, deltas, j0, k_inside, tile, b, h, seqlen_q, seqlen_k, max_k, rel_size, terms,
        mask, factor, S, M, N, BLOCK_D, BLOCK_DV, CHECK, True, EXTRA, True,
    )  # fmt: skip
    if S.dim_v > BLOCK_DV:
        do_tile = load_rows(do, do_base, i0, q_inside, v_column, S.dim_v, M, BLOCK_DV, S.far)
    if S.dim > BLOCK_D:
        q_tile = load_rows(q, q_base, i0, q_inside, k_column, S.dim, M, BLOCK_D, S.far)
    do_tile = touched(do_tile, s, 0, CHECK or terms.bias is not None, S)
    q_tile = touched(q_tile, s, 0, CHECK or terms.bias is not None, S)
    dv += dot(used.to(do_tile.dtype), do_tile, S)
    if S.score == DOT:
        dk += dot(dscore.to(q_tile.dtype), q_tile, S)
    else:
        j = j0 + tl.arange(0, N)
        dk = additive_gradient(
            dk,
            dscore,
            q,
            q_base,
            i,
            q_inside,
            k,
            k_base,
            j,
            k_inside,
            k_column,
            terms,
            h,
            S,
            BLOCK_D,
            True,
            1,
        )
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME)
def tiled_backward_kv(
    q, k, v, dout, dk, dv, stats, terms, mask, packed, tiles,
    seqlen_q, seqlen_k, blocks, left_end, right_end, left_start, right_start, rel_size,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    EXTRA: tl.constexpr,
):  # fmt: skip
    """dK and dV, summed over the query heads of a key head in their order. EXTRA: of the one more key of each
    query head, dk and dv [B, H, 1, D]. `tiles` are by key tile.
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    COLUMNS: tl.constexpr = (S.dim + BLOCK_D - 1) // BLOCK_D
    V_COLUMNS: tl.constexpr = (S.dim_v + BLOCK_DV - 1) // BLOCK_DV
    WAYS: tl.constexpr = COLUMNS if COLUMNS > V_COLUMNS else V_COLUMNS
    TIGHT: tl.constexpr = S.tight and BLOCK_D >= 64
    ONE: tl.constexpr = S.irregular or TIGHT  # one loop serves all tiles, and checks them
    GROUP: tl.constexpr = 1 if EXTRA else S.group
    HEADS: tl.constexpr = S.heads // GROUP
    program = tl.program_id(0)
    way = program % WAYS
    block = (program // WAYS) % blocks
    hk = (program // WAYS // blocks) % HEADS
    b = program // WAYS // blocks // HEADS
    max_k = seqlen_k
    band = (left_end, right_end, left_start, right_start)
    seqlen_q, seqlen_k, q_begin, k_begin = sequence(b, seqlen_q, seqlen_k, packed)
    if EXTRA:
        k_begin = k_begin * 0

    j0 = block * N
    k_end = seqlen_k
    if EXTRA:
        k_end = block + 1
    unit, factor = unit_of(terms, S)
    k_base = rows_at(k, b, hk, k_begin)
    v_base = rows_at(v, b, hk, k_begin)
    k_inside = j0 + tl.arange(0, N) < k_end
    k_tile = load_rows(k, k_base, j0, k_inside, 0, S.dim, N, BLOCK_D, S.far)
    v_tile = load_rows(v, v_base, j0, k_inside, 0, S.dim_v, N, BLOCK_DV, S.far)
    dk_acc = fresh(blocks, N, BLOCK_D, S)
    dv_acc = fresh(blocks + 1, N, BLOCK_DV, S)
    for g in tl.range(GROUP, disable_licm=TIGHT):
        h = hk * GROUP + g
        q_base = rows_at(q, b, h, q_begin)
        do_base = rows_at(dout, b, h, q_begin)
        if S.graph and not EXTRA:
            ptr, whole_end, rows, numbers = tiles
            first = tl.load(ptr + block)
            whole = tl.load(whole_end + block)
            last = tl.load(ptr + block + 1)
            for t in tl.range(first, whole, disable_licm=TIGHT):
                dk_acc, dv_acc = key_tile(
                    dk_acc, dv_acc, q, q_base, dout, do_base, k_tile, k, k_base, v_tile, v, v_base,
                    tl.load(rows + t) * M, j0, k_inside, 0, stats, b, h, q_begin, way * BLOCK_D, way *
                    BLOCK_DV, seqlen_q, seqlen_k, max_k, rel_size, terms, mask, band, unit, factor, S, M,
                    N, BLOCK_D, BLOCK_DV, False, EXTRA,
                )  # fmt: skip
            for t in tl.range(whole, last, disable_licm=TIGHT):
                dk_acc, dv_acc = key_tile(
                    dk_acc, dv_acc, q, q_base, dout, do_base, k_tile, k, k_base, v_tile, v, v_base,
                    tl.load(rows + t) * M, j0, k_inside, tl.load(numbers + t), stats, b, h, q_begin, way *
                    BLOCK_D, way * BLOCK_DV, seqlen_q, seqlen_k, max_k, rel_size, terms, mask, band, unit,
                    factor, S, M, N, BLOCK_D, BLOCK_DV, True, EXTRA,
                )  # fmt: skip
        else:
            first, full_first, full_last, last = row_ranges(j0, b, h, seqlen_q, seqlen_k, band, mask, M, N)
            if EXTRA:
                first, full_first, full_last, last = 0, 0, 0, seqlen_q
            if ONE:
                full_first, full_last = first, first
            # Tiles that must be checked, on either side of the others, in one loop.
            before = (full_first - first + M - 1) // M
            checked = before + (last - full_last + M - 1) // M
            for t in tl.range(0, checked, disable_licm=TIGHT):
                i0 = tl.where(t < before, first + t * M, full_last + (t - before) * M)
                dk_acc, dv_acc = key_tile(
                    dk_acc, dv_acc, q, q_base, dout, do_base, k_tile, k, k_base, v_tile, v, v_base, i0,
                    j0, k_inside, 0, stats, b, h, q_begin, way * BLOCK_D, way * BLOCK_DV, seqlen_q,
                    seqlen_k, max_k, rel_size, terms, mask, band, unit, factor, S, M, N, BLOCK_D,
                    BLOCK_DV, True, EXTRA,
                )  # fmt: skip
            if not ONE and not EXTRA:
                for i0 in tl.range(full_first, full_last, M, disable_licm=TIGHT):
                    dk_acc, dv_acc = key_tile(
                        dk_acc, dv_acc, q, q_base, dout, do_base, k_tile, k, k_base, v_tile, v, v_base,
                        i0, j0, k_inside, 0, stats, b, h, q_begin, way * BLOCK_D, way * BLOCK_DV,
                        seqlen_q, seqlen_k, max_k, rel_size, terms, mask, band, unit, factor, S, M, N,
                        BLOCK_D, BLOCK_DV, False, EXTRA,
                    )  # fmt: skip
    # Counted again, so that nothing but the sums is kept through the loops.
    program = tl.program_id(0) + tl.where(blocks < 0, blocks, 0)
    way = program % WAYS
    j0 = (program // WAYS) % blocks * N
    hk = (program // WAYS // blocks) % HEADS
    b = program // WAYS // blocks // HEADS
    if dk is not None:
        scaled = dk_acc * number(terms, 0).to(ACC)
        store_rows(
            dk, rows_at(dk, b, hk, k_begin), j0, k_end, way * BLOCK_D, scaled, S.dim, N, BLOCK_D, S.far
        )
    if dv is not None:
        store_rows(
            dv, rows_at(dv, b, hk, k_begin), j0, k_end, way * BLOCK_DV, dv_acc, S.dim_v, N, BLOCK_DV, S.far
        )
