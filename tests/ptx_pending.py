"""What is under way in the PTX emulator: copies, and the mbarriers that count them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ptx_parse import PtxError


class Pending:
    """A copy in two steps: it reads, then it writes."""

    def __init__(self, block: Any, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self.block, self.kept = block, None
        self.steps: list[Callable[..., Any]] = [read, write]
        block.pending.append(self)

    @property
    def is_read(self) -> bool:
        return len(self.steps) < 2

    def progress(self) -> None:
        if len(self.steps) == 2:
            self.kept = self.steps.pop(0)()
        elif self.steps:
            self.steps.pop()(self.kept)
            self.block.pending.remove(self)
            self.block.epoch += 1

    def read(self) -> None:
        if not self.is_read:
            self.progress()

    def finish(self) -> None:
        while self.steps:
            self.progress()


@dataclass
class Copies:
    """What a warp has under way: cp.async of all its lanes; bulk copies of each lane."""

    open: list[Pending] = field(default_factory=list)
    groups: list[list[Pending]] = field(default_factory=list)
    bulk_open: dict[int, list[Pending]] = field(default_factory=dict)
    bulk: dict[int, list[list[Pending]]] = field(default_factory=dict)


@dataclass
class Barrier:
    arrivals: int
    left: int
    bytes: int = 0
    phase: int = 0
    fenced: bool = False  # the copy engine knows it
    seen: Any = None  # what those who arrived know of stores

    def step(self, block: Any) -> None:
        if self.left < 0:
            raise PtxError("more arrivals at an mbarrier than it counts")
        if self.left == 0 and self.bytes == 0:
            self.phase += 1
            self.left = self.arrivals
            block.epoch += 1


def barrier(block: Any, address: int) -> Barrier:
    if address not in block.barriers:
        raise PtxError(f"no mbarrier at {address}")
    found: Barrier = block.barriers[address]
    return found
