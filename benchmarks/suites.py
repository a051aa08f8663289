"""The registry of suites. A suite has parts; a part is groups of cases and the class that makes a case ready.

Such a class is a `Work` (`attention.AttentionWork` is one). Other kinds of cases `register` a suite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from . import cases
from .attention import AttentionWork
from .convolutions import ConvWork, convolutions
from .encoder import EncoderWork, encoders
from .gpu_cases import large_graphs, tiled
from .graph import GraphWork
from .graph_cases import graph_options, graphs
from .measure import Budget
from .modules import ModuleWork


class Work(Protocol):
    """One case made ready to be measured."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def directions(self) -> tuple[str, ...]: ...
    def offers(self, direction: str) -> dict[str, Any]: ...
    def fault(self, name: str, direction: str, call: Any) -> str: ...
    def flops(self, direction: str, name: str) -> int: ...


@dataclass(frozen=True)
class Part:
    """Groups measured in the same way."""

    work: Callable[[Any, str, frozenset[str]], Work]
    groups: Callable[[], list[cases.Group]]


@dataclass(frozen=True)
class Suite:
    """`memory`: whether peak memory is measured without being asked for. `gpu`: too large for a CPU."""

    about: str
    parts: tuple[Part, ...]
    budget: Budget
    memory: bool = False
    gpu: bool = False


SUITES: dict[str, Suite] = {}


def register(name: str, suite: Suite) -> None:
    """Make a suite known to the command line."""
    if name in SUITES:
        raise ValueError(f"suite {name!r} is registered already")
    SUITES[name] = suite


_DECODE = Part(AttentionWork, cases.decoding)
_ATTENTION = (Part(AttentionWork, cases.models), _DECODE, Part(AttentionWork, cases.options))
_MODULE = Part(ModuleWork, cases.modules)
_ENCODER = Part(EncoderWork, encoders)
_SWEEP = (
    Part(AttentionWork, cases.sweep),
    Part(AttentionWork, cases.windows),
    _DECODE,
    Part(AttentionWork, cases.options),
)

register("attention", Suite("layers of well-known models, and what options cost", _ATTENTION, Budget(0.5, 3)))
_GRAPHS = (Part(GraphWork, graphs), Part(GraphWork, graph_options), Part(ConvWork, convolutions))
register("graph", Suite("graphs, edge by edge; options, whole layers", _GRAPHS, Budget(0.5, 3)))
register(
    "module",
    Suite("nn.MultiheadAttention and padded encoders, swapped and not", (_MODULE, _ENCODER), Budget(0.6, 5)),
)
register(
    "cpu",
    Suite("every length, dtype, mask and module (long)", (*_SWEEP, _MODULE, _ENCODER), Budget(1.5, 5), True),
)
_TILED, _LARGE_GRAPHS = (Part(AttentionWork, tiled),), (Part(GraphWork, large_graphs),)
register("gpu", Suite("tensors large enough for a GPU", _TILED, Budget(0.4, 5), gpu=True))
register("gpu-graph", Suite("graphs large enough for one", _LARGE_GRAPHS, Budget(0.4, 5), gpu=True))
