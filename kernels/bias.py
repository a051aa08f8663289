"""Gradients of what is added to the logits: a dense bias in any broadcast shape, and biases of the distance.

Each number is the sum of one program in a fixed order. A pass of its own recomputes the tiles: where the bias
is broadcast, the passes over queries and keys would each have to add to numbers of others.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .arguments import RUNTIME
from .backward import load_statistics, tile_gradient
from .call import Call, blocks_of, cdiv
from .mask import block_intervals
from .tile import load_rows, relative_rows, rows_at, sequence, unit_of


@triton.jit
def logit_gradients(
    q, k, v, dout, stats, b, h, i0, j0, tile, seqlen_q, seqlen_k, q_begin, k_begin, max_k, rel_size, terms,
    mask, band, unit, factor,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """dL/dlogit [M, N] of the tile at (i0, j0), 0 where no pair is kept."""
    i = i0 + tl.arange(0, M)
    begin, end = block_intervals(i, b, h, seqlen_q, seqlen_k, band, mask)
    high, low, deltas = load_statistics(stats, b, h, q_begin, i, i < seqlen_q, S)
    q_base = rows_at(q, b, h, q_begin)
    do_base = rows_at(dout, b, h, q_begin)
    k_base = rows_at(k, b, h // S.group, k_begin)
    v_base = rows_at(v, b, h // S.group, k_begin)
    j = j0 + tl.arange(0, N)
    q_inside = i < seqlen_q
    k_inside = (j >= 0) & (j < seqlen_k)
    q_tile = load_rows(q, q_base, i0, q_inside, 0, S.dim, M, BLOCK_D, S.far)
    do_tile = load_rows(dout, do_base, i0, q_inside, 0, S.dim_v, M, BLOCK_DV, S.far)
    k_tile = load_rows(k, k_base, j0, k_inside, 0, S.dim, N, BLOCK_D, S.far)
    v_tile = load_rows(v, v_base, j0, k_inside, 0, S.dim_v, N, BLOCK_DV, S.far)
    _, _, ds, _ = tile_gradient(
        q_tile, q, q_base, do_tile, dout, do_base, k_tile, k, k_base, v_tile, v, v_base, i, q_inside,
        begin, end, high, low, deltas, j0, k_inside, tile, b, h, seqlen_q, seqlen_k, max_k, rel_size,
        terms, mask, factor, S, M, N, BLOCK_D, BLOCK_DV, True, False, False, ALIGNED,
    )  # fmt: skip
    return ds


@triton.jit
def tile_of(tiles, block, j0, N: tl.constexpr):
    """The number of a graph's tile at a row of tiles and a key, or -1."""
    row_ptr, _, columns, numbers = tiles
    found = -1
    for t in range(tl.load(row_ptr + block), tl.load(row_ptr + block + 1)):
        if tl.load(columns + t) == j0 // N:
            found = tl.load(numbers + t)
    return found


