"""`pytest benchmarks --benchmark-only`: nn.MultiheadAttention, torch's and swapped, at length 512."""

from __future__ import annotations

from typing import Any

import pytest
from saccade.benchmarks import cases
from saccade.benchmarks.modules import ModuleWork

from .test_attention_benchmark import run

CASES = [case for group in cases.modules() for case in group.cases if case.length == 512]


@pytest.mark.parametrize("name", ["saccade", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_module(benchmark: Any, case: cases.ModuleCase, name: str) -> None:
    work = ModuleWork(case, "cpu")
    (direction,) = work.directions
    benchmark.group = case.name
    run(benchmark, work, name, direction)
