"""`pytest benchmarks --benchmark-only`: the model cases, every provider checked first."""

from __future__ import annotations

from typing import Any

import pytest
from saccade.benchmarks import cases
from saccade.benchmarks.attention import AttentionWork
from saccade.benchmarks.suites import Work

CASES = [case for group in cases.models() for case in group.cases]


def run(benchmark: Any, work: Work, name: str, direction: str) -> None:
    """Skip with the provider's reason, refuse wrong results, time."""
    offer = work.offers(direction)[name]
    if isinstance(offer, str):
        pytest.skip(offer)
    assert not (wrong := work.fault(name, direction, offer)), wrong
    benchmark.pedantic(offer, rounds=5, warmup_rounds=1)
    if benchmark.stats is not None:  # None when pytest-benchmark is told to time nothing
        benchmark.extra_info["gflops"] = work.flops(direction, name) / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("name", ["saccade", "sdpa", "sdpa-mask"])
@pytest.mark.parametrize(
    ("case", "direction"), [pytest.param(c, d, id=f"{c.name}-{d}") for c in CASES for d in c.directions]
)
def test_attention(benchmark: Any, case: cases.Case, direction: str, name: str) -> None:
    benchmark.group = f"{case.name} {direction}"
    run(benchmark, AttentionWork(case, "cpu", frozenset({"flex"})), name, direction)
