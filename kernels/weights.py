"""The attention weights themselves, from lse: for whoever asks to see them."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .arguments import RUNTIME
from .backward import load_statistics
from .bias import tile_of
from .call import Call, blocks_of, cdiv, on_device
from .launch import statistics
from .mask import block_intervals, kept_pairs
from .softmax import weigh
from .tile import dropout_kept, load_rows, logits, number, rows_at, scores, unit_of


@triton.jit
def dropped(p, i, at, b, h, terms, S: tl.constexpr, N: tl.constexpr, ALIGNED: tl.constexpr):
    if S.dropout:
        return tl.where(
            dropout_kept(i, at, b, h, terms, N, False, ALIGNED), p * number(terms, 3).to(p.dtype), 0.0
        )
    else:
        return p


@triton.jit(do_not_specialize=RUNTIME)
def attention_weights(
    q, k, weights, stats, terms, mask, packed, tiles,
    seqlen_q, seqlen_k, columns, left_end, right_end, left_start, right_start, rel_size,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, AVERAGE: tl.constexpr,
    EXTRA: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """weights [B, H, Sq, columns], or [B, Sq, columns] (AVERAGE): those of the keys, or (EXTRA) of the one
    more key, in column seqlen_k, or (ZERO) of softmax1's zero, in the last.
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    HEADS: tl.constexpr = 1 if AVERAGE else S.heads
    TILES: tl.constexpr = EXTRA or ZERO
    ways = 1 if TILES else (seqlen_k + N - 1) // N
    rows = (seqlen_q + M - 1) // M
    program = tl.program_id(0)
    n = program % ways
    m = program // ways % rows
    h_first = program // ways // rows % HEADS
    b = program // ways // rows // HEADS
    band = (left_end, right_end, left_start, right_start)
    unit, factor = unit_of(terms, S)
    zero = b.to(tl.int64) * 0
    i = m * M + tl.arange(0, M)
    j = n * N + tl.arange(0, N)
    total = tl.zeros((M, N), ACC)
    for g in range(S.heads if AVERAGE else 1):
        h = h_first + g
        high, low, unused = load_statistics(stats, b, h, zero, i, i < seqlen_q, S)
        if ZERO:
            empty = tl.zeros((M, N), ACC)
            p = weigh(empty, high, low, factor, S, False)
            at = columns - 1 + tl.arange(0, N)
            total += dropped(p, i, at, b, h, terms, S, N, False)
        else:
            q_base = rows_at(q, b, h, zero)
            q_inside = i < seqlen_q
            q_tile = load_rows(q, q_base, m * M, q_inside, 0, S.dim, M, BLOCK_D, S.far)
            k_base = rows_at(k, b, h if EXTRA else h // S.group, zero)
            k_inside = j < (1 if EXTRA else seqlen_k)
            k_tile = load_rows(k, k_base, n * N, k_inside, 0, S.dim, N, BLOCK_D, S.far)
            tile = program * 0
            if S.graph and not EXTRA:
                tile += tile_of(tiles, m, n * N, N)
            if tile >= 0:
                begin, end = block_intervals(i, b, h, seqlen_q, seqlen_k, band, mask)
                s = scores(
                    q_tile, q, q_base, i, q_inside, k_tile, k, k_base, n * N, None, k_inside, terms, h, S, M,
                    N, BLOCK_D, False,
                )  # fmt: skip
                s, bent = logits(
                    s, i, j, b, h, seqlen_q, seqlen_k, seqlen_k, rel_size, terms, S, False, EXTRA
                )
                kept = kept_pairs(i, j, begin, end, tile, b, seqlen_q, seqlen_k, mask, False, EXTRA)
                s = tl.where(kept, s, float("-inf"))
                p = weigh(s, high, low, factor, S, False)
                at = seqlen_k + tl.arange(0, N) if EXTRA else j
                total += dropped(p, i, at, b, h, terms, S, N, not EXTRA)
    if AVERAGE:
        total = total / S.heads
    first = n * N
    count = seqlen_k
    if EXTRA:
        first = seqlen_k
        count = seqlen_k + 1
    if ZERO:
        first = columns - 1
        count = columns
    at = ((b.to(tl.int64) * HEADS + h_first) * seqlen_q + i)[:, None] * columns
    column = (first + tl.arange(0, N))[None, :]
    values = total.to(weights.dtype.element_ty)
    tl.store(weights + at + column, values, mask=(i < seqlen_q)[:, None] & (column < count))


def weights(call: Call, lse: Tensor, out: Tensor, average: bool) -> None:
    """Fill out [B, H, Sq, columns], or [B, Sq, columns] averaged over heads."""
    with on_device(out):
        stats = statistics(call, None, None, None, lse)
        _launch(call, stats, out, call.k, average, 0)
        if call.extra_k is not None:
            extra = call.extra_k[None, :, None].expand(call.batch, -1, -1, -1)
            _launch(call, stats, out, extra, average, 1)
        if call.activation == 3:
            _launch(call, stats, out, call.k, average, 2)


def _launch(call: Call, stats: Any, out: Tensor, k: Tensor, average: bool, part: int) -> None:
    shape = call.config("weights")
    ways = 1 if part else cdiv(call.seqlen_k, shape.block_n)
    grid = ways * cdiv(call.seqlen_q, shape.block_m) * (1 if average else call.heads) * call.batch
    if not grid:
        return
    attention_weights[(grid,)](
        call.rows(call.q), call.rows(k), out, stats, call.terms(), call.mask(),
        call.packed(), call.tile_lists(False), *call.lengths_and_band(out.shape[-1]),
        S=call.static(), M=shape.block_m, N=16 if part else shape.block_n,
        BLOCK_D=blocks_of(shape, call.q.shape[-1]), AVERAGE=average, EXTRA=part == 1, ZERO=part == 2,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
