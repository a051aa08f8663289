"""What all bodies do with a tile of queries and keys: load it, score it, add the terms, drop.

Notation: i, m queries; j, n keys; d head_dim. Tiles are [M, N]; TRANSPOSED ones are [N, M].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import plain
from .mask import across

DOT, ADDITIVE, GATV2 = (tl.constexpr(n) for n in range(3))


class Rows(NamedTuple):
    """A strided tensor of rows; strides count elements. Packed sequences ([total, H, D]) have batch stride
    0.
    """

    ptr: Any
    batch: Any
    head: Any
    row: Any
    col: Any


class Vector(NamedTuple):
    """One number for each row: [B, H, S], or [H, total] of packed sequences with batch stride 0. `runtime`
    strides.
    """

    ptr: Any
    batch: Any
    head: Any


class Packed(NamedTuple):
    """Where sequences begin, [B + 1] int64. None: dense. `runtime` totals."""

    cu_q: Any = None
    cu_k: Any = None
    total_q: Any = 0  # rows there are
    total_k: Any = 0


class Cache(NamedTuple):
    """Where the keys of a cache lie. None: in a row of the batch, one after the other. `runtime` strides."""

    lengths: Any  # [B] int64, the keys in use
    page_table: Any = None  # [B, pages] int32; k and v are [num_pages, Hk, page_size, .]
    page_batch: Any = 0
    page_size: Any = 0
    beam: Any = None  # [B, S] int32: key j lies in row beam[b, j] of the batch
    beam_batch: Any = 0


class Terms(NamedTuple):
    """What joins the scores. None where absent."""

    bias: Any = None  # strides below, 0 where broadcast
    bias_batch: Any = 0
    bias_head: Any = 0
    bias_row: Any = 0
    bias_col: Any = 0
    rel_bias: Any = None  # by distance [H, max_q + max_k - 1], by query [B, H, Sq, R] or [H, total, R]
    weight: Any = None  # [H, D] of the additive scores
    sink: Any = None  # [H]
    extra_k: Any = None  # Rows [1, H, 1, D]
    extra_v: Any = None
    seed: Any = None  # [1] int64
    numbers: tuple[int, ...] = ()  # scale, softcap, slope, 1 / (1 - dropout_p): the bits of a double each
    threshold: Any = 0  # lanes below this are dropped
    rel_batch: Any = 0  # strides of a relative bias by query, `runtime` ones
    rel_head: Any = 0
    rel_start: Any = None  # [B + 1], where sequences begin in it


class Static(NamedTuple):
    """What a kernel is compiled for, beside tile sizes."""

    score: int = 0
    activation: int = 0
    heads: int = 1
    group: int = 1  # query heads for each key head
    dim: int = 64
    dim_v: int = 64
    bare: bool = True  # the logit is scale * q.k and nothing more, and scale > 0
    exact: bool = False  # differences before factors: for fp32, fp64, and biases of any size
    wide: bool = False  # accumulate in fp64
    precision: str = "ieee"  # of fp32 products: ieee or tf32
    softcap: bool = False
    dropout: bool = False
    bounded_left: bool = False  # some row's interval may begin after key 0
    irregular: bool = False  # padding by a boolean or segments: no tile is known to be whole
    graph: bool = False  # key tiles come from a list
    by_query: bool = False  # the relative bias has rows of its own for each query, and clips distances
    cached: bool = False  # keys lie where a `Cache` says
    gaps: bool = False  # inside the range of a block's keys there may be one that no row keeps
    far: bool = False  # offsets inside a tile exceed 31 bits
    tight: bool = False  # the pass of a wide head has no register left to hoist into (`Call.is_tight`)
    joint: int = 0  # features of an edge that join an additive score


@triton.jit
def number(terms, N: tl.constexpr):
    """A double among the arguments: launches pass floats as fp32, so it comes as the bits of an int."""
    return terms.numbers[N].to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def span(cu, b, total, longest):
    """(length, first row) of sequence b: of rows that there are, and no longer than was promised, whatever
    the device holds.
    """
    begin = tl.minimum(tl.maximum(tl.load(cu + b), 0), plain(total))
    end = tl.minimum(tl.load(cu + b + 1), plain(total))
    return tl.minimum(tl.maximum(end - begin, 0), longest).to(tl.int32), begin


@triton.jit
def sequence(b, seqlen_q, seqlen_k, packed):
    """(queries, keys, first query row, first key row) of sequence b; seqlen_*: those of the longest."""
    q_begin = b.to(tl.int64) * 0
    k_begin = q_begin
    if packed.cu_q is not None:
        seqlen_q, q_begin = span(packed.cu_q, b, packed.total_q, seqlen_q)
        seqlen_k, k_begin = span(packed.cu_k, b, packed.total_k, seqlen_k)
    return seqlen_q, seqlen_k, q_begin, k_begin


@triton.jit
def rows_at(x, b, h, begin):
    """Pointer to the first row of head h of sequence b."""
    return x.ptr + b.to(tl.int64) * x.batch + h.to(tl.int64) * x.head + begin * x.row


@triton.jit
def vector_at(x, b, h, begin):
    return x.ptr + b.to(tl.int64) * plain(x.batch) + h.to(tl.int64) * plain(x.head) + begin


@triton.jit
def _offsets(x, base, first, column, ROWS: tl.constexpr, COLS: tl.constexpr, FAR: tl.constexpr):
    r = tl.arange(0, ROWS)
    c = column + tl.arange(0, COLS)
    at = base + tl.cast(first, tl.int64) * x.row
    if FAR:
        return at + r.to(tl.int64)[:, None] * x.row + c.to(tl.int64)[None, :] * x.col
    else:
        return at + (r[:, None] * x.row + c[None, :] * x.col)


@triton.jit
def load_rows(
    x, base, first, inside, column, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    FAR: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLS] from row `first` and column `column` on. Columns from DIM on are 0, and rows that are not
    `inside` [ROWS]; None where all are.
    """
    at = _offsets(x, base, first, column, ROWS, COLS, FAR)
    c = column + tl.arange(0, COLS)
    if inside is not None:
        return tl.load(at, mask=inside[:, None] & (c < DIM)[None, :], other=0.0)
    elif DIM % COLS != 0:
        return tl.load(at, mask=(c < DIM)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def cached_keys(x, cache, b, j, inside):
    """[N] int64: where keys j of sequence b begin, from the head's first number of the cache."""
    b = b.to(tl.int64)
    row = j
    lane = b + j.to(tl.int64) * 0
    if cache.page_table is not None:
        at = cache.page_table + b * plain(cache.page_batch) + row // cache.page_size
        lane = tl.load(at, mask=inside, other=0).to(tl.int64)
        row = row % cache.page_size
    if cache.beam is not None:
        lane = tl.load(cache.beam + b * plain(cache.beam_batch) + row, mask=inside, other=0).to(tl.int64)
    return lane * x.batch + row.to(tl.int64) * x.row


@triton.jit
def load_listed(x, base, at, inside, column, DIM: tl.constexpr, COLS: tl.constexpr):
    """As `load_rows`, of rows that begin at base + at."""
    c = column + tl.arange(0, COLS)
    mask = inside[:, None] & (c < DIM)[None, :]
    return tl.load(base + (at[:, None] + c.to(tl.int64)[None, :] * x.col), mask=mask, other=0.0)


@triton.jit
def store_rows(
    x, base, first, end, column, values, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    FAR: tl.constexpr,
):  # fmt: skip
    at = _offsets(x, base, first, column, ROWS, COLS, FAR)
    r = first + tl.arange(0, ROWS)
    c = column + tl.arange(0, COLS)
    tl.store(at, values.to(x.ptr.dtype.element_ty), mask=(r < end)[:, None] & (c < DIM)[None, :])


@triton.jit
def fresh(count, ROWS: tl.constexpr, COLS: tl.constexpr, S: tl.constexpr):
    """Zeros for a loop of products to add to; `count` is a run-time number that is never negative, and of
    each accumulator of a kernel another. The compiler must not know that they are zeros: constants it would
    set anew on the way around an empty loop, and ptxas, which sees accumulators set where a wgmma may be
    under way, then makes each wgmma of the kernel wait for the one before it.
    """
    if S.wide or ROWS < 64:  # no wgmma
        return tl.zeros((ROWS, COLS), tl.float64 if S.wide else tl.float32)
    else:
        at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        return (at & tl.minimum(count, 0)).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, S: tl.constexpr):
    if S.wide:
        return tl.dot(a, b, out_dtype=tl.float64)
    else:
        return tl.dot(a, b, input_precision=S.precision)


