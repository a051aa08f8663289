"""The gather operators: graph attention edge by edge.

Edge features need no kernel of their own beside the dot score: q . (k + W e) = q . k + (q W) . e, and
sum p (v + W e) = sum p v + W sum p e. So the operator takes q W [B, H, Sq, De] beside q and returns sum p e
[B, H, Sq, De] beside the output. In an additive score, w . phi(q + k + W e), nothing splits: there the
operator takes W [1, H, D, De] in place of q W and forms W e edge by edge.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops as cpu_ops
from .layout import in_order, memory_order
from .ops import EDGE_GRADIENTS
from .problem import DOT, Spec, accumulator

# Place among the tensors of a problem -> bit among the operator's gradients, in the order in which it returns
# them.
_PLACES = {0: "q", 1: "k", 2: "v", 5: "weight", 9: "edge_bias"}
_BITS = {n: EDGE_GRADIENTS[name] for n, name in _PLACES.items()}
_NEED_EDGE_Q, _NEED_EDGE_X = EDGE_GRADIENTS["edge_q"], EDGE_GRADIENTS["edge_x"]
_EDGE_E, _EDGE_W = 10, 11


def forward(
    ops: Any, spec: Spec, tensors: tuple[Tensor | None, ...], seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, sum p e) of the tensors of a problem; the last is empty without edge features. `ops` is the
    module whose gather operators run.
    """
    tensors, _ = _shown(tensors)
    q, w = tensors[0], tensors[_EDGE_W]
    assert q is not None
    order = spec.layout.out_order or memory_order(q)
    maps = _maps(ops, q)
    out, lse, mixed = ops.gather_forward(spec, *_arguments(spec, tensors, maps), seed, order)
    if w is not None and spec.score == DOT:
        out = maps.add(out, mixed, w, order)
    return out, lse, mixed


def backward(
    call: tuple[Any, Spec],
    grads: tuple[Tensor | None, ...],
    tensors: tuple[Tensor | None, ...],
    seed: Tensor | None,
    wanted: tuple[int, ...],
) -> dict[int, Tensor]:
    """The gradients wanted, by place; `call` is the operators' module and the spec, `grads` is dout, dlse,
    out, lse, sum p e.
    """
    ops, spec = call
    dout, dlse, out, lse, mixed = grads
    tensors, hidden = _shown(tensors)
    q, e, w = tensors[0], tensors[_EDGE_E], tensors[_EDGE_W]
    assert q is not None and dout is not None and mixed is not None and spec.args.graph is not None
    needs = sum(_BITS.get(n, 0) for n in wanted)
    dout_edge, maps = None, _maps(ops, q)
    joins = w is not None and spec.score != DOT
    if joins:
        needs |= _NEED_EDGE_Q * (_EDGE_W in wanted) | _NEED_EDGE_X * (_EDGE_E in wanted)
    elif w is not None:
        dout_edge = maps.project(dout, w)
        needs |= _NEED_EDGE_Q * (0 in wanted or _EDGE_W in wanted) | _NEED_EDGE_X * (_EDGE_E in wanted)
    # `out` has the edges' share already: its row sums with dout are whole, and the share alone counts as
    # zero.
    share = mixed if w is None else torch.zeros_like(mixed)
    dq, dk, dv, dweight, dedge_bias, dedge_q, dedge_x = ops.gather_backward(
        spec, (dout, dlse, dout_edge, out, lse, share), *_arguments(spec, tensors, maps), seed, needs
    )
    found = {0: dq, 1: dk, 2: dv, 5: dweight, 9: dedge_bias}
    if joins:
        found |= {_EDGE_E: dedge_x, _EDGE_W: dedge_q[0] if _EDGE_W in wanted else dedge_q}
    elif w is not None and e is not None:
        found[_EDGE_E] = dedge_x
        if 0 in wanted:
            found[0] = maps.add(dq, dedge_q, w, memory_order(dq))
        if _EDGE_W in wanted:
            found[_EDGE_W] = maps.outer(q, dedge_q) + maps.outer(dout, mixed)
    return found | {n: torch.zeros_like(x) for n, x in hidden.items() if n in wanted}


def _shown(tensors: tuple[Tensor | None, ...]) -> tuple[tuple[Tensor | None, ...], dict[int, Tensor]]:
    """The tensors that kernels see, and those they do not: features [E, 0] add nothing."""
    w = tensors[_EDGE_W]
    if w is None or w.shape[-1] > 0:
        return tensors, {}
    hidden = {n: x for n, x in enumerate(tensors) if n in (_EDGE_E, _EDGE_W) and x is not None}
    return tuple(None if n in hidden else x for n, x in enumerate(tensors)), hidden


class _TorchMaps:
    """What edge features cost for every node, by torch's matrix products."""

    @staticmethod
    def project(x: Tensor, w: Tensor) -> Tensor:
        """x W: [B, H, N, De] of x [B, H, N, D] and W [H, D, De]."""
        wide = accumulator(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return (x.to(wide) @ w.to(wide)).to(x.dtype)

    @staticmethod
    def add(base: Tensor, y: Tensor, w: Tensor, order: tuple[int, ...]) -> Tensor:
        """base + W y, in base's dtype, its dimensions in memory as `order` lists them."""
        wide = accumulator(base.dtype)
        with torch.autocast(base.device.type, enabled=False):
            lifted = y.to(wide) @ w.to(wide).transpose(-1, -2)
        return in_order((base.to(wide) + lifted).to(base.dtype), order)

    @staticmethod
    def outer(x: Tensor, y: Tensor) -> Tensor:
        """Products of rows x and y, summed over batch and rows. A row y of zeros adds 0, though x be NaN."""
        wide = accumulator(x.dtype)
        x = torch.where((y != 0).any(-1, keepdim=True), x, 0.0)
        with torch.autocast(x.device.type, enabled=False):
            return torch.einsum("bhid,bhie->hde", x.to(wide), y.to(wide))


class _KernelMaps:
    """The same by the CPU's kernels: bitwise the same for any number of threads, which torch's are not."""

    @staticmethod
    def project(x: Tensor, w: Tensor) -> Tensor:
        return cpu_ops.row_map(x, w.transpose(-1, -2), None, memory_order(x))

    @staticmethod
    def add(base: Tensor, y: Tensor, w: Tensor, order: tuple[int, ...]) -> Tensor:
        return cpu_ops.row_map(y, w, base, order)

    @staticmethod
    def outer(x: Tensor, y: Tensor) -> Tensor:
        return cpu_ops.row_outer(y, x).transpose(-1, -2)


def _maps(ops: Any, q: Tensor) -> Any:
    """Programs that `torch.export` writes down differentiate what they hold, so theirs are torch's."""
    kernels = ops is cpu_ops and q.device.type == "cpu" and not torch.compiler.is_exporting()
    return _KernelMaps if kernels else _TorchMaps


def _arguments(spec: Spec, tensors: tuple[Tensor | None, ...], maps: Any) -> tuple[Any, Any]:
    """The nine tensors of every operator, and edge_bias, q W (an additive score's: W) and e."""
    q, k, v, bias, rel_bias, weight, sink, extra_k, extra_v, edge_bias, e, w = (
        x if x is None or n < 3 else x.contiguous() for n, x in enumerate(tensors)
    )
    assert q is not None
    edge_q = None
    if w is not None:
        edge_q = maps.project(q, w) if spec.score == DOT else w[None].to(accumulator(q.dtype))
    return (q, k, v, bias, rel_bias, weight, sink, extra_k, extra_v), (edge_bias, edge_q, e)
