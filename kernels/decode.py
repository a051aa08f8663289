"""Few queries over many keys: the keys are split among programs, and their states merged in order. Serves
caches too, whose keys may lie in pages, or in rows that a beam search has chosen.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .call import Call, architecture, cdiv, on_device
from .config import Config
from .forward import attend_tile, finish_tile, first_state
from .mask import block_intervals, key_ranges
from .softmax import RELU, SIGMOID
from .tile import Cache, load_rows, rows_at, unit_of

_ROWS, _KEYS, _WARPS = 16, 64, 4
_TILE_BYTES = 16384  # of keys
_SPLIT_KEYS = 256  # the fewest that are worth a program
_PROGRAMS = (
    264  # two for each multiprocessor of an H200: a constant, so that results do not depend on the GPU
)


@triton.jit(do_not_specialize=[
    "seqlen_q", "seqlen_k", "blocks", "left_end", "right_end", "left_start", "right_start", "rel_size",
    "splits",
])  # fmt: skip
def decode_split(
    q, k, v, parts, terms, mask, cache,
    seqlen_q, seqlen_k, blocks, left_end, right_end, left_start, right_start, rel_size, splits,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The state of one split: parts [B, H, blocks, splits, M, 2 + BLOCK_DV] takes peak, total, acc."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    program = tl.program_id(0)
    split = program % splits
    block = program // splits % blocks
    h = program // splits // blocks % S.heads
    b = program // splits // blocks // S.heads
    max_k = seqlen_k
    share = ((max_k + splits - 1) // splits + N - 1) // N * N
    if cache.lengths is not None:  # what lies beyond the cache cannot be read
        seqlen_k = tl.minimum(tl.maximum(tl.load(cache.lengths + b), 0), seqlen_k).to(tl.int32)
    band = (left_end, right_end, left_start, right_start)
    zero = b.to(tl.int64) * 0
    i = block * M + tl.arange(0, M)
    begin, end = block_intervals(i, b, h, seqlen_q, seqlen_k, band, mask)
    unit, factor = unit_of(terms, S)
    q_base = rows_at(q, b, h, zero)
    q_tile = load_rows(q, q_base, block * M, i < seqlen_q, 0, S.dim, M, BLOCK_D, S.far)
    head = (h // S.group).to(tl.int64)
    acc = tl.zeros((M, BLOCK_DV), ACC)
    peak = tl.full((M,), float("-inf"), ACC)
    total = tl.zeros((M,), ACC)
    low, first, full_first, full_last, last = key_ranges(i, begin, end, seqlen_q, N)
    for j0 in range(tl.maximum(first, split * share), tl.minimum(last, (split + 1) * share), N):
        acc, peak, total = attend_tile(
            acc, peak, total, q_tile, q, q_base, k, k.ptr + head * k.head, v, v.ptr + head * v.head, i,
            begin, end, j0, low, last, 0, b, h, 0, seqlen_q, seqlen_k, max_k, rel_size, terms, mask,
            cache, factor, S, M, N, BLOCK_D, BLOCK_DV, True, False,
        )  # fmt: skip
    r = tl.arange(0, M)
    at = parts + (program.to(tl.int64) * M + r) * (2 + BLOCK_DV)
    tl.store(at, peak)
    tl.store(at + 1, total)
    tl.store(at[:, None] + 2 + tl.arange(0, BLOCK_DV)[None, :], acc)


@triton.jit(do_not_specialize=["seqlen_q", "blocks", "splits"])
def merge_splits(
    out, lse, parts, terms, seqlen_q, blocks, splits, S: tl.constexpr, M: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    """Joins the splits of a query tile in their order; the sink stands before the first."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    program = tl.program_id(0)
    block = program % blocks
    h = program // blocks % S.heads
    b = program // blocks // S.heads
    unit, factor = unit_of(terms, S)
    r = tl.arange(0, M)
    acc = tl.zeros((M, BLOCK_DV), ACC)
    peak, total = first_state(h, terms, unit, S, M)
    for split in range(splits):
        at = parts + ((program.to(tl.int64) * splits + split) * M + r) * (2 + BLOCK_DV)
        part = tl.load(at[:, None] + 2 + tl.arange(0, BLOCK_DV)[None, :])
        if S.activation == RELU or S.activation == SIGMOID:
            acc += part
        else:
            part_peak = tl.load(at)
            new = tl.maximum(peak, part_peak)
            pivot = tl.where(new == float("-inf"), 0.0, new)
            old = tl.exp2((peak - pivot) * factor)
            more = tl.exp2((part_peak - pivot) * factor)
            acc = acc * old[:, None] + part * more[:, None]
            total = total * old + tl.load(at + 1) * more
            peak = new
    zero = b.to(tl.int64) * 0
    finish_tile(
        acc, peak, total, block * M + r, 0, out, lse, b, h, zero, seqlen_q, terms, unit, S, M, BLOCK_DV
    )


def forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fill out and lse."""
    blocks = cdiv(call.seqlen_q, _ROWS)
    pairs = call.batch * call.heads * blocks
    if not pairs:
        return
    widths = [max(16, triton.next_power_of_2(x.shape[-1])) for x in (call.q, call.v)]
    arch, size = architecture(call.q.device), call.q.element_size()
    keys = max(16, min(_KEYS, _TILE_BYTES // (max(widths) * size)))
    stages = config.fitted(Config(_ROWS, keys, max(widths), _WARPS, 3), "decode", arch, size, 4).num_stages
    splits = max(1, min(cdiv(_PROGRAMS, pairs), cdiv(call.seqlen_k, _SPLIT_KEYS)))
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    parts = torch.empty((pairs, splits, _ROWS, 2 + widths[1]), dtype=wide, device=out.device)
    shape: dict[str, Any] = {
        "S": call.static()._replace(cached=True),
        "M": _ROWS,
        "BLOCK_DV": widths[1],
        "num_warps": _WARPS,
    }
    terms = call.terms()
    with on_device(out):
        decode_split[(pairs * splits,)](
            call.rows(call.q), call.rows(call.k), call.rows(call.v), parts, terms, call.mask(), _cache(call),
            *call.lengths_and_band(blocks), splits, N=keys, BLOCK_D=widths[0], num_stages=stages, **shape,
        )  # fmt: skip
        merge_splits[(pairs,)](
            call.rows(out), call.vector(lse), parts, terms, call.seqlen_q, blocks, splits, **shape
        )


def _cache(call: Call) -> Cache:
    pages, beam = call.page_table, call.beam
    return Cache(
        call.seqused_k,
        pages, 0 if pages is None else pages.stride(0), 0 if pages is None else call.k.shape[2],
        beam, 0 if beam is None else beam.stride(0),
    )  # fmt: skip
