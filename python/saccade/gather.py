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
    out, lse, mixed = ops.gather_forward(spec, *_arguments(spec, tensors), seed, order)
    if w is not None and spec.score == DOT:
        wide = accumulator(q.dtype)
        out = in_order((out.to(wide) + _lifted(mixed, w)).to(q.dtype), order)
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
    dout_edge = None
    joins = w is not None and spec.score != DOT
    if joins:
        needs |= _NEED_EDGE_Q * (_EDGE_W in wanted) | _NEED_EDGE_X * (_EDGE_E in wanted)
    elif w is not None:
        dout_edge = _projected(dout, w)
        needs |= _NEED_EDGE_Q * (0 in wanted or _EDGE_W in wanted) | _NEED_EDGE_X * (_EDGE_E in wanted)
    # `out` has the edges' share already: its row sums with dout are whole, and the share alone counts as
    # zero.
    share = mixed if w is None else torch.zeros_like(mixed)
    dq, dk, dv, dweight, dedge_bias, dedge_q, dedge_x = ops.gather_backward(
        spec, (dout, dlse, dout_edge, out, lse, share), *_arguments(spec, tensors), seed, needs
    )
    found = {0: dq, 1: dk, 2: dv, 5: dweight, 9: dedge_bias}
    if joins:
        found |= {_EDGE_E: dedge_x, _EDGE_W: dedge_q[0] if _EDGE_W in wanted else dedge_q}
    elif w is not None and e is not None:
        wide = accumulator(q.dtype)
        found[_EDGE_E] = dedge_x
        if 0 in wanted:
            found[0] = dq.to(wide) + _lifted(dedge_q, w)
        if _EDGE_W in wanted:
            found[_EDGE_W] = _outer(q, dedge_q, wide) + _outer(dout, mixed, wide)
    return found | {n: torch.zeros_like(x) for n, x in hidden.items() if n in wanted}


def _shown(tensors: tuple[Tensor | None, ...]) -> tuple[tuple[Tensor | None, ...], dict[int, Tensor]]:
    """The tensors that kernels see, and those they do not: features [E, 0] add nothing."""
    w = tensors[_EDGE_W]
    if w is None or w.shape[-1] > 0:
        return tensors, {}
    hidden = {n: x for n, x in enumerate(tensors) if n in (_EDGE_E, _EDGE_W) and x is not None}
    return tuple(None if n in hidden else x for n, x in enumerate(tensors)), hidden


def _projected(x: Tensor, w: Tensor) -> Tensor:
    wide = accumulator(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return (x.to(wide) @ w.to(wide)).to(x.dtype)


def _lifted(x: Tensor, w: Tensor) -> Tensor:
    wide = accumulator(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return x.to(wide) @ w.to(wide).transpose(-1, -2)


def _outer(x: Tensor, y: Tensor, wide: torch.dtype) -> Tensor:
    """The products of rows x and y, summed over batch and rows. A row y of zeros adds 0, though x be NaN."""
    x = torch.where((y != 0).any(-1, keepdim=True), x, 0.0)
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("bhid,bhie->hde", x.to(wide), y.to(wide))


def _arguments(spec: Spec, tensors: tuple[Tensor | None, ...]) -> tuple[Any, Any]:
    """The nine tensors of every operator, and edge_bias, q W (an additive score's: W) and e."""
    q, k, v, bias, rel_bias, weight, sink, extra_k, extra_v, edge_bias, e, w = (
        x if x is None or n < 3 else x.contiguous() for n, x in enumerate(tensors)
    )
    assert q is not None
    edge_q = None
    if w is not None:
        edge_q = _projected(q, w) if spec.score == DOT else w[None].to(accumulator(q.dtype))
    return (q, k, v, bias, rel_bias, weight, sink, extra_k, extra_v), (edge_bias, edge_q, e)
