"""Runs PTX: warps of 32 lanes in a seeded, unfair order, with barriers and copies under way.

Written after the PTX ISA, on purpose without a look at csrc/cuda/simulator: where the two readings of the
hardware differ, a test fails.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import ptx_arithmetic  # noqa: F401  (emitters)
import ptx_copies  # noqa: F401
import ptx_moves  # noqa: F401
import ptx_tensor  # noqa: F401
from ptx_compile import FULL, HELPERS, LANES, PARAM_WINDOW, SHARED_WINDOW, Coder, Program, emits, helper
from ptx_memory import Memory, Region, shared_memory
from ptx_parse import Instruction, PtxError
from ptx_pending import Barrier, Copies, Pending

Array = np.ndarray[Any, Any]
HELPERS["SHARED_WINDOW"] = SHARED_WINDOW
_REGISTERS = 1 << 16  # of a multiprocessor
_STEPS = 2_000_000  # of a block; more is a loop without an end


class Warp:
    """Registers of 32 lanes, and in which block of the code they are."""

    def __init__(self, block: ThreadBlock, number: int) -> None:
        files = block.program.registers.files
        self.block, self.number, self.first_thread = block, number, number * LANES
        poison = {n: np.full((files[str(n)], LANES), 0xBA, f"u{n // 8}") for n in (16, 32, 64)}
        for file in poison.values():
            file.view("u1").fill(0xFB)  # NaN where it is read as a number
        self.r32, self.predicates = poison[32], np.zeros((files["pred"], LANES), bool)
        self.views = [list(self.predicates)]
        for n in (16, 32, 64):
            self.views += [list(poison[n].view(f"{k}{n // 8}")) for k in "uif"]
        self.special = block.special(number)
        self.groups: dict[int, Array] = {0: FULL}
        self.live = FULL
        self.waits = ""  # at which barrier
        self.seen = np.full(
            block.launch.threads // LANES, -1
        )  # of each warp, up to when its stores are known
        self.polled = -1  # when it last asked in vain
        self.copies = Copies()
        self.products: Any = None

    def all_there(self, mask: Array, members: Array) -> None:
        if (members[mask] != 0xFFFFFFFF).any() or not np.array_equal(mask, self.live):
            raise PtxError("lanes of the warp are missing")

    def known(self) -> Array:
        """What who meets this warp now knows of stores."""
        found = self.seen.copy()
        found[self.number] = self.block.now
        return found

    def step(self) -> None:
        blocks = self.block.program.kernel.blocks
        for at in sorted(self.groups):  # those behind wait for those before
            mask = self.groups[at]
            if not blocks[at].together or mask is self.live or np.array_equal(mask, self.live):
                break
        else:
            raise PtxError(
                f"lanes wait for each other at {[blocks[i].instructions[0].text for i in self.groups]}"
            )
        del self.groups[at]
        full = mask is FULL
        self.block.current = self, at
        leaves = self.block.program.code(at, full)(self, mask)
        for where, lanes in leaves or ((None, mask),):
            where = at + 1 if where is None else where
            if where == -1 or where >= len(blocks):
                self.live = self.live & ~lanes
                continue
            if where in self.groups:
                lanes = lanes | self.groups[where]
            self.groups[where] = FULL if lanes.all() else lanes


class ThreadBlock:
    def __init__(self, machine: Machine, launch: Launch, index: tuple[int, int, int]) -> None:
        self.machine, self.memory, self.program = machine, machine.memory, launch.program
        self.index, self.launch, self.random = index, launch, machine.random
        static = max((at + size for at, size, _ in self.program.kernel.shared.values()), default=0)
        self.shared = shared_memory(static + launch.shared_bytes)
        self.parameters = launch.region
        is_hopper = self.program.kernel.target.startswith("sm_90")
        # What threads have stored and the asynchronous proxy may not see yet: which thread, plus one; when.
        self.marks = np.zeros(len(self.shared.views[1]), "u2") if is_hopper else None
        self.when = np.zeros(len(self.shared.views[1]), "i8")
        self.now = 0
        self.stale = self.shared.views[1].copy() if is_hopper else None
        self.barriers: dict[int, Barrier] = {}  # mbarriers, by address
        self.products: dict[tuple[int, int], tuple[Any, ...]] = {}  # of a warpgroup, by number
        self.registers: dict[int, int] = {}  # of a thread, by warp, where setmaxnreg has said so
        self.named: dict[int, tuple[int, int, list[Warp], Array]] = {}  # wanted, arrived, waiting, seen
        self.pending: list[Pending] = []
        self.epoch = 0  # counts what may free a waiting warp
        self.warps = [Warp(self, n) for n in range(launch.threads // LANES)]
        self.current: tuple[Warp, int] = self.warps[0], 0

    def special(self, warp: int) -> dict[str, Array]:
        def all_of(x: int) -> Array:
            return np.full(LANES, x, "u4")

        lanes = np.arange(LANES, dtype="u4")
        names = {"tid_x": lanes + np.uint32(warp * LANES), "tid_y": all_of(0), "tid_z": all_of(0)}
        names |= {"ntid_x": all_of(self.launch.threads), "laneid": lanes, "warpid": all_of(warp)}
        for i, axis in enumerate("xyz"):
            names[f"ctaid_{axis}"] = all_of(self.index[i])
            names[f"nctaid_{axis}"] = all_of(self.launch.grid[i])
        return names

    def mark(self, at: Array, size: int, threads: Array) -> None:
        assert self.marks is not None
        self.now += 1
        for i in range(0, size, 2):
            self.marks[at + i] = threads + 1
            self.marks[at + i + (size > 1)] = threads + 1
            self.when[at + i] = self.when[at + i + (size > 1)] = self.now

    def fence(self, warp: Warp, mask: Array) -> None:
        """What these threads have stored becomes visible to the asynchronous proxy, and what others have
        stored before a barrier at which they met.
        """
        if self.marks is None or self.stale is None:
            return
        at = np.flatnonzero(self.marks)
        threads = self.marks[at].astype("i8") - 1
        theirs = self.when[at] <= warp.seen[threads // LANES]
        mine = (threads // LANES == warp.number) & mask[threads % LANES]
        at = at[mine | theirs]
        self.stale[at], self.marks[at] = self.shared.views[1][at], 0

    def run(self) -> None:
        draw, steps, warp = self.random, 0, None
        # Some warps are held back until the others can do nothing more, others now and then.
        eager = {w.number: draw.choice((1.0, 1.0, 0.01)) for w in self.warps}
        while any(w.groups for w in self.warps):
            ready = [w for w in self.warps if w.groups and not w.waits and w.polled != self.epoch]
            if self.pending and (not ready or draw.random() < 0.1):
                self.pending[draw.randrange(len(self.pending))].progress()
                continue
            if not ready:
                raise PtxError(f"deadlock: {self.where()}")
            if warp not in ready or draw.random() < 0.1:
                warp = draw.choices(ready, [eager[w.number] for w in ready])[0]
            warp.step()
            steps += 1
            if steps > _STEPS:
                raise PtxError(f"no end: {self.where()}")
        if LANES * sum(self.registers.values()) > _REGISTERS:
            raise PtxError(f"setmaxnreg: {self.registers} registers a thread")
        if any(not one.is_read for one in self.pending):
            raise PtxError("the block ends, copies have not read what they copy")
        while self.pending:
            self.pending[draw.randrange(len(self.pending))].finish()

    def where(self) -> str:
        blocks = self.program.kernel.blocks
        return "; ".join(
            f"warp {w.number} {w.waits or 'at'} {[blocks[i].instructions[0].text for i in w.groups]}"
            for w in self.warps
            if w.groups
        )


class Launch:
    def __init__(self, program: Program, grid: tuple[int, int, int], threads: int, parameters: bytes) -> None:
        self.program, self.grid, self.threads, self.shared_bytes = program, grid, threads, 0
        memory = np.frombuffer(parameters.ljust(-(-len(parameters) // 16) * 16, b"\0"), "u1").copy()
        self.region = Region(PARAM_WINDOW, len(parameters), memory)


class Machine:
    """Global memory, and what runs on it."""

    def __init__(self, seed: int = 0) -> None:
        self.memory, self.random = Memory(), random.Random(seed)

    def launch(self, launch: Launch) -> None:
        if launch.threads % LANES:
            raise PtxError("threads that fill no warp")
        indices = [
            (x, y, z)
            for z in range(launch.grid[2])
            for y in range(launch.grid[1])
            for x in range(launch.grid[0])
        ]
        self.random.shuffle(indices)
        with np.errstate(all="ignore"):
            for index in indices:
                block = ThreadBlock(self, launch, index)
                try:
                    block.run()
                except PtxError as error:
                    warp, at = block.current
                    place = f"{launch.program.kernel.name}, block {index}, warp {warp.number}, code {at}"
                    raise PtxError(f"{place}: {error}") from error


# ---- barriers of threads ----


@emits("bar", "barrier")
def _barrier(c: Coder, one: Instruction) -> None:
    words = [word for word in one.parts[1:] if word not in ("cta", "aligned")]
    if words == ["warp", "sync"]:
        c.line(f"w.all_there({c.mask}, {c.src(one.args[0], 'u32')})")
        return
    if one.guard or words not in (["sync"], ["arrive"]):
        raise PtxError(one.text)
    count = c.src(one.args[1], "u32") if len(one.args) > 1 else "None"
    c.line(f"thread_barrier(w, {c.src(one.args[0], 'u32')}, {count}, {words == ['sync']})")


def uniform(x: Array, what: str) -> int:
    if (x != x[0]).any():
        raise PtxError(f"{what} differs between lanes")
    return int(x[0])


@helper
def thread_barrier(w: Warp, number: Array, count: Array | None, waits: bool) -> None:
    block, at = w.block, uniform(number, "a barrier's number")
    wanted = block.launch.threads if count is None else uniform(count, "a barrier's count")
    if at > 15 or wanted % LANES or w.live is not FULL:
        raise PtxError(f"barrier {at} of {wanted} threads")
    before, arrived, waiting, seen = block.named.get(at, (wanted, 0, [], w.seen))
    if before != wanted:
        raise PtxError(f"barrier {at} of {before} and of {wanted} threads")
    arrived, seen = arrived + LANES, np.maximum(seen, w.known())
    if waits:
        w.waits = f"waits at barrier {at}"
        waiting = [*waiting, w]
    if arrived < wanted:
        block.named[at] = wanted, arrived, waiting, seen
        return
    for one in waiting:
        one.waits, one.seen = "", np.maximum(one.seen, seen)
    block.named.pop(at, None)


@emits("setmaxnreg")
def _registers(c: Coder, one: Instruction) -> None:
    count = int(one.args[0])
    if one.op not in ("setmaxnreg.inc.sync.aligned.u32", "setmaxnreg.dec.sync.aligned.u32") or count % 8:
        raise PtxError(one.text)
    if not 24 <= count <= 256:
        raise PtxError(one.text)
    c.line(f"w.block.registers[w.number] = {count}")
