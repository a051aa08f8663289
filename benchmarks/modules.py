"""How nn.MultiheadAttention is measured: torch's module, the same after saccade.accelerate, and the linear
layers of it alone, which are torch's in both and bound what faster attention can bring.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from saccade.accelerate import accelerate
from saccade.nn import MultiheadAttention
from saccade.nn._projections import project, project_out
from saccade.testing import assert_no_worse_than
from torch import Tensor

from .cases import DTYPES, FORWARD, TRAIN, ModuleCase

Call = Callable[[], list[Tensor]]
LINEAR = "linear"


class Linear(MultiheadAttention):
    """Every token keeps only itself: its value is the output, and no attention is computed."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        """As torch's module under a mask that keeps the diagonal alone."""
        return project_out(self, project(self, query, key, value)[2]), None


def linear_of(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of an accelerated model, its attention taken out."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            module.__class__ = Linear
    return model


def diagonal(length: int, device: torch.device) -> Tensor:
    """[L, L], True off the diagonal, which hides what Linear does not look at."""
    return ~torch.eye(length, dtype=torch.bool, device=device)


class ModuleWork:
    """One module case made ready: the two modules with the same weights, their inputs, their check."""

    def __init__(self, case: ModuleCase, device: str, excluded: frozenset[str] = frozenset()) -> None:
        self.case, self.dtype = case, DTYPES[case.dtype]
        generator = torch.random.get_rng_state()
        torch.manual_seed(0)
        module = torch.nn.MultiheadAttention(case.embed_dim, case.num_heads, batch_first=True, device=device)
        shape = (case.batch, case.length, case.embed_dim)
        self._x = torch.randn(shape, device=device).to(self.dtype).requires_grad_(case.training)
        self._dout = torch.randint(-8, 9, shape, device=device).to(self.dtype) / 8
        torch.random.set_rng_state(generator)
        self._torch = module.to(self.dtype).train(case.training)
        self._saccade = copy.deepcopy(self._torch)
        accelerate(self._saccade, verify=False)
        self._linear = linear_of(self._saccade)
        self._known: dict[bool, tuple[list[Tensor], list[Tensor]]] = {}

    @property
    def directions(self) -> tuple[str, ...]:
        return (TRAIN if self.case.training else FORWARD,)

    def _masks(self, dtype: torch.dtype, alone: bool) -> dict[str, Any]:
        """What users give: a float mask with its hint for causal, True where a key is padding. `alone`: the
        mask that Linear stands for.
        """
        case, device = self.case, self._x.device
        if alone:
            return {"need_weights": False, "attn_mask": diagonal(case.length, device)}
        masks: dict[str, Any] = {"need_weights": case.need_weights}
        if case.causal:
            above = torch.full((case.length, case.length), -torch.inf, device=device, dtype=dtype).triu(1)
            masks |= {"attn_mask": above, "is_causal": True}
        if case.padding:
            lengths = torch.linspace(case.length, case.length // 2, case.batch, device=device).long()
            masks["key_padding_mask"] = torch.arange(case.length, device=device) >= lengths[:, None]
        return masks

    def _call(self, module: torch.nn.Module, x: Tensor, dout: Tensor, alone: bool = False) -> Call:
        masks = self._masks(x.dtype, alone)

        def evaluate() -> list[Tensor]:
            with torch.no_grad():
                return [y for y in module(x, x, x, **masks) if y is not None]

        def train() -> list[Tensor]:
            outputs = [y for y in module(x, x, x, **masks) if y is not None]
            grads = torch.autograd.grad(outputs[0], [x, *module.parameters()], dout)
            return [*(y.detach() for y in outputs), *grads]

        return train if self.case.training else evaluate

    def offers(self, direction: str) -> dict[str, Call | str]:
        """Both modules can always; the linear layers alone give no weights."""
        linear = self._call(self._linear, self._x, self._dout)
        return {
            "saccade": self._call(self._saccade, self._x, self._dout),
            "torch": self._call(self._torch, self._x, self._dout),
            LINEAR: "the weights are asked for" if self.case.need_weights else linear,
        }

    def fault(self, name: str, direction: str, call: Call) -> str:
        """Compare with torch's module in fp64; torch's own error in this dtype is the yardstick."""
        alone = name == LINEAR
        if alone not in self._known:
            wide = copy.deepcopy(self._torch).double()
            x = self._x.detach().double().requires_grad_(self.case.training)
            plain = self._call(self._torch, self._x, self._dout, alone)()
            self._known[alone] = plain, self._call(wide, x, self._dout.double(), alone)()
        for n, triple in enumerate(zip(call(), *self._known[alone], strict=True)):
            try:
                assert_no_worse_than(*triple, factor=3.0 if n else 2.0, name=f"result {n}")
            except AssertionError as error:
                return str(error)
        return ""

    def flops(self, direction: str, name: str) -> int:
        return self.case.flops()
