"""The linear layer of PyTorch Geometric's convolutions: its parameters, initial values and lazy form."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter


def glorot(weight: Tensor | None) -> None:
    """Uniform in +-sqrt(6 / (rows + columns)) of the last two dimensions."""
    if weight is not None:
        bound = math.sqrt(6.0 / (weight.size(-2) + weight.size(-1)))
        nn.init.uniform_(weight, -bound, bound)


class Linear(nn.Module):
    """x W^T + b. `init` None is torch's own initialisation, "glorot" that of `glorot`."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, in_channels: int, out_channels: int, bias: bool = True, init: str | None = None
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.init = in_channels, out_channels, init
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels)) if in_channels > 0 else _unknown()
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.in_channels <= 0:
            if self.bias is not None:
                nn.init.zeros_(self.bias)
            return
        if self.init == "glorot":
            glorot(self.weight)
        else:
            bound = math.sqrt(6 / ((1 + math.sqrt(5) ** 2) * self.in_channels))
            nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            bound = 1.0 / math.sqrt(self.in_channels)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, bias={self.bias is not None}"


def _unknown() -> Any:
    return UninitializedParameter()


class LazyLinear(LazyModuleMixin, Linear):
    """Becomes a `Linear` when it sees its first input."""

    cls_to_become = Linear

    def initialize_parameters(self, x: Tensor) -> None:
        if self.has_uninitialized_params():
            with torch.no_grad():
                self.in_channels = x.shape[-1]
                self.weight.materialize((self.out_channels, self.in_channels))  # type: ignore[attr-defined]
                self.reset_parameters()


def linear(in_channels: int, out_channels: int, bias: bool = True, init: str | None = None) -> Linear:
    """A `Linear`; for in_channels -1 one that takes its size from its first input."""
    if in_channels > 0:
        return Linear(in_channels, out_channels, bias, init)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that lazy modules are new
        return LazyLinear(in_channels, out_channels, bias, init)


def weight_of(layer: Linear, x: Tensor) -> Tensor:
    """The weight of a layer of edge features `x` that is not called itself; a lazy one takes its size from
    them.
    """
    if isinstance(layer.weight, UninitializedParameter):
        layer(x[:0])
    if x.shape[1] != layer.weight.shape[1]:
        raise ValueError(
            f"edge_attr: expected {layer.weight.shape[1]} features of each edge, got {x.shape[1]}"
        )
    return layer.weight
