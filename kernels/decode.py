"""Few queries over many keys: the query heads that share a key head are the rows of one tile, so that each
key is read once for all of them. The keys that a tile may keep are split among programs, and a row's states
merged in a fixed order; where there is one split, its program writes the results itself. Serves caches too,
whose keys may lie in pages, or in rows that a beam search has chosen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .arguments import RUNTIME, runtime
from .call import Call, architecture, cdiv, on_device
from .config import Config
from .forward import attend_tile, divided, first_state
from .mask import block_intervals, key_ranges
from .softmax import RELU, SIGMOID, SOFTMAX, SOFTMAX1, row_lse
from .tile import Cache, fresh, load_listed, rows_at, unit_of, vector_at

_FEWEST_ROWS = 16  # what a matrix instruction takes
_SPLIT_KEYS = 256  # the fewest that are worth a program
_PROGRAMS = (
    264  # two for each multiprocessor of an H200: a constant, so that results do not depend on the GPU
)
_MOST_MERGED = 32  # splits that a program merges at a time
_MERGED_BYTES = 16384  # of their sums


@triton.jit(do_not_specialize=RUNTIME)
def decode_split(
    q, k, v, out, lse, sums, states, terms, mask, cache,
    seqlen_q, seqlen_k, blocks, left_end, right_end, left_start, right_start, rel_size, splits,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One split of a tile. Row r of a key head is query r // group of its head r % group. Its state: acc to
    sums [B, Hk, blocks, splits, M, BLOCK_DV], peak and total to states [B, Hk, blocks, splits, 2, M], where
    a peak of -inf says that acc is 0 and not written. Or, where out is given, there is one split, and what
    it has is the result.
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    HEADS_K: tl.constexpr = S.heads // S.group
    ALONE: tl.constexpr = out is not None
    program = tl.program_id(0)
    split = program % splits
    block = program // splits % blocks
    head = program // splits // blocks % HEADS_K
    b = program // splits // blocks // HEADS_K
    max_k = seqlen_k
    if cache.lengths is not None:  # what lies beyond the cache cannot be read
        seqlen_k = tl.minimum(tl.maximum(tl.load(cache.lengths + b), 0), seqlen_k).to(tl.int32)
    band = (left_end, right_end, left_start, right_start)
    zero = b.to(tl.int64) * 0
    r = block * M + tl.arange(0, M)
    i = r // S.group
    h = head * S.group + r % S.group  # [M]
    begin, end = block_intervals(i, b, h, seqlen_q, seqlen_k, band, mask)
    unit, factor = unit_of(terms, S)
    q_base = rows_at(q, b, head * S.group, zero)
    q_at = (r % S.group).to(tl.int64) * q.head + i.to(tl.int64) * q.row
    q_tile = load_listed(q, q_base, q_at, i < seqlen_q, 0, S.dim, BLOCK_D)
    acc = fresh(blocks, M, BLOCK_DV, S)
    peak = tl.full((M,), float("-inf"), ACC)
    total = tl.zeros((M,), ACC)
    if ALONE:
        peak, total = first_state(h, terms, unit, S, M)
    k_base, v_base = rows_at(k, zero, head, zero), rows_at(v, zero, head, zero)
    # The key tiles of this block's rows, and no others, in equal shares.
    low, first, full_first, full_last, last = key_ranges(i, begin, end, seqlen_q, None, N)
    share = ((last - first + N - 1) // N + splits - 1) // splits * N
    start = first + split * share
    stop = tl.minimum(last, start + share)
    for j0 in range(start, stop, N):
        acc, peak, total = attend_tile(
            acc, peak, total, q_tile, q, q_base + q_at, k, k_base, v, v_base, i, begin, end, j0, low, last,
            0, b, h[:, None], 0, seqlen_q, seqlen_k, max_k, rel_size, terms, mask, cache, factor,
            S, M, N, BLOCK_D, BLOCK_DV, True, False,
        )  # fmt: skip
    if ALONE:
        finish_rows(acc, peak, total, i, i < seqlen_q, b, h, out, lse, terms, unit, S, BLOCK_DV)
    else:
        if S.activation == RELU or S.activation == SIGMOID:
            peak = tl.where(start < stop, 0.0, peak)
        row = tl.arange(0, M)
        state = states + program.to(tl.int64) * 2 * M + row
        tl.store(state, peak, mask=i < seqlen_q)
        tl.store(state + M, total, mask=i < seqlen_q)
        at = sums + (program.to(tl.int64) * M + row[:, None]) * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
        tl.store(at, acc, mask=((i < seqlen_q) & (peak != float("-inf")))[:, None])


@triton.jit
def finish_rows(
    acc, peak, total, i, inside, b, h, out, lse, terms, unit, S: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """As `finish_tile`, of rows that may be of several heads: query i of head h."""
    zero = b.to(tl.int64) * 0
    if S.activation == SOFTMAX or S.activation == SOFTMAX1:
        tl.store(vector_at(lse, b, h, zero) + i, row_lse(peak, total, unit), mask=inside)
    c = tl.arange(0, BLOCK_DV)
    at = (rows_at(out, b, h, zero) + i.to(tl.int64) * out.row)[:, None] + c.to(tl.int64)[None, :] * out.col
    values = divided(acc, total, terms, S).to(out.ptr.dtype.element_ty)
    tl.store(at, values, mask=inside[:, None] & (c < S.dim_v)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def merge_splits(
    out, lse, sums, states, terms, seqlen_q, blocks, splits,
    S: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one row, C at a time; the sink stands before the first."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    HEADS_K: tl.constexpr = S.heads // S.group
    program = tl.program_id(0)
    i = program % seqlen_q
    h = program // seqlen_q % S.heads
    b = program // seqlen_q // S.heads
    r = i * S.group + h % S.group
    tile = (b.to(tl.int64) * HEADS_K + h // S.group) * blocks + r // M
    unit, factor = unit_of(terms, S)
    acc = tl.zeros((1, BLOCK_DV), ACC)
    peak, total = first_state(h, terms, unit, S, 1)
    for first in range(0, splits, C):
        split = first + tl.arange(0, C)
        inside = split < splits
        state = states + (tile * splits + split) * 2 * M + r % M
        part_peak = tl.load(state, mask=inside, other=float("-inf"))
        at = sums + ((tile * splits + split) * M + r % M)[:, None] * BLOCK_DV
        live = (part_peak != float("-inf"))[:, None]
        part = tl.load(at + tl.arange(0, BLOCK_DV)[None, :], mask=live, other=0.0)
        if S.activation == RELU or S.activation == SIGMOID:
            acc += tl.sum(part, 0)[None, :]
        else:
            new = tl.maximum(peak, tl.max(part_peak, 0))
            pivot = tl.where(new == float("-inf"), 0.0, new)
            old = tl.exp2((peak - pivot) * factor)
            more = tl.exp2((part_peak - pivot) * factor)
            acc = acc * old[:, None] + tl.sum(part * more[:, None], 0)[None, :]
            total = total * old + tl.sum(tl.load(state + M, mask=inside, other=0.0) * more, 0)
            peak = new
    rows = i + tl.arange(0, 1)
    finish_rows(acc, peak, total, rows, rows < seqlen_q, b, h, out, lse, terms, unit, S, BLOCK_DV)


def forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fill out and lse."""
    rows = call.batch * call.heads * call.seqlen_q
    if not rows:
        return
    shape, widths = tile_shape(call)
    group = call.heads // call.k.shape[1]
    blocks = cdiv(call.seqlen_q * group, shape.block_m)
    tiles = call.batch * call.k.shape[1] * blocks
    queries = min(call.seqlen_q, cdiv(shape.block_m - 1, group) + 1)  # that a tile has a row of, at most
    splits = max(1, min(cdiv(_PROGRAMS, tiles), cdiv(keys_in_reach(call, queries), _SPLIT_KEYS)))
    static = call.static()
    # Between the bands of two heads of a tile there may be keys that no row keeps.
    static = static._replace(cached=True, gaps=static.gaps or call.head_bounds is not None)
    both: dict[str, Any] = {"S": static, "M": shape.block_m, "BLOCK_DV": widths[1]}
    terms, results = call.terms(), (call.rows(out), call.vector(lse))
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    parts: list[Tensor | None] = [None, None]
    if splits > 1:
        sizes = (shape.block_m, widths[1]), (2, shape.block_m)
        parts = [torch.empty((tiles, splits, *x), dtype=wide, device=out.device) for x in sizes]
    with on_device(out):
        decode_split[(tiles * splits,)](
            call.rows(call.q), call.rows(call.k), call.rows(call.v),
            *(results if splits == 1 else (None, None)), *parts, terms, call.mask(), _cache(call),
            *call.lengths_and_band(blocks), splits, N=shape.block_n, BLOCK_D=widths[0],
            num_warps=shape.num_warps, num_stages=shape.num_stages, **both,
        )  # fmt: skip
        if splits > 1:
            chunk = max(1, min(_MOST_MERGED, _MERGED_BYTES // (widths[1] * wide.itemsize)))
            merge_splits[(rows,)](
                *results, *parts, terms, call.seqlen_q, blocks, splits, C=chunk, num_warps=4, **both
            )


def keys_in_reach(call: Call, queries: int) -> int:
    """The most keys that so many neighbouring queries may keep, as far as shapes and the band tell: lengths
    lie on the device, as do bounds that differ per head, which only narrow the band.
    """
    left_end, right_end, left_start, right_start = call.band
    reach = [
        call.seqlen_k,
        left_end + right_end + queries,
        left_start + right_start + queries,
        left_end + call.seqlen_q,  # from the left bound of the first query to the last key
        right_start + call.seqlen_q,
    ]
    for size, left in zip(call.chunks[::2], call.chunks[1::2], strict=True):
        reach.append((left + 1 + cdiv(queries - 1, size)) * size)
    return max(0, min(reach))


def tile_shape(call: Call) -> tuple[Config, tuple[int, int]]:
    """The tile of a call: as many rows as its heads and queries fill, up to the table's. And the columns of q
    and of v, which are held whole: heads wider than the table's take fewer rows and keys.
    """
    dim, dim_v = (max(16, triton.next_power_of_2(x.shape[-1])) for x in (call.q, call.v))
    arch, size = architecture(call.q.device), call.q.element_size()
    widest = max(dim, dim_v)
    found = config.pick("decode", arch, size, widest)
    times = max(1, widest // config.DIMS[-1])
    filled = triton.next_power_of_2(call.seqlen_q * (call.heads // call.k.shape[1]))
    shape = replace(
        found,
        block_m=max(_FEWEST_ROWS, min(found.block_m // times, filled)),
        block_n=max(16, found.block_n // times),
        block_d=widest,
    )
    biases = sum(x.element_size() for x in (call.bias, call.rel_bias) if x is not None)
    shape = config.fitted(shape, "decode", arch, size, biases + (call.dropout_p > 0))
    if call.page_table is not None or call.beam is not None:  # every other stage waits for where keys lie
        shape = replace(shape, num_stages=2 * shape.num_stages - 1)
    return shape, (dim, dim_v)


def _cache(call: Call) -> Cache:
    pages, beam = call.page_table, call.beam
    return Cache(
        call.seqused_k,
        pages, 0 if pages is None else runtime(pages.stride(0)), 0 if pages is None else call.k.shape[2],
        beam, 0 if beam is None else runtime(beam.stride(0)),
    )  # fmt: skip
