"""The tiled forward pass: one program for each (sequence, head, query tile, block of value columns)."""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import RUNTIME
from .mask import block_intervals, kept_pairs, key_ranges
from .softmax import RELU, SIGMOID, SOFTMAX, SOFTMAX1, online_softmax, row_lse, weigh
from .tile import (
    cached_keys,
    dot,
    dropout_kept,
    fresh,
    load_listed,
    load_rows,
    logits,
    number,
    rows_at,
    scores,
    sequence,
    store_rows,
    touched,
    unit_of,
    vector_at,
)


@triton.jit
def first_state(h, terms, unit, S: tl.constexpr, M: tl.constexpr):
    """(peak, total) before any key: the sink's, where there is one."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    peak = tl.full((M,), float("-inf"), ACC)
    total = tl.zeros((M,), ACC)
    if S.activation == SOFTMAX1:
        peak = tl.zeros((M,), ACC)
        total += 1.0
    if terms.sink is not None:
        peak = (tl.load(terms.sink + h).to(tl.float64) / unit).to(ACC) + tl.zeros((M,), ACC)
        total += 1.0
    return peak, total


@triton.jit
def attend_tile(
    acc, peak, total, q_tile, q, q_base, k, k_base, v, v_base, i, begin, end, j0, k_low, k_end, tile, b,
    h, column, seqlen_q, seqlen_k, max_k, rel_size, terms, mask, cache, factor,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHECK: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """The state (acc, peak, total) of a query tile after the key tile at j0. CHECK: the tile may hold pairs
    that are not kept, and keys outside of [k_low, k_end). EXTRA: k and v are the one more key that every
    query sees. cache: where keys lie (then CHECK, and k_base, v_base are those of the head), or None.
    """
    j = j0 + tl.arange(0, N)
    q_inside = i < seqlen_q
    k_inside = (j >= k_low) & (j < k_end) if CHECK else None
    if S.cached:
        k_at = cached_keys(k, cache, b, j, k_inside)
        keys = load_listed(k, k_base, k_at, k_inside, 0, S.dim, BLOCK_D)
    else:
        k_at = None
        keys = load_rows(k, k_base, j0, k_inside, 0, S.dim, N, BLOCK_D, S.far)
    s = scores(
        q_tile, q, q_base, i, q_inside, keys, k, k_base, j0, k_at, k_inside, terms, h, S, M, N, BLOCK_D, False
    )
    s, _ = logits(s, i, j, b, h, seqlen_q, seqlen_k, max_k, rel_size, terms, S, False, EXTRA)
    if CHECK:
        kept = kept_pairs(i, j, begin, end, tile, b, seqlen_q, seqlen_k, mask, False, EXTRA)
        s = tl.where(kept, s, float("-inf"))
    if S.activation == RELU or S.activation == SIGMOID:
        p = weigh(s, peak, peak, factor, S, False)
    else:
        peak, total, p, decay = online_softmax(peak, total, s, factor, S)
        acc = acc * decay[:, None]
    if S.dropout:
        at = max_k + tl.arange(0, N) if EXTRA else j
        p = tl.where(dropout_kept(i, at, b, h, terms, N, False, not EXTRA), p, 0.0)
    if S.cached:
        v_at = cached_keys(v, cache, b, j, k_inside)
        values = load_listed(v, v_base, v_at, k_inside, column, S.dim_v, BLOCK_DV)
    else:
        values = load_rows(v, v_base, j0, k_inside, column, S.dim_v, N, BLOCK_DV, S.far)
    values = touched(values, s, 0, CHECK or terms.bias is not None, S)
    acc += dot(p.to(values.dtype), values, S)
    return acc, peak, total


@triton.jit(do_not_specialize=RUNTIME)
def tiled_forward(
    q, k, v, out, lse, terms, mask, packed, tiles,
    seqlen_q, seqlen_k, blocks, left_end, right_end, left_start, right_start, rel_size,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """`tiles`: of a graph, (row pointers, ends of the whole tiles, columns, numbers), else empty."""
    COLUMNS: tl.constexpr = (S.dim_v + BLOCK_DV - 1) // BLOCK_DV
    TIGHT: tl.constexpr = S.tight and BLOCK_DV >= 128
    ONE: tl.constexpr = S.irregular or TIGHT  # one loop serves all tiles, and checks them
    program = tl.program_id(0)
    column = (program % COLUMNS) * BLOCK_DV
    # The last block first: under a causal mask it is the heaviest.
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
    k_base = rows_at(k, b, h // S.group, k_begin)
    v_base = rows_at(v, b, h // S.group, k_begin)
    q_tile = load_rows(q, q_base, block * M, i < seqlen_q, 0, S.dim, M, BLOCK_D, S.far)

    acc = fresh(blocks, M, BLOCK_DV, S)
    peak, total = first_state(h, terms, unit, S, M)
    if terms.extra_k is not None:
        acc, peak, total = attend_tile(
            acc, peak, total, q_tile, q, q_base, terms.extra_k, rows_at(terms.extra_k, b, h, q_begin * 0),
            terms.extra_v, rows_at(terms.extra_v, b, h, q_begin * 0), i, begin, end, 0, 0, 1, 0, b, h,
            column, seqlen_q, seqlen_k, max_k, rel_size, terms, mask, None, factor, S, M, 16, BLOCK_D,
            BLOCK_DV, True, True,
        )  # fmt: skip

    if S.graph:
        row_ptr, whole_end, columns, numbers = tiles
        first = tl.load(row_ptr + block)
        whole = tl.load(whole_end + block)
        last = tl.load(row_ptr + block + 1)
        for t in range(first, whole):
            acc, peak, total = attend_tile(
                acc, peak, total, q_tile, q, q_base, k, k_base, v, v_base, i, begin, end,
                tl.load(columns + t) * N, 0, seqlen_k, 0, b, h, column, seqlen_q, seqlen_k, max_k, rel_size,
                terms, mask, None, factor, S, M, N, BLOCK_D, BLOCK_DV, False, False,
            )  # fmt: skip
        for t in range(whole, last):
            acc, peak, total = attend_tile(
                acc, peak, total, q_tile, q, q_base, k, k_base, v, v_base, i, begin, end,
                tl.load(columns + t) * N, 0, seqlen_k, tl.load(numbers + t), b, h, column, seqlen_q, seqlen_k,
                max_k, rel_size, terms, mask, None, factor, S, M, N, BLOCK_D, BLOCK_DV, True, False,
            )  # fmt: skip
    else:
        low, first, full_first, full_last, last = key_ranges(i, begin, end, seqlen_q, terms.bias, N)
        if ONE:
            full_first, full_last = first, first
        if S.bounded_left and not ONE:
            for j0 in tl.range(first, full_first, N, disable_licm=TIGHT):
                acc, peak, total = attend_tile(
                    acc, peak, total, q_tile, q, q_base, k, k_base, v, v_base, i, begin, end, j0, low,
                    last, 0, b, h, column, seqlen_q, seqlen_k, max_k, rel_size, terms, mask, None, factor,
                    S, M, N, BLOCK_D, BLOCK_DV, True, False,
                )  # fmt: skip
        if not ONE:
            for j0 in tl.range(full_first, full_last, N, disable_licm=TIGHT):
                acc, peak, total = attend_tile(
                    acc, peak, total, q_tile, q, q_base, k, k_base, v, v_base, i, begin, end, j0, low,
                    last, 0, b, h, column, seqlen_q, seqlen_k, max_k, rel_size, terms, mask, None, factor,
                    S, M, N, BLOCK_D, BLOCK_DV, False, False,
                )  # fmt: skip
        for j0 in tl.range(full_last, last, N, disable_licm=TIGHT):
            acc, peak, total = attend_tile(
                acc, peak, total, q_tile, q, q_base, k, k_base, v, v_base, i, begin, end, j0, low, last,
                0, b, h, column, seqlen_q, seqlen_k, max_k, rel_size, terms, mask, None, factor, S, M, N,
                BLOCK_D, BLOCK_DV, True, False,
            )  # fmt: skip

    finish_tile(acc, peak, total, i, column, out, lse, b, h, q_begin, seqlen_q, terms, unit, S, M, BLOCK_DV)


@triton.jit
def divided(acc, total, terms, S: tl.constexpr):
    """The rows of out, of their whole state."""
    if S.dropout:
        acc = acc * number(terms, 3).to(acc.dtype)
    if S.activation == SOFTMAX or S.activation == SOFTMAX1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    return acc


@triton.jit
def finish_tile(
    acc, peak, total, i, column, out, lse, b, h, q_begin, seqlen_q, terms, unit,
    S: tl.constexpr, M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """From a query tile's whole state to its rows of out and lse."""
    acc = divided(acc, total, terms, S)
    if S.activation == SOFTMAX or S.activation == SOFTMAX1:
        rows = vector_at(lse, b, h, q_begin) + i
        tl.store(rows, row_lse(peak, total, unit), mask=(i < seqlen_q) & (column == 0))
    first = tl.min(i, 0)
    store_rows(out, rows_at(out, b, h, q_begin), first, seqlen_q, column, acc, S.dim_v, M, BLOCK_DV, S.far)
