"""Launches of the gather body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import runtime
from .call import Call, cdiv, on_device
from .edges import Edges, Items
from .gather import gather_forward, merge_rows
from .gather_backward import gather_backward_edges, gather_backward_keys, gather_backward_rows, sum_pieces
from .launch import statistics
from .tile import Rows

_WARPS = 1
# Numbers of a block of edges in a pass, so that its registers hold them: without features, and with.
_BLOCK = {"forward": (2048, 1024), "rows": (2048, 512), "keys": (2048, 512), "edges": (1024, 512)}
# Of the gradient of W: the fewest edges of a partial sum, and the numbers that all of them together may take.
# So how the sum is split follows from the shapes alone.
_PART, _PARTS = 64, 1 << 22


@dataclass(frozen=True, slots=True)
class GatherCall:
    """A call on the edges of a graph."""

    call: Call
    work: list[Tensor]  # of the rows: see Graph.work
    keys: Tensor  # [E] int32
    ids: Tensor | None
    edge_bias: Tensor | None  # [1 or H, num_edges]
    edge_q: Tensor | None  # [B, H, Sq, De]; of an additive score W [1, H, D, De]
    edge_x: Tensor | None  # [num_edges, De]
    num_edges: int

    @staticmethod
    def of(call: tuple[Any, ...], edges: tuple[Any, ...]) -> GatherCall:
        return GatherCall(Call(*call), *edges)

    @property
    def joint_dim(self) -> int:
        """De of features that join an additive score."""
        return 0 if self.edge_x is None or not self.call.score else self.edge_x.shape[1]

    @property
    def edge_dim(self) -> int:
        """De of features that are folded into queries and outputs."""
        return 0 if self.edge_x is None or self.call.score else self.edge_x.shape[1]

    @property
    def folded(self) -> Tensor | None:
        """q W."""
        return None if self.call.score else self.edge_q

    def edges(self, rows: Tensor | None, keys: Tensor | None, ids: Tensor | None) -> Edges:
        bias, x, weight = self.edge_bias, self.edge_x, None
        if self.joint_dim and self.edge_q is not None:
            weight = self.edge_q[0].mT.contiguous()
        bias_head = runtime(0 if bias is None or bias.shape[0] == 1 else bias.stride(0))
        return Edges(rows, keys, ids, bias, bias_head, None if x is None else x.contiguous(), weight)

    def inputs(self) -> tuple[Rows | None, ...]:
        """q, k, v and q W."""
        call, edge_q = self.call, self.folded
        return (*map(call.rows, (call.q, call.k, call.v)), None if edge_q is None else call.rows(edge_q))

    def shape(self, name: str) -> dict[str, Any]:
        """What the kernels of a pass are compiled for."""
        static = self.call.static()
        static = static._replace(
            bare=static.bare and self.edge_bias is None,
            exact=static.exact or self.edge_bias is not None,
            graph=False,
            joint=self.joint_dim,
        )
        wide, wide_v, wide_e = (_power_of_two(n) for n in (static.dim, static.dim_v, self.edge_dim))
        numbers = _BLOCK[name][self.edge_x is not None] // (2 if static.wide else 1)
        edges = max(1, min(32, numbers // max(wide, wide_v, wide_e)))
        return {"S": static, "E": edges, "D": wide, "DV": wide_v, "DE": wide_e, "EDGE": self.edge_dim,
                "num_warps": 4 if static.wide else _WARPS}  # fmt: skip


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def forward(g: GatherCall, out: Tensor, lse: Tensor, mixed: Tensor) -> None:
    """Fill out, lse and the sums p e."""
    call, shape = g.call, g.shape("forward")
    *work, cut, ends = g.work
    slots = 0 if not cut.numel() else g.work[3].numel()
    pairs = call.batch * call.heads
    if not pairs * work[0].numel():
        return
    parts = _parts(call, call.heads, slots, 2 + shape["DV"] + shape["DE"])
    out_edge = call.rows(mixed) if g.edge_dim else None
    terms, lengths = call.terms(), call.lengths_and_band(0)
    results = (call.rows(out), out_edge, call.vector(lse), parts)
    with on_device(out):
        gather_forward[(work[0].numel() * pairs,)](
            *g.inputs(), *results, g.edges(None, g.keys, g.ids),
            Items(*work), terms, call.mask(), *_numbers(lengths), work[0].numel(), slots, **shape,
        )  # fmt: skip
        if slots:
            merge_rows[(cut.numel() * pairs,)](
                *results, cut, ends, terms, cut.numel(), slots, S=shape["S"], DV=shape["DV"], DE=shape["DE"],
                EDGE=g.edge_dim, num_warps=_WARPS,
            )  # fmt: skip


def backward(
    g: GatherCall, heads: tuple[Any, ...], by_key: tuple[Any, ...], grads: tuple[Tensor, ...]
) -> None:
    """Fill the gradients that are wanted: those that are not empty. `heads` is dout, dlse, that of sum p e,
    out, lse; `by_key` is the work, rows and numbers of the edges in the order of their keys, and the rows in
    the order of the CSR.
    """
    dout, dlse, dout_edge, out, lse = heads
    dq, dk, dv, dweight, dedge_bias, dedge_q, dedge_x = grads
    for grad in (dedge_bias, dedge_x):  # an edge that an intersection left out has a number too
        if g.keys.numel() < g.num_edges or not g.call.batch * g.call.heads:
            grad.zero_()
    if not g.call.batch * g.call.heads:
        dweight.zero_()
        dedge_q.zero_()
        return
    with on_device(dout):
        stats = statistics(g.call, dout, dlse, out, lse, g.shape("rows")["S"])
        state = (g.call.rows(dout), None if dout_edge is None else g.call.rows(dout_edge))
        dfolded, djoint = (dedge_q[:0], dedge_q) if g.joint_dim else (dedge_q, dedge_q[:0])
        if any(x.numel() for x in (dq, dweight, dfolded)):
            _by_row(g, state, stats, dq, dfolded, dweight)
        if dk.numel() or dv.numel():
            _by_key(g, state, stats, by_key, dk, dv)
        if any(x.numel() for x in (dedge_bias, dedge_x, djoint)):
            _by_edge(g, state, stats, by_key[3], (dedge_bias, dedge_x, djoint))


def _parts(call: Call, heads: int, slots: int, width: int) -> Tensor:
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    return torch.empty((call.batch, heads, slots, width), dtype=wide, device=call.q.device)


def _numbers(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Lengths and band, without the tiled kernels' number of blocks and of distances."""
    return (*lengths[:2], *lengths[3:7])


