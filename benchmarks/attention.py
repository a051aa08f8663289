"""How cases of attention are measured."""

from __future__ import annotations

import torch

from .cases import DTYPES, Case
from .check import Oracle
from .peers import PROVIDERS, Call, Inputs


class AttentionWork:
    """One case made ready on a device: its inputs, its providers, its check."""

    def __init__(self, case: Case, device: str, excluded: frozenset[str] = frozenset()) -> None:
        self.case = case
        self.inputs = Inputs.of(case, device)
        self._providers = {name: p for name, p in PROVIDERS.items() if name not in excluded}
        self._oracles: dict[Case, Oracle] = {}

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.case.dtype]

    @property
    def directions(self) -> tuple[str, ...]:
        return self.case.directions

    def offers(self, direction: str) -> dict[str, Call | str]:
        """The call of every provider, or its reason."""
        return {name: provider.offer(self.inputs, direction) for name, provider in self._providers.items()}

    def fault(self, name: str, direction: str, call: Call) -> str:
        """Run a provider once and compare; empty when it is right."""
        inputs = self.inputs
        if name == "saccade-plain":
            inputs = Inputs.of(self.case.plain(), inputs.q.device.type)
        elif self.case.dropout_p and self._providers[name].random:
            inputs = inputs.without_dropout()
            offered = self._providers[name].offer(inputs, direction)
            assert not isinstance(offered, str)
            call = offered
        return self._oracle(inputs).fault(call())

    def _oracle(self, inputs: Inputs) -> Oracle:
        if inputs.case not in self._oracles:
            self._oracles[inputs.case] = Oracle(inputs)
        return self._oracles[inputs.case]

    def flops(self, direction: str, name: str) -> int:
        case = self.case.plain() if name == "saccade-plain" else self.case
        return case.flops(direction)