@triton.jit
def products(
    a, a_x, a_base, a_first, a_inside, b, b_x, b_base, b_first, b_inside,
    S: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """[A, B] (transposed [B, A]): a_i . b_j. `a` and `b` hold the rows where DIM fits in one BLOCK; wider
    ones are read again, block by block.
    """
    if DIM <= BLOCK:
        if TRANSPOSED:
            return dot(b, tl.trans(a), S)
        else:
            return dot(a, tl.trans(b), S)
    else:
        total = tl.zeros((B, A) if TRANSPOSED else (A, B), tl.float64 if S.wide else tl.float32)
        for column in range(0, DIM, BLOCK):
            part = load_rows(a_x, a_base, a_first, a_inside, column, DIM, A, BLOCK, S.far)
            other = load_rows(b_x, b_base, b_first, b_inside, column, DIM, B, BLOCK, S.far)
            if TRANSPOSED:
                total += dot(other, tl.trans(part), S)
            else:
                total += dot(part, tl.trans(other), S)
        return total


@triton.jit
def tanh(x):
    """Odd and exact to rounding near 0: a rational function there, an exponential beyond (Cephes, tanh)."""
    z = x * x
    top = -9.64399179425052238628e-1 * z - 9.92877231001918586564e1
    top = top * z - 1.61468768441708447952e3
    bottom = z + 1.12811678491632931402e2
    bottom = bottom * z + 2.23548839060100448583e3
    bottom = bottom * z + 4.84406305325125486048e3
    near = x + x * z * (top / bottom)
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def joint(x, slope, S: tl.constexpr):
    """phi of the additive scores w . phi(q + k): tanh (Bahdanau et al., arXiv 1409.0473) or leaky_relu
    (GATv2, arXiv 2105.14491).
    """
    if S.score == ADDITIVE:
        return tanh(x)
    else:
        return tl.where(x > 0.0, x, slope * x)


@triton.jit
def joint_slope(x, slope, S: tl.constexpr):
    """phi'(x)."""
    if S.score == ADDITIVE:
        t = tanh(x)
        return 1.0 - t * t
    else:
        return tl.where(x > 0.0, 1.0, slope)


@triton.jit
def load_column(x, base, r, listed, inside, d):
    """[ROWS]: column d of rows r, or of those that begin at `listed`; 0 where not inside."""
    at = base + tl.cast(d, tl.int64) * x.col
    if listed is None:
        at = at + r.to(tl.int64) * x.row
    else:
        at = at + listed
    if inside is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def column_sums(
    q, q_base, i, q_inside, k, k_base, j, k_at, k_inside, d, TRANSPOSED: tl.constexpr, ACC: tl.constexpr
):
    """q_id + k_jd of one d, for all pairs of a tile. k_at: as in `scores`."""
    if k_at is None:
        q_d = load_column(q, q_base, i, None, q_inside, d).to(ACC)
    else:
        q_d = load_column(q, q_base, i, 0, q_inside, d).to(ACC)
    k_d = load_column(k, k_base, j, k_at, k_inside, d).to(ACC)
    return across(q_d, TRANSPOSED) + across(k_d, not TRANSPOSED)


@triton.jit
def scores(
    q_tile, q, q_base, i, q_inside, k_tile, k, k_base, j0, k_at, k_inside, terms, h,
    S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The scores of a tile, before scale; q_tile and k_tile hold its first BLOCK_D columns. k_at: where keys
    begin, of a cache, else None; beside a cache all columns are held, and q_base [M] and h [M, 1] are those
    of each row, for the rows may be of several heads.
    """
    if S.score == DOT:
        return products(
            q_tile, q, q_base, tl.min(i, 0), q_inside, k_tile, k, k_base, j0, k_inside, S, S.dim, BLOCK_D,
            M, N, TRANSPOSED,
        )  # fmt: skip
    else:
        ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
        j = j0 + tl.arange(0, N)
        slope = number(terms, 2).to(ACC)
        total = tl.zeros((N, M) if TRANSPOSED else (M, N), ACC)
        for d in range(S.dim):
            x = column_sums(q, q_base, i, q_inside, k, k_base, j, k_at, k_inside, d, TRANSPOSED, ACC)
            total += tl.load(terms.weight + h * S.dim + d) * joint(x, slope, S)
        return total


@triton.jit
def relative_rows(x, i, b, h, rel_size, terms):
    """Pointers to the rows of queries i in x, a relative bias by query or its gradient."""
    row = i.to(tl.int64)
    if terms.rel_start is not None:
        total = plain(terms.rel_head) // rel_size
        row += tl.minimum(tl.maximum(tl.load(terms.rel_start + b), 0), total)  # as in `span`
    head = x + b.to(tl.int64) * plain(terms.rel_batch) + h.to(tl.int64) * plain(terms.rel_head)
    return head + row * rel_size


@triton.jit
def logits(
    s, i, j, b, h, seqlen_q, seqlen_k, max_k, rel_size, terms,
    S: tl.constexpr, TRANSPOSED: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """(logits in units, tanh(scale * score / softcap) or 0) of a tile of scores."""
    if S.bare:
        return s, 0.0
    else:
        ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
        scale = number(terms, 0)
        bent = 0.0
        if S.softcap:
            softcap = number(terms, 1)
            bent = tanh(s * (scale / softcap).to(ACC))
            s = bent * softcap.to(ACC)
        else:
            s = s * scale.to(ACC)
        if not EXTRA:
            row = across(i, TRANSPOSED)
            key = across(j, not TRANSPOSED)
            inside = (row < seqlen_q) & (key >= 0) & (key < seqlen_k)
            if terms.bias is not None:
                at = terms.bias + b.to(tl.int64) * terms.bias_batch + h.to(tl.int64) * terms.bias_head
                at = at + row.to(tl.int64) * terms.bias_row + key.to(tl.int64) * terms.bias_col
                bias = tl.load(at, mask=inside, other=0.0).to(ACC)
                # A row of finfo.min everywhere is a row of equal numbers, and stays one.
                s = tl.where(bias == float("-inf"), bias, tl.maximum(s + bias, -1e11))
            if terms.rel_bias is not None:
                delta = key - row - (seqlen_k - seqlen_q)
                if S.by_query:
                    reach = rel_size // 2
                    at = relative_rows(terms.rel_bias, row, b, h, rel_size, terms)
                    at = at + tl.minimum(tl.maximum(delta, -reach), reach) + reach
                else:
                    at = terms.rel_bias + h.to(tl.int64) * rel_size + (max_k - 1) + delta
                s += tl.load(at, mask=inside, other=0.0)
        return s, bent


@triton.jit
def score_gradient(ds, bent, S: tl.constexpr):
    """Through softcap; scale is applied once, at the end of a row's or a key's sum."""
    if S.softcap:
        return tl.where(ds == 0.0, 0.0, ds * (1.0 - bent * bent))  # a hidden key's NaN is not touched
    else:
        return ds


@triton.jit
def unit_of(terms, S: tl.constexpr):
    """(unit, factor) of `softmax`: in fp64, and in the accumulator's dtype."""
    unit = number(terms, 0) if S.bare else number(terms, 0) * 0.0 + 1.0
    return unit, (unit * 1.4426950408889634).to(tl.float64 if S.wide else tl.float32)


@triton.jit
def drawn(i, octet, b, h, terms):
    """The four words of each (row, eight keys); i and octet of one shape."""
    octet = octet.to(tl.int32)  # Philox is as wide as its first number
    return tl.philox(tl.load(terms.seed), octet, i, octet * 0 + h, octet * 0 + b)


@triton.jit
def pair_stays(i, j, b, h, terms):
    """True where the pair (i, j) stays; i and j of one shape."""
    w0, w1, w2, w3 = drawn(i, j >> 3, b, h, terms)
    lane = j & 7
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    half = (word >> ((lane & 1) * 16).to(tl.uint32)) & 0xFFFF
    return half >= tl.cast(terms.threshold, tl.uint32)


@triton.jit
def dropout_kept(
    i, j, b, h, terms, N: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """True where the pair stays: Philox4x32-10, counter (j >> 3, i, h, b), 16-bit lane j & 7 of the result.
    ALIGNED: j begins at a multiple of 8, so that one draw serves 8 keys.
    """
    row = across(i, TRANSPOSED)
    if ALIGNED:
        octet = across((tl.min(j, 0) >> 3) + tl.arange(0, N // 8), not TRANSPOSED)
        w0, w1, w2, w3 = drawn(row + octet * 0, octet + row * 0, b, h, terms)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [.., bit 1 of the word, bit 0]
        lanes = tl.join(words & 0xFFFF, words >> 16)  # [.., lane as three bits]
        if TRANSPOSED:
            lanes = tl.permute(lanes, (0, 2, 3, 4, 1))
            lanes = tl.reshape(lanes, (N, lanes.shape[4]))
        else:
            lanes = tl.reshape(lanes, (lanes.shape[0], N))
        return lanes >= tl.cast(terms.threshold, tl.uint32)
    else:
        key = across(j, not TRANSPOSED)
        return pair_stays(row + key * 0, key + row * 0, b, h, terms)


@triton.jit
def touched(x, s, AXIS: tl.constexpr, CHECK: tl.constexpr, S: tl.constexpr):
    """Rows x of a tile, 0 where no pair of them is kept: times a weight of 0, what stands there could still
    be NaN. Without gaps they were never loaded.
    """
    if S.gaps and CHECK:
        return tl.where((tl.max((s != float("-inf")).to(tl.int32), AXIS) != 0)[:, None], x, 0.0)
    else:
        return x
