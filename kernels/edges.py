"""What the gather bodies do with a block of edges: load what they join, score them, find their gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import plain
from .backward import load_statistics
from .mask import row_interval
from .softmax import logit_gradient, weigh
from .tile import DOT, joint, number, pair_stays, rows_at, score_gradient, tanh


class Edges(NamedTuple):
    """Edges sorted by row (or by key), and what belongs to them. None where absent. (q W is an argument of
    its own: inside a loop the compiler loses the strides of a tuple in a tuple.)
    """

    rows: Any  # [E] int32, query of each; None where an item's row says it
    keys: Any  # [E] int32, or None likewise
    ids: Any  # [E] int64, the user's number; None where it is the place
    bias: Any = None  # [H or 1, num_edges]
    bias_head: Any = 0  # `runtime`
    x: Any = None  # [num_edges, De], contiguous
    weight: Any = None  # [H, De, D], contiguous: W of features that join an additive score


class Items(NamedTuple):
    """Pieces of rows: edges [first, last) of `row`. `slot` numbers the pieces of cut rows; whole: -1."""

    row: Any
    first: Any
    last: Any
    slot: Any


@triton.jit
def item_of(work, items, HEADS: tl.constexpr):
    """(sequence, head, row, first edge, end of the edges, slot) of this program."""
    program = tl.program_id(0)
    item = program % items
    return (
        program // items // HEADS, program // items % HEADS, tl.load(work.row + item),
        tl.load(work.first + item), tl.load(work.last + item), tl.load(work.slot + item),
    )  # fmt: skip


@triton.jit
def load_at(x, base, r, inside, DIM: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):
    """[E, COLS]: rows r, 0 where not inside and from column DIM on."""
    c = tl.arange(0, COLS)
    at = base + (r.to(tl.int64)[:, None] * x.row + c.to(tl.int64)[None, :] * x.col)
    return tl.load(at, mask=inside[:, None] & (c < DIM)[None, :], other=0.0).to(ACC)


@triton.jit
def load_features(x, ids, inside, DIM: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):
    """[E, COLS]: rows `ids` of a contiguous [., DIM], 0 where not inside and from column DIM on."""
    c = tl.arange(0, COLS)
    at = x + ids.to(tl.int64)[:, None] * DIM + c[None, :]
    return tl.load(at, mask=inside[:, None] & (c < DIM)[None, :], other=0.0).to(ACC)


@triton.jit
def store_at(x, base, r, values, inside, DIM: tl.constexpr, COLS: tl.constexpr):
    """Row r (a scalar) of x."""
    c = tl.arange(0, COLS)
    at = base + r.to(tl.int64) * x.row + c.to(tl.int64) * x.col
    tl.store(at, values.to(x.ptr.dtype.element_ty), mask=(c < DIM) & inside)


@triton.jit
def load_vector(ptr, h, DIM: tl.constexpr, COLS: tl.constexpr):
    """[1, COLS] of row h of a contiguous [H, DIM]."""
    c = tl.arange(0, COLS)
    return tl.load(ptr + h * DIM + c, mask=c < DIM, other=0.0)[None, :]


@triton.jit
def with_features(qt, ids, inside, h, edges, S: tl.constexpr, E: tl.constexpr, D: tl.constexpr):
    """q + W e [E, D] of edges whose features join the score, else qt as it came: the rest of an additive
    score cannot tell the two from a query. W e is formed anew wherever it is needed, a feature at a time.
    """
    if S.joint == 0:
        return qt
    else:
        ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
        d = tl.arange(0, D)
        weight = edges.weight + h.to(tl.int64) * (S.joint * S.dim) + d
        at = edges.x + ids.to(tl.int64) * S.joint
        total = qt + tl.zeros((E, D), ACC)
        for c in range(S.joint):
            x = tl.load(at + c, mask=inside, other=0.0).to(ACC)
            total += x[:, None] * tl.load(weight + c * S.dim, mask=d < S.dim, other=0.0)[None, :]
        return total


@triton.jit
def edge_numbers(edges, e, inside):
    if edges.ids is not None:
        return tl.load(edges.ids + e, mask=inside, other=0)
    else:
        return e


@triton.jit
def kept_edges(i, j, inside, b, h, seqlen_q, seqlen_k, band, mask):
    """[E] bool: what the rest of the mask keeps of edges (i, j)."""
    begin, end = row_interval(i, b, h, seqlen_q, seqlen_k, band, mask)
    kept = inside & (j >= begin) & (j < end)
    if mask.keep is not None:
        kept &= tl.load(mask.keep + b.to(tl.int64) * plain(mask.keep_batch) + j, mask=inside, other=0) != 0
    if mask.q_ids is not None:
        q_id = tl.load(mask.q_ids + b.to(tl.int64) * plain(mask.q_ids_batch) + i, mask=inside, other=0)
        k_id = tl.load(mask.k_ids + b.to(tl.int64) * plain(mask.k_ids_batch) + j, mask=inside, other=0)
        kept &= q_id == k_id
    return kept


@triton.jit
def edge_logits(
    qt, kt, eqt, ext, kept, ids, h, terms, edges, S: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """([E] logits in units, tanh of the softcap) of edges; -inf where not kept. Rows: [1, .] or [E, .]."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    if S.score == DOT:
        s = tl.sum(qt * kt, 1)
        if edges.x is not None:
            s += tl.sum(eqt * ext, 1)
    else:
        w = load_vector(terms.weight, h, S.dim, D)
        s = tl.sum(w * joint(qt + kt, number(terms, 2).to(ACC), S), 1)
    bent = 0.0
    if not S.bare:
        scale = number(terms, 0)
        if S.softcap:
            softcap = number(terms, 1)
            bent = tanh(s * (scale / softcap).to(ACC))
            s = bent * softcap.to(ACC)
        else:
            s = s * scale.to(ACC)
        if edges.bias is not None:
            bias = tl.load(
                edges.bias + h.to(tl.int64) * plain(edges.bias_head) + ids, mask=kept, other=0.0
            ).to(ACC)
            s = tl.where(bias == float("-inf"), bias, tl.maximum(s + bias, -1e11))
    return tl.where(kept, s, float("-inf")), bent


