"""The order in which a tensor's dimensions lie in memory. Outputs follow q where q is dense in some order."""

from __future__ import annotations

from torch import Tensor

_ORDERS: dict[int, tuple[int, ...]] = {3: (0, 1, 2), 4: (0, 1, 2, 3)}
_SWAPPED = (0, 2, 1, 3)  # [B, S, H, D] in memory, seen as [B, H, S, D]


def memory_order(x: Tensor) -> tuple[int, ...]:
    """Dimensions of `x` from outermost to innermost; the plain order where `x` is not dense in any."""
    plain = _ORDERS[x.dim()]
    if x.is_contiguous():
        return plain
    if x.dim() == 4 and x.transpose(1, 2).is_contiguous():
        return _SWAPPED
    strides = x.stride()
    order: tuple[int, ...] = ()
    for d in plain:  # sorted by hand: torch.compile sorts no strides that it leaves open
        at = len(order)
        while at > 0 and strides[order[at - 1]] < strides[d]:
            at -= 1
        order = (*order[:at], d, *order[at:])
    return order if x.permute(order).is_contiguous() else plain


def in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """`x` with its dimensions laid out in memory in `order`."""
    inverse = [order.index(d) for d in range(len(order))]
    return x.permute(order).contiguous().permute(inverse)