def _or_scratch(call: Call, grad: Tensor, like: Tensor | None) -> Rows | None:
    """The rows of a gradient; where it is not wanted, of a place to write it all the same."""
    if like is None:
        return None
    return call.rows(grad if grad.numel() or not like.numel() else torch.empty_like(like))


def _by_row(
    g: GatherCall, state: tuple[Any, ...], stats: Any, dq: Tensor, dedge_q: Tensor, dweight: Tensor
) -> None:
    call, shape = g.call, g.shape("rows")
    *work, cut, ends = g.work
    items, slots = work[0].numel(), 0 if not cut.numel() else work[3].numel()
    if not items:
        dweight.zero_()
        return
    parts = _parts(call, call.heads, slots, shape["D"] + shape["DE"])
    shares = None
    if dweight.numel():
        shares = dweight.new_empty(call.batch, call.heads, items, call.q.shape[-1])
    targets = (_or_scratch(call, dq, call.q), _or_scratch(call, dedge_q, g.folded))
    pairs = call.batch * call.heads
    gather_backward_rows[(items * pairs,)](
        *g.inputs(), *state, *targets, shares, stats, parts,
        g.edges(None, g.keys, g.ids), Items(*work), call.terms(), call.mask(),
        *_numbers(call.lengths_and_band(0)), items, slots, **shape,
    )  # fmt: skip
    if slots:
        sum_pieces[(cut.numel() * pairs,)](
            *targets, parts, cut, ends, cut.numel(), slots, HEADS=call.heads, DIM=call.q.shape[-1],
            DIM2=g.edge_dim, D=shape["D"], D2=shape["DE"], **_accumulator(call),
        )  # fmt: skip
    if shares is not None:
        torch.sum(shares, (0, 2), out=dweight)


def _by_key(
    g: GatherCall, state: tuple[Any, ...], stats: Any, by_key: tuple[Any, ...], dk: Tensor, dv: Tensor
) -> None:
    call, shape = g.call, g.shape("keys")
    (*work, cut, ends), rows, ids, _ = by_key
    items, slots, heads = work[0].numel(), 0 if not cut.numel() else work[3].numel(), call.k.shape[1]
    if not items:
        return
    parts = _parts(call, heads, slots, shape["D"] + shape["DV"])
    targets = (_or_scratch(call, dk, call.k), _or_scratch(call, dv, call.v))
    gather_backward_keys[(items * heads * call.batch,)](
        *g.inputs(), *state, *targets, stats, parts,
        g.edges(rows, None, ids), Items(*work), call.terms(), call.mask(),
        *_numbers(call.lengths_and_band(0)), items, slots, **shape,
    )  # fmt: skip
    if slots:
        sum_pieces[(cut.numel() * heads * call.batch,)](
            *targets, parts, cut, ends, cut.numel(), slots, HEADS=heads, DIM=call.k.shape[-1],
            DIM2=call.v.shape[-1], D=shape["D"], D2=shape["DV"], **_accumulator(call),
        )  # fmt: skip


def _accumulator(call: Call) -> dict[str, Any]:
    import triton.language as tl

    return {"ACC": tl.float64 if call.q.dtype == torch.float64 else tl.float32, "num_warps": _WARPS}


def _by_edge(
    g: GatherCall, state: tuple[Any, ...], stats: Any, rows: Tensor, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """The gradients of biases and features, and of the W [1, H, D, De] of features that join the score."""
    dedge_bias, dedge_x, djoint = grads
    call, shape = g.call, g.shape("edges")
    count, span, shares = g.keys.numel(), shape["E"], None
    if not count:
        djoint.zero_()
        return
    if djoint.numel():
        span = max(_PART, cdiv(count, max(_PARTS // djoint.numel(), 1)))
        shares = djoint.new_empty(cdiv(count, span), call.heads, g.joint_dim, call.q.shape[-1])
    gather_backward_edges[(cdiv(count, span),)](
        *g.inputs(), *state,
        dedge_bias if dedge_bias.numel() else None, dedge_x if dedge_x.numel() else None, shares, stats,
        g.edges(rows, g.keys, g.ids), call.terms(), call.mask(), *_numbers(call.lengths_and_band(0)), count,
        call.batch, span, **shape, PER_HEAD=g.edge_bias is not None and g.edge_bias.shape[0] > 1,
    )  # fmt: skip
    if shares is not None:
        djoint.copy_(shares.sum(0).mT[None])
