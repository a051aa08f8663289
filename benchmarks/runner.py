"""Measures the cases of a suite one after the other and gives rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .cases import Group
from .measure import Budget, Clock, Peak, interleaved
from .suites import Part, Suite, Work

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What the command line asked for."""

    suite: str
    device: str
    budget: Budget
    only: str = ""
    excluded: frozenset[str] = frozenset()

    def selected(self, suite: Suite) -> list[tuple[Part, Group, list[Any]]]:
        """The groups that have a case whose name, or group's name, contains `only`."""
        found = []
        for part in suite.parts:
            for group in part.groups():
                wanted = [c for c in group.cases if self.only in c.name or self.only in group.name]
                if wanted and group.peer not in self.excluded:
                    found.append((part, group, wanted))
        return found


def measure_case(work: Work, group: Group, plan: Plan, clock: Clock, peak: Peak) -> Iterator[Row]:
    """A row for every direction and provider. No number before the provider's results are right."""
    for direction in work.directions:
        peak.sample(work.dtype)
        calls, faults = {}, {}
        for name, offer in work.offers(direction).items():
            if isinstance(offer, str):
                faults[name] = ("", offer)
                continue
            try:
                wrong = work.fault(name, direction, offer)
            except Exception as error:  # a peer's failure is a result, not the end of the run
                wrong = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                if clock.cuda:
                    torch.cuda.empty_cache()
            if wrong:
                faults[name] = (wrong, "")
            else:
                calls[name] = offer
        timings = interleaved(calls, clock, plan.budget) if calls else {}
        peak.sample(work.dtype)
        base = {"suite": plan.suite, "group": group.name, **work.case.describe(), "direction": direction}  # type: ignore[attr-defined]
        for name, timing in timings.items():
            rate = work.flops(direction, name) / timing.median
            milliseconds = {
                "ms": timing.median * 1e3,
                "ms_low": timing.low * 1e3,
                "ms_high": timing.high * 1e3,
            }
            if timing.host is not None:
                milliseconds["host_ms"] = timing.host * 1e3
            yield base | {"provider": name, **milliseconds, "runs": timing.runs, "gflops": rate / 1e9}
        for name, (wrong, absent) in faults.items():
            yield base | {"provider": name, "error": wrong, "absent": absent}


Key = tuple[str, str, str, str]


def _rates(rows: list[Row]) -> dict[Key, float]:
    """Useful GFLOP/s by group, case, direction and provider."""
    names = ("group", "case", "direction", "provider")
    return {tuple(r[n] for n in names): r["gflops"] for r in rows if "gflops" in r}  # type: ignore[misc]


def add_ratios(rows: list[Row], groups: Iterable[Group], peak: Peak, dtypes: dict[str, Any]) -> None:
    """Add `ratio`, saccade's rate over the peer's, and `peak_fraction`, a rate over the matrix product's."""
    peers = {group.name: group.peer for group in groups}
    rates = _rates(rows)
    for row in rows:
        if "gflops" not in row:
            continue
        limit = peak.rate(dtypes[row["dtype"]]) / 1e9
        row["peak_fraction"] = row["gflops"] / limit if limit else None
        peer = rates.get((row["group"], row["case"], row["direction"], peers[row["group"]]))
        if row["provider"] == "saccade" and peer:
            row["ratio"], row["peer"] = row["gflops"] / peer, peers[row["group"]]


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summarise(rows: list[Row], groups: Iterable[Group]) -> list[Row]:
    """Per group, peer and direction: the ratios' geometric mean, the least one, and what the project wants.

    `limit` is what the mean would be if saccade computed at the rate of the machine's matrix product.
    """
    found, rates = [], _rates(rows)
    for group in groups:
        mine = [r for r in rows if r["group"] == group.name and r["provider"] == "saccade" and "gflops" in r]
        for peer, goal in ((group.peer, group.goal), *group.others.items()):
            for direction in dict.fromkeys(r["direction"] for r in mine):
                keys = [
                    (r, (group.name, r["case"], direction, peer)) for r in mine if r["direction"] == direction
                ]
                ratios = {r["case"]: r["gflops"] / rates[key] for r, key in keys if key in rates}
                if not ratios:
                    continue
                limits = [ratios[r["case"]] / r["peak_fraction"] for r, key in keys if key in rates]
                least = min(ratios, key=lambda case: ratios[case])
                line = {"group": group.name, "direction": direction, "peer": peer, "cases": len(ratios)}
                line |= {
                    "mean": _mean(list(ratios.values())),
                    "limit": _mean(limits),
                    "goal": goal.get(direction),
                }
                line |= {"least": ratios[least], "least_case": least, "floor": group.floor}
                found.append(line)
    return found
