"""Timing: all providers of a case in turn, round after round: what disturbs one disturbs them all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

Call = Callable[[], object]
_GEMM, _GEMM_CUDA = 2048, 8192
_FLUSHED = 256 << 20  # more bytes than any L2 cache holds
_HEAD_START = 2_000_000  # cycles, about a millisecond
_SETTLE, _TIMED = 10e-3, 5e-3  # seconds of short calls on the CPU, before and while they are timed


@dataclass(frozen=True)
class Timing:
    """Seconds for one call: the median of `runs`, and the quartiles. `host`: on a GPU, the seconds that the
    host took to ask for it.
    """

    median: float
    low: float
    high: float
    runs: int
    host: float | None = None


class Clock:
    """Times one call on a device: wall time on the CPU; on a GPU events around it, after L2 was flushed and
    while the GPU has something to do, so that the time of the host does not count (`host` is that time).
    """

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self._flush = torch.empty(_FLUSHED, dtype=torch.int8, device=device) if self.cuda else None
        self.host: float | None = None

    def seconds(self, call: Call, repeats: int = 1) -> float:
        """Mean time of `repeats` calls in a row."""
        if self._flush is None:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats
        self._flush.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        first.record()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.host = (time.perf_counter() - start) / repeats
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / repeats


@dataclass(frozen=True)
class Budget:
    """How long to measure: rounds go on until `seconds` are spent, between `least` and `most` of them."""

    seconds: float = 1.5
    least: int = 5
    most: int = 40


def interleaved(calls: Mapping[str, Call], clock: Clock, budget: Budget) -> dict[str, Timing]:
    """The timing of every call. Each round times every call, right after calls of its own that are not timed,
    starting with another one each time.
    """
    names = list(calls)
    settle, repeats = {}, {}
    for name in names:
        once = clock.seconds(calls[name])  # first touch of memory, lazy initialisation
        if once < 0.05:
            once = clock.seconds(calls[name])
        settle[name], repeats[name] = _calls_in(_SETTLE, once, clock), _calls_in(_TIMED, once, clock)
    samples: dict[str, list[float]] = {name: [] for name in names}
    hosts: dict[str, list[float]] = {name: [] for name in names}
    start, turn = time.perf_counter(), 0
    while turn < budget.least or (turn < budget.most and time.perf_counter() - start < budget.seconds):
        for n in range(len(names)):
            name = names[(n + turn) % len(names)]
            for _ in range(settle[name]):
                calls[name]()  # what another left in caches, and memory that the system took back
            samples[name].append(clock.seconds(calls[name], repeats[name]))
            hosts[name] += [] if clock.host is None else [clock.host]
        turn += 1
    found = {name: summary(values) for name, values in samples.items()}
    return {n: replace(x, host=statistics.median(hosts[n]) if hosts[n] else None) for n, x in found.items()}


def _calls_in(seconds: float, once: float, clock: Clock) -> int:
    """How many calls fill that time on the CPU. On a GPU a second timed call would find a warm cache."""
    return 1 if clock.cuda else min(1000, math.ceil(seconds / max(once, 1e-7)))


def summary(values: list[float]) -> Timing:
    """Median and quartiles of some timings."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return Timing(median, low, high, len(values))


class Peak:
    """The machine's matrix product, `size`^3 through torch.mm: its best rate in this run, per dtype.

    It is measured again beside every case, so that a slower moment of the machine is not taken for the limit.
    """

    def __init__(self, clock: Clock, device: str) -> None:
        self._clock, self._device, self.size = clock, device, _GEMM_CUDA if clock.cuda else _GEMM
        self._operands: dict[torch.dtype, torch.Tensor] = {}
        self.best: dict[torch.dtype, float] = {}  # operations per second

    def sample(self, dtype: torch.dtype) -> None:
        """Measure once more."""
        if dtype not in self._operands:
            self._operands[dtype] = torch.randn(self.size, self.size, device=self._device).to(dtype)
            for _ in range(3):  # the first tables of a run need a limit too
                self.sample(dtype)
        x = self._operands[dtype]
        rate = 2 * self.size**3 / self._clock.seconds(lambda: torch.mm(x, x))
        self.join({dtype: rate})

    def join(self, rates: Mapping[torch.dtype, float]) -> None:
        """Take in what was measured elsewhere."""
        for dtype, rate in rates.items():
            self.best[dtype] = max(rate, self.best.get(dtype, 0.0))

    def rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations per second; 0 when it was never measured."""
        return self.best.get(dtype, 0.0)

    def rates(self) -> dict[str, float]:
        """GFLOP/s by dtype, for the result file."""
        return {str(dtype).removeprefix("torch."): round(rate / 1e9, 1) for dtype, rate in self.best.items()}