@triton.jit
def load_query_side(
    q, dout, edge_q, dout_edge, stats, i, inside, kept, b, h,
    S: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """What the backward passes need of queries i: rows of q, dO, q W and its gradient, and the statistics."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    zero = b.to(tl.int64) * 0
    qt = load_at(q, rows_at(q, b, h, zero), i, kept, S.dim, D, ACC)
    dot_ = load_at(dout, rows_at(dout, b, h, zero), i, kept, S.dim_v, DV, ACC)
    high, low, delta = load_statistics(stats, b, h, zero, i, inside, S)
    eqt = qt
    deot = qt
    if EDGE > 0:
        eqt = load_at(edge_q, rows_at(edge_q, b, h, zero), i, kept, EDGE, DE, ACC)
        deot = load_at(dout_edge, rows_at(dout_edge, b, h, zero), i, kept, EDGE, DE, ACC)
    return qt, dot_, eqt, deot, high, low, delta


@triton.jit
def edge_gradients(
    qt, kt, dot_, vt, eqt, ext, deot, i, j, kept, ids, high, low, delta, b, h, terms, edges, factor,
    S: tl.constexpr, E: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """(weights after dropout, dL/dlogit, dL/dscore) [E] of edges; 0 where not kept."""
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    s, bent = edge_logits(qt, kt, eqt, ext, kept, ids, h, terms, edges, S, D)
    p = tl.sum(weigh(s[:, None], high, low, factor, S, False), 1)
    dp = tl.sum(dot_ * vt, 1)
    if EDGE > 0:
        dp += tl.sum(deot * ext, 1)
    used = p
    if S.dropout:
        stays = pair_stays(i, j, b, h, terms)
        rest = number(terms, 3).to(ACC)
        dp = tl.where(stays, dp * rest, 0.0)
        used = tl.where(stays, p * rest, 0.0)
    ds = tl.sum(logit_gradient(s[:, None], p[:, None], dp[:, None], delta, S, False), 1)
    hidden = s == float("-inf")
    ds = tl.where(hidden, 0.0, ds)
    return tl.where(hidden, 0.0, used), ds, score_gradient(ds, bent, S)