@triton.jit(do_not_specialize=RUNTIME)
def dense_bias_gradient(
    q, k, v, dout, dbias, stats, terms, mask, packed, tiles,
    seqlen_q, seqlen_k, batch, left_end, right_end, left_start, right_start, rel_size,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    OVER_B: tl.constexpr, OVER_H: tl.constexpr, OVER_Q: tl.constexpr, OVER_K: tl.constexpr,
):  # fmt: skip
    """dbias, contiguous, of size 1 where OVER_* sums over that dimension."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    rows = (seqlen_q + M - 1) // M
    cols = (seqlen_k + N - 1) // N
    row_ways = 1 if OVER_Q else rows
    col_ways = 1 if OVER_K else cols
    program = tl.program_id(0)
    n_first = program % col_ways
    m_first = program // col_ways % row_ways
    h_first = program // col_ways // row_ways % (1 if OVER_H else S.heads)
    b_first = program // col_ways // row_ways // (1 if OVER_H else S.heads)
    band = (left_end, right_end, left_start, right_start)
    unit, factor = unit_of(terms, S)
    zero = b_first.to(tl.int64) * 0
    total = tl.zeros((M, N), ACC)
    for b in range(b_first, batch if OVER_B else b_first + 1):
        for h in range(h_first, S.heads if OVER_H else h_first + 1):
            for m in range(m_first, rows if OVER_Q else m_first + 1):
                for n in range(n_first, cols if OVER_K else n_first + 1):
                    i = m * M + tl.arange(0, M)
                    b_at = b + program * 0  # as a tensor, whatever the loop made of it
                    h_at = h + program * 0
                    begin, end = block_intervals(i, b_at, h_at, seqlen_q, seqlen_k, band, mask)
                    some = (begin < end) & (begin < (n + 1) * N) & (end > n * N)
                    tile = program * 0
                    if S.graph:
                        tile += tile_of(tiles, m, n * N, N)
                    if (tl.max(some.to(tl.int32), 0) != 0) & (tile >= 0):
                        total += logit_gradients(
                            q, k, v, dout, stats, b_at, h_at, m * M, n * N, tile, seqlen_q, seqlen_k,
                            zero, zero, seqlen_k, rel_size, terms, mask, band, unit, factor,
                            S, M, N, BLOCK_D, BLOCK_DV, True,
                        )  # fmt: skip
    bh = b_first.to(tl.int64) * (1 if OVER_H else S.heads) + h_first
    i = m_first * M + tl.arange(0, M)
    j = n_first * N + tl.arange(0, N)
    if OVER_Q and OVER_K:
        tl.store(dbias + bh, tl.sum(tl.sum(total, 1), 0))
    elif OVER_Q:
        tl.store(dbias + bh * seqlen_k + j, tl.sum(total, 0), mask=j < seqlen_k)
    elif OVER_K:
        tl.store(dbias + bh * seqlen_q + i, tl.sum(total, 1), mask=i < seqlen_q)
    else:
        at = (bh * seqlen_q + i)[:, None] * seqlen_k + j[None, :]
        tl.store(dbias + at, total, mask=(i < seqlen_q)[:, None] & (j < seqlen_k)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def relative_bias_gradient(
    q, k, v, dout, drel, stats, terms, mask, packed, tiles,
    seqlen_q, seqlen_k, batch, left_end, right_end, left_start, right_start, rel_size,
    S: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """drel [H, rel_size]: sums along diagonals. A program owns N neighbouring ones, so chosen that in a dense
    call key tiles begin at multiples of N. Of the rows i0 .. i0 + N - 1 their keys lie in two tiles, of which
    the pair (row r, column c) is on diagonal c - r, or c - r + N.
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    DENSE: tl.constexpr = packed.cu_q is None
    before = (N - (seqlen_q - 1) % N) % N
    ways = (rel_size + before + N - 1) // N
    program = tl.program_id(0)
    first = (program % ways) * N - before
    h = program // ways
    max_q, max_k = seqlen_q, seqlen_k
    band = (left_end, right_end, left_start, right_start)
    unit, factor = unit_of(terms, S)
    r = tl.arange(0, N)
    total = tl.zeros((N,), ACC)
    for b in range(batch):
        b_at = b + program * 0
        sq, sk, q_begin, k_begin = sequence(b_at, max_q, max_k, packed)
        for i0 in range(0, sq, N):
            j0 = first - (max_k - 1) + i0 + sk - sq
            for half in tl.static_range(2):
                low = j0 + half * N
                if (low + N > 0) & (low < sk):
                    i = i0 + r
                    tile = program * 0
                    if S.graph:
                        tile += tile_of(tiles, i0 // N, low, N)
                    begin, end = block_intervals(i, b_at, h, sq, sk, band, mask)
                    some = (begin < end) & (begin < low + N) & (end > low)
                    if (tl.max(some.to(tl.int32), 0) != 0) & (tile >= 0):
                        ds = logit_gradients(
                            q, k, v, dout, stats, b_at, h, i0, low, tile, sq, sk, q_begin, k_begin, max_k,
                            rel_size, terms, mask, band, unit, factor, S, N, N, BLOCK_D, BLOCK_DV, DENSE,
                        )  # fmt: skip
                        column = r[:, None] + r[None, :] - half * N
                        inside = (column >= 0) & (column < N)
                        skewed = tl.gather(ds, tl.where(inside, column, 0), 1)
                        total += tl.sum(tl.where(inside, skewed, 0.0), 0)
    at = first + r
    tl.store(drel + h.to(tl.int64) * rel_size + at, total, mask=(at >= 0) & (at < rel_size))


@triton.jit(do_not_specialize=RUNTIME)
def query_bias_gradient(
    q, k, v, dout, drel, stats, terms, mask, packed, tiles,
    seqlen_q, seqlen_k, blocks, left_end, right_end, left_start, right_start, rel_size,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """drel of a bias by query, which comes full of zeros. A program owns the rows of M queries. Between the
    ends of a row each number belongs to one key; the ends sum the far ones.
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    DENSE: tl.constexpr = packed.cu_q is None
    program = tl.program_id(0)
    block = program % blocks
    h = program // blocks % S.heads
    b = program // blocks // S.heads
    max_k = seqlen_k
    sq, sk, q_begin, k_begin = sequence(b, seqlen_q, seqlen_k, packed)
    band = (left_end, right_end, left_start, right_start)
    unit, factor = unit_of(terms, S)
    reach = rel_size // 2
    i = block * M + tl.arange(0, M)
    begin, end = block_intervals(i, b, h, sq, sk, band, mask)
    rows = relative_rows(drel, i, b, h, rel_size, terms)
    first = tl.zeros((M,), ACC)
    last = tl.zeros((M,), ACC)
    for j0 in range(0, sk, N):
        some = (i < sq) & (begin < end) & (begin < j0 + N) & (end > j0)
        tile = program * 0
        if S.graph:
            tile += tile_of(tiles, block, j0, N)
        if (tl.max(some.to(tl.int32), 0) != 0) & (tile >= 0):
            ds = logit_gradients(
                q, k, v, dout, stats, b, h, block * M, j0, tile, sq, sk, q_begin, k_begin, max_k, rel_size,
                terms, mask, band, unit, factor, S, M, N, BLOCK_D, BLOCK_DV, DENSE,
            )  # fmt: skip
            j = j0 + tl.arange(0, N)
            delta = j[None, :] - i[:, None] - (sk - sq)
            inside = (i < sq)[:, None] & (j < sk)[None, :]
            near = (delta > -reach) & (delta < reach)
            tl.store(rows[:, None] + (delta + reach), ds, mask=inside & near)
            first += tl.sum(tl.where(inside & (delta <= -reach), ds, 0.0), 1)
            last += tl.sum(tl.where(inside & (delta >= reach) & (delta > -reach), ds, 0.0), 1)
    # With a reach of 0 both ends are one number.
    tl.store(rows, first + tl.where(reach == 0, last, 0.0), mask=i < sq)
    tl.store(rows + rel_size - 1, last, mask=(i < sq) & (reach > 0))


def dense_gradient(call: Call, state: tuple[Any, ...], dbias: Tensor) -> None:
    """Fill dbias, whose dimensions of size 1 are summed over."""
    assert call.bias is not None
    over = [size == 1 for size in dbias.shape]
    shape = call.config("bias")
    sizes = (call.batch, call.heads, cdiv(call.seqlen_q, shape.block_m), cdiv(call.seqlen_k, shape.block_n))
    grid = 1
    for size, summed in zip(sizes, over, strict=True):
        grid *= 1 if summed else size
    if not call.seqlen_k:
        dbias.zero_()
    elif grid:
        _launch(dense_bias_gradient, call, state, dbias, grid, call.batch, M=shape.block_m, N=shape.block_n,
                **{f"OVER_{name}": summed for name, summed in zip("BHQK", over, strict=True)})  # fmt: skip


def relative_gradient(call: Call, state: tuple[Any, ...], drel: Tensor) -> None:
    """Fill drel, of rel_bias's shape."""
    shape = call.config("bias")
    if call.is_by_query:
        drel.zero_()
        blocks = cdiv(call.seqlen_q, shape.block_m)
        if grid := blocks * call.heads * call.batch:
            _launch(query_bias_gradient, call, state, drel, grid, blocks, M=shape.block_m, N=shape.block_n)
        return
    before = -(call.seqlen_q - 1) % shape.block_n
    grid = cdiv(drel.shape[1] + before, shape.block_n) * call.heads
    if call.seqlen_q and grid:
        _launch(relative_bias_gradient, call, state, drel, grid, call.batch, N=shape.block_n)


def _launch(
    kernel: Any, call: Call, state: tuple[Any, ...], grad: Tensor, grid: int, count: int, **tile: Any
) -> None:
    shape = call.config("bias")
    dout, stats = state
    kernel[(grid,)](
        call.rows(call.q), call.rows(call.k), call.rows(call.v), dout, grad, stats, call.terms(),
        call.mask(), call.packed(), call.tile_lists(False), *call.lengths_and_band(count),
        S=call.static(), BLOCK_D=blocks_of(shape, call.q.shape[-1]),
        BLOCK_DV=blocks_of(shape, call.v.shape[-1]), **tile,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
