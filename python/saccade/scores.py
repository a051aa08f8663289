"""The scores that are not the dot product. `weight` is [H, D] or [D] and takes a gradient."""

from __future__ import annotations

from torch import Tensor


class Additive:
    """score_ij = weight . tanh(q_i + k_j) (Bahdanau, Cho, Bengio: 1409.0473)."""

    __slots__ = ("weight",)
    slope = 0.0
    code = 1

    def __init__(self, weight: Tensor) -> None:
        self.weight = _checked(weight)

    def __repr__(self) -> str:
        return f"Additive({list(self.weight.shape)})"


class GATv2:
    """score_ij = weight . leaky_relu(q_i + k_j, slope) (Brody, Alon, Yahav: 2105.14491)."""

    __slots__ = ("weight", "slope")
    code = 2

    def __init__(self, weight: Tensor, slope: float = 0.2) -> None:
        self.weight = _checked(weight)
        if isinstance(slope, bool) or not isinstance(slope, int | float):
            raise TypeError(f"slope: expected a float, got {type(slope).__name__}")
        self.slope = float(slope)

    def __repr__(self) -> str:
        return f"GATv2({list(self.weight.shape)}, {self.slope})"


def _checked(weight: object) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor [H, D] or [D], got {type(weight).__name__}")
    if weight.dim() not in (1, 2) or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected a float tensor [H, D] or [D], got {weight.dtype} {list(weight.shape)}"
        )
    return weight
