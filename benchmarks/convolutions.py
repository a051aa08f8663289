"""How a graph layer with edge features is measured: saccade's, PyTorch Geometric's and the formula in plain
torch, the same weights in all three.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import saccade
import torch
from saccade.graph import Graph
from saccade.testing import assert_no_worse_than
from torch import Tensor

from . import formulas
from .cases import DTYPES, FORWARD, TRAIN, Group
from .graph_cases import build, columns

Call = Callable[[], list[Tensor]]
_FEATURES = 64  # of a node
# The formula of a layer, and the options it is made with.
_LAYERS: dict[str, tuple[type[formulas.Formula], dict[str, Any]]] = {
    "GATv2Conv": (formulas.GATv2, {"add_self_loops": False}),
    "GATConv": (formulas.GAT, {"add_self_loops": False}),
    "TransformerConv": (formulas.Transformer, {}),
}


@dataclass(frozen=True)
class ConvCase:
    """One call of a layer on the edges of a graph, features on every edge, no loops added."""

    name: str
    layer: str
    kind: str
    edges: int
    heads: int = 4
    head_dim: int = 32
    edge_dim: int = 16
    dtype: str = "fp32"

    def graph(self) -> Graph:
        return build(self.kind, self.edges)

    def flops(self, direction: str) -> int:
        """The linear maps, W e, the score and p v of every edge; three times that with the backward pass."""
        graph, width, formula = self.graph(), self.heads * self.head_dim, _LAYERS[self.layer][0]
        maps = 2 * formula.node_maps * graph.num_keys * _FEATURES
        edges = graph.num_edges * (2 * self.edge_dim + formula.per_edge + 2)
        return (maps + edges) * width * (3 if direction == TRAIN else 1)

    def describe(self) -> dict[str, object]:
        """The columns of a result row that say what was measured."""
        return columns(self)


class ConvWork:
    """One case made ready: the three layers with the same weights, their inputs, their check.

    Inputs and weights are multiples of 1/8 and 1/32: what LeakyReLU is taken of is exact in fp32 - sums of a
    few hundred products, at most of three such numbers, multiples of 2^-13 below 2^10 - and no rounding moves
    it across the kink, where the gradient jumps.
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
        formula, self._options = _LAYERS[case.layer]
        self.twin = self._layer(saccade.nn)
        torch.random.set_rng_state(state)
        with torch.no_grad():
            for weight in self.twin.parameters():
                weight.copy_((weight * 32).round() / 32)
        self.formula = formula(self.twin)
        self._weights = [name for name, _ in self.twin.named_parameters()]
        self._known: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def _layer(self, library: Any) -> Any:
        case = self.case
        made = getattr(library, case.layer)(
            _FEATURES, case.head_dim, case.heads, edge_dim=case.edge_dim, **self._options
        )
        return made.to(self.x.device, self.dtype)

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
            wanted = [*inputs, *(layer.get_parameter(name) for name in self._weights)]
            return [out.detach(), *torch.autograd.grad(out, wanted, dout)]

        return train if direction == TRAIN else forward

    def _pyg(self, direction: str) -> Call | str:
        try:
            from torch_geometric import nn
        except ImportError:
            return "torch_geometric is not installed"
        layer = self._layer(nn)
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
    """Whole layers, with 16 features on every edge."""
    kinds = ("erdos-renyi", "power-law", "molecules")
    found = []
    for name in _LAYERS:
        cases = tuple(ConvCase(f"{name.lower()}-{kind}-100k", name, kind, 100_000) for kind in kinds)
        found.append(Group(name.lower(), cases, "pyg"))  # type: ignore[arg-type]
    return found
