"""How a graph layer with edge features is measured: GATv2Conv, saccade's, PyTorch Geometric's and the formula
in plain torch, the same weights in all three.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import saccade
import torch
import torch.nn.functional as F
from saccade.graph import Graph
from saccade.testing import assert_no_worse_than
from torch import Tensor

from .cases import DTYPES, FORWARD, TRAIN, Group
from .graph_cases import build, columns

Call = Callable[[], list[Tensor]]
_FEATURES = 64  # of a node


@dataclass(frozen=True)
class ConvCase:
    """One call of a GATv2Conv on the edges of a graph, features on every edge, no loops added."""

    name: str
    kind: str
    edges: int
    heads: int = 4
    head_dim: int = 32
    edge_dim: int = 16
    dtype: str = "fp32"

    def graph(self) -> Graph:
        return build(self.kind, self.edges)

    def flops(self, direction: str) -> int:
        """The linear maps, and q + k + W e, its score and p v of every edge; three times that with the
        backward pass.
        """
        graph, width = self.graph(), self.heads * self.head_dim
        maps = 2 * width * (2 * graph.num_keys * _FEATURES + graph.num_edges * self.edge_dim)
        return (maps + 6 * graph.num_edges * width) * (3 if direction == TRAIN else 1)

    def describe(self) -> dict[str, object]:
        """The columns of a result row that say what was measured."""
        return columns(self)


class Formula(torch.nn.Module):
    """GATv2Conv's equation (Brody et al., 2105.14491) with gather and scatter."""

    def __init__(self, twin: Any) -> None:
        super().__init__()
        self.heads, self.slope = twin.heads, twin.negative_slope
        for name in ("lin_l", "lin_r", "lin_edge", "att", "bias"):
            setattr(self, name, copy.deepcopy(getattr(twin, name)))

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        """`x` [N, F], `edges` [2, E], `features` [E, De]; gives [N, H * D]."""
        j, i = edges
        keys, queries = (y.unflatten(-1, (self.heads, -1)) for y in (self.lin_l(x), self.lin_r(x)))
        sums = queries[i] + keys[j] + self.lin_edge(features).unflatten(-1, (self.heads, -1))
        logits = (F.leaky_relu(sums, self.slope) * self.att).sum(-1)
        where = i[:, None].expand_as(logits)
        peak = logits.new_full((len(x), self.heads), -torch.inf)
        peak = peak.scatter_reduce(0, where, logits.detach(), "amax")
        powers = torch.exp(logits - peak[i])
        weights = powers / powers.new_zeros(len(x), self.heads).index_add(0, i, powers)[i]
        return torch.zeros_like(keys).index_add(0, i, weights[..., None] * keys[j]).flatten(1) + self.bias


class ConvWork:
    """One case made ready: the three layers with the same weights, their inputs, their check.

    Inputs and weights are multiples of 1/8 and 1/32: q + k + W e is exact in fp32, and no rounding moves it
    across the kink of LeakyReLU, where the gradient jumps.
    """

    directions = (FORWARD, TRAIN)

    def __init__(self, case: ConvCase, device: str, excluded: frozenset[str] = frozenset()) -> None:
        self.case, self.dtype, self._excluded = case, DTYPES[case.dtype], excluded
        draw = torch.Generator(device).manual_seed(0)
        self.graph = case.graph().to(device)

        def drawn(*shape: int) -> Tensor:
            eighths = torch.randint(-16, 17, shape, generator=draw, device=device)
            return (eighths / 8).to(self.dtype).requires_grad_()

        self.x = drawn(self.graph.num_keys, _FEATURES)
        self.features = drawn(self.graph.num_edges, case.edge_dim)
        self.dout = drawn(self.graph.num_queries, case.heads * case.head_dim).detach()
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        self.twin = saccade.nn.GATv2Conv(*self._arguments, **self._options).to(device, self.dtype)
        torch.random.set_rng_state(state)
        with torch.no_grad():
            for weight in self.twin.parameters():
                weight.copy_((weight * 32).round() / 32)
        self.formula = Formula(self.twin)
        self._known: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    @property
    def _arguments(self) -> tuple[int, int, int]:
        return _FEATURES, self.case.head_dim, self.case.heads

    @property
    def _options(self) -> dict[str, Any]:
        return {"edge_dim": self.case.edge_dim, "add_self_loops": False}

    def _call(self, layer: torch.nn.Module, edges: Any, direction: str, wide: bool = False) -> Call:
        inputs = [self.x, self.features]
        if wide:
            inputs = [y.detach().double().requires_grad_() for y in inputs]
        dout = self.dout.to(inputs[0].dtype)

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [layer(inputs[0], edges, inputs[1])]

        def train() -> list[Tensor]:
            out = layer(inputs[0], edges, inputs[1])
            wanted = [*inputs, layer.att, layer.lin_edge.weight]
            return [out.detach(), *torch.autograd.grad(out, wanted, dout)]

        return train if direction == TRAIN else forward

    def _pyg(self, direction: str) -> Call | str:
        try:
            from torch_geometric.nn import GATv2Conv
        except ImportError:
            return "torch_geometric is not installed"
        layer = GATv2Conv(*self._arguments, **self._options).to(self.x.device, self.dtype)
        layer.load_state_dict(self.twin.state_dict())
        return self._call(layer, self.graph.edge_index, direction)

    def offers(self, direction: str) -> dict[str, Call | str]:
        """The call of every provider, or its reason."""
        found = {
            "saccade": self._call(self.twin, self.graph, direction),
            "pyg": self._pyg(direction),
            "gather-scatter": self._call(self.formula, self.graph.edge_index, direction),
        }
        return {name: call for name, call in found.items() if name not in self._excluded}

    def fault(self, name: str, direction: str, call: Call) -> str:
        """Run a provider once and compare with the formula in fp64; its own error in this dtype is the
        yardstick.
        """
        if direction not in self._known:
            edges, wide = self.graph.edge_index, copy.deepcopy(self.formula).double()
            plain = self._call(self.formula, edges, direction)()
            self._known[direction] = plain, self._call(wide, edges, direction, wide=True)()
        for n, triple in enumerate(zip(call(), *self._known[direction], strict=True)):
            try:
                assert_no_worse_than(*triple, factor=3.0, name=f"result {n}")
            except AssertionError as error:
                return str(error)
        return ""

    def flops(self, direction: str, name: str) -> int:
        return self.case.flops(direction)


def convolutions() -> list[Group]:
    """GATv2Conv with 16 features on every edge, whole layers."""
    kinds = ("erdos-renyi", "power-law", "molecules")
    cases = tuple(ConvCase(f"gatv2conv-{kind}-100k", kind, 100_000) for kind in kinds)
    return [Group("gatv2conv", cases, "pyg")]  # type: ignore[arg-type]
