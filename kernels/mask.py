"""The mask in Triton: which keys a query keeps. The definition is Mask.keep in python/saccade/masks.py; tests
compare the two.

Bands, chunks and lengths keep an interval of keys per row, and both ends of it never fall from a row to the
next. So a query tile's key tiles are a range, and so are a key tile's query tiles; the second is found by
bisection of the same interval, so nothing is inverted by hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import plain

UNBOUNDED = 1 << 30  # positions are int32 in the kernels; a bound no position reaches


class Mask(NamedTuple):
    """What a mask is beside its band. None where absent."""

    head_bounds: Any = None  # [H, 4] int32, replaces the band
    chunks: tuple[int, ...] = ()  # (size, left) pairs, flattened
    lengths: Any = None  # [B] int64
    keep: Any = None  # [B, Sk] bool
    keep_batch: Any = 0
    q_ids: Any = None  # [B, Sq] int32
    q_ids_batch: Any = 0
    k_ids: Any = None  # [B, Sk] int32
    k_ids_batch: Any = 0
    tile_bits: Any = None  # [T, 64] int64: bit c of word r keeps (row r, column c) of the tile


@triton.jit
def floor_div(a, b):
    quotient = a // b
    return quotient - (quotient * b > a).to(tl.int32)


@triton.jit
def row_interval(i, b, h, seqlen_q, seqlen_k, band, mask):
    """(begin, end) of the keys that row i keeps; empty where end <= begin. `i` a scalar or any tensor."""
    left_end, right_end, left_start, right_start = band
    if mask.head_bounds is not None:
        left_end = tl.load(mask.head_bounds + h * 4)
        right_end = tl.load(mask.head_bounds + h * 4 + 1)
        left_start = tl.load(mask.head_bounds + h * 4 + 2)
        right_start = tl.load(mask.head_bounds + h * 4 + 3)
    position = i + (seqlen_k - seqlen_q)
    begin = tl.maximum(tl.maximum(position - left_end, i - left_start), 0)
    end = tl.minimum(tl.minimum(position + right_end, i + right_start) + 1, seqlen_k)
    for c in tl.static_range(0, len(mask.chunks), 2):
        chunk = floor_div(position, mask.chunks[c])
        begin = tl.maximum(begin, (chunk - mask.chunks[c + 1]) * mask.chunks[c])
        end = tl.minimum(end, (chunk + 1) * mask.chunks[c])
    if mask.lengths is not None:
        end = tl.minimum(end, tl.load(mask.lengths + b).to(tl.int32))
    return begin, end


@triton.jit
def block_intervals(i, b, h, seqlen_q, seqlen_k, band, mask):
    """`row_interval` of the rows of a block; rows past the sequence keep nothing."""
    begin, end = row_interval(i, b, h, seqlen_q, seqlen_k, band, mask)
    return begin, tl.where(i < seqlen_q, end, 0)


@triton.jit
def key_ranges(i, begin, end, seqlen_q, bias, BLOCK_N: tl.constexpr):
    """(low, first, full_first, full_last, last): the block keeps keys of [low, last); its key tiles begin at
    `first`, and those in [full_first, full_last) are kept whole. first, full_* are multiples of BLOCK_N.
    Beside a bias, which may hide keys, no tile is whole for a block that the end of the queries cuts.
    """
    some = begin < end
    last = tl.max(tl.where(some, end, 0), 0)
    low = tl.minimum(tl.min(tl.where(some, begin, 1 << 30), 0), last)
    first = low
    inside = i < seqlen_q
    full_first = tl.max(tl.where(inside, begin, 0), 0)
    if bias is None:
        full_last = tl.min(tl.where(inside, end, 1 << 30), 0)
    else:
        full_last = tl.min(end, 0)
    first = tl.minimum(first, last) // BLOCK_N * BLOCK_N
    full_first = tl.minimum((tl.maximum(full_first, first) + BLOCK_N - 1) // BLOCK_N * BLOCK_N, last)
    full_last = tl.maximum(tl.minimum(full_last, last) // BLOCK_N * BLOCK_N, full_first)
    return low, first, full_first, full_last, last


@triton.jit
def first_row_past(key, USE_END: tl.constexpr, b, h, seqlen_q, seqlen_k, band, mask):
    """The first row whose interval ends after `key` (USE_END), or begins after it; seqlen_q if there is
    none.
    """
    low = key * 0
    high = seqlen_q
    while low < high:
        middle = (low + high) // 2
        begin, end = row_interval(middle, b, h, seqlen_q, seqlen_k, band, mask)
        edge = begin
        if USE_END:
            edge = end
        if edge > key:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def row_ranges(j0, b, h, seqlen_q, seqlen_k, band, mask, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, full_first, full_last, last) of the query tiles of the key tile that begins at j0, as in
    `key_ranges`.
    """
    last_key = tl.minimum(j0 + BLOCK_N, seqlen_k) - 1
    first = first_row_past(j0, True, b, h, seqlen_q, seqlen_k, band, mask)
    last = first_row_past(last_key, False, b, h, seqlen_q, seqlen_k, band, mask)
    full_first = first_row_past(last_key, True, b, h, seqlen_q, seqlen_k, band, mask)
    full_last = first_row_past(j0, False, b, h, seqlen_q, seqlen_k, band, mask)
    if j0 + BLOCK_N > seqlen_k:  # a tile that the end of the keys cuts is never whole
        full_last = 0
    first = tl.minimum(first, last) // BLOCK_M * BLOCK_M
    full_first = tl.minimum((tl.maximum(full_first, first) + BLOCK_M - 1) // BLOCK_M * BLOCK_M, last)
    full_last = tl.maximum(tl.minimum(full_last, last) // BLOCK_M * BLOCK_M, full_first)
    return first, full_first, full_last, last


@triton.jit
def across(x, TRANSPOSED: tl.constexpr):
    """A vector over the queries of a tile, against its pairs: [M, 1], or [1, M] of a transposed tile."""
    if TRANSPOSED:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def kept_pairs(
    i, j, begin, end, tile, b, seqlen_q, seqlen_k, mask, TRANSPOSED: tl.constexpr, EXTRA: tl.constexpr
):
    """[M, N] bool (transposed: [N, M]) of a tile of rows i and keys j."""
    row = across(i, TRANSPOSED)
    key = across(j, not TRANSPOSED)
    if EXTRA:  # the one more key that every query sees
        return (row < seqlen_q) & (key == 0)
    else:
        kept = (key >= across(begin, TRANSPOSED)) & (key < across(end, TRANSPOSED))
        if mask.keep is not None:
            inside = (j >= 0) & (j < seqlen_k)
            shown = tl.load(mask.keep + b.to(tl.int64) * plain(mask.keep_batch) + j, mask=inside, other=0)
            kept &= across(shown, not TRANSPOSED) != 0
        if mask.q_ids is not None:
            q_at = mask.q_ids + b.to(tl.int64) * plain(mask.q_ids_batch) + i
            k_at = mask.k_ids + b.to(tl.int64) * plain(mask.k_ids_batch) + j
            q_id = tl.load(q_at, mask=i < seqlen_q, other=0)
            k_id = tl.load(k_at, mask=(j >= 0) & (j < seqlen_k), other=0)
            kept &= across(q_id, TRANSPOSED) == across(k_id, not TRANSPOSED)
        if mask.tile_bits is not None:
            words = tl.load(mask.tile_bits + tile.to(tl.int64) * 64 + i % 64)
            kept &= ((across(words, TRANSPOSED) >> (key % 64).to(tl.int64)) & 1) != 0
        return kept
