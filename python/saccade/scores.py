"""The scores that are not the dot product. `weight` is [H, D] or [D] and takes a gradient.

With a Graph, `edge_attr` = (e [E, De], W [H, D, De]) joins q_i + k_j + W e before the nonlinearity, as in
GATv2Conv of PyTorch Geometric; values stay as they are. Both take gradients. e is in the order of the edges.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .checks import finite


class Additive:
    """score_ij = weight . tanh(q_i + k_j [+ W e_ij]) (Bahdanau, Cho, Bengio: 1409.0473)."""

    __slots__ = ("weight", "edge_attr")
    slope = 0.0
    code = 1

    def __init__(self, weight: Tensor, edge_attr: tuple[Tensor, Tensor] | None = None) -> None:
        self.weight, self.edge_attr = _checked(weight), _pair(edge_attr)

    def __repr__(self) -> str:
        return f"Additive({list(self.weight.shape)})"


class GATv2:
    """score_ij = weight . leaky_relu(q_i + k_j [+ W e_ij], slope) (Brody, Alon, Yahav: 2105.14491)."""

    __slots__ = ("weight", "slope", "edge_attr")
    code = 2

    def __init__(
        self, weight: Tensor, slope: float = 0.2, edge_attr: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.weight, self.edge_attr = _checked(weight), _pair(edge_attr)
        self.slope = finite("slope", slope)

    def __repr__(self) -> str:
        return f"GATv2({list(self.weight.shape)}, {self.slope})"


def _pair(edge_attr: Any) -> tuple[Tensor, Tensor] | None:
    if edge_attr is None:
        return None
    if not isinstance(edge_attr, tuple | list) or len(edge_attr) != 2:
        raise TypeError(f"edge_attr: expected a pair (e, W), got {type(edge_attr).__name__}")
    return edge_attr[0], edge_attr[1]


def _checked(weight: object) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor [H, D] or [D], got {type(weight).__name__}")
    if weight.dim() not in (1, 2) or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected a float tensor [H, D] or [D], got {weight.dtype} {list(weight.shape)}"
        )
    return weight
