"""Memory of the PTX emulator: global memory is the host's, every address checked; loads, stores, atomics."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np
from ptx_compile import NUMPY, PARAM_WINDOW, SHARED_BASE, SHARED_WINDOW, Coder, emits, helper
from ptx_parse import SIZES, Instruction, PtxError

Array = np.ndarray[Any, Any]


class Region:
    """Bytes from `low` to `high`, seen as numbers of any size."""

    def __init__(self, low: int, size: int, memory: Array | None = None) -> None:
        self.low, self.high = low, low + size
        self.base = low // 16 * 16
        if memory is None:  # the host's, up to the 16 bytes in which the last one lies
            whole = -(-(self.high - self.base) // 16) * 16
            memory = np.ctypeslib.as_array((ctypes.c_uint8 * whole).from_address(self.base))
        self.views = {n: memory.view(f"u{n}") for n in (1, 2, 4, 8)}

    def holds(self, first: int, last: int) -> bool:
        return self.low <= first and last <= self.high

    def numbers(self, at: Array, size: int, count: int, what: str) -> tuple[Array, Array]:
        """The view, and where in it each lane's `count` numbers are: [lane, count]."""
        if (at % (size * count)).any():
            raise PtxError(f"{what} of {size * count} bytes at an address that is no multiple of it")
        first = (at - self.base) // size
        return self.views[size], first[:, None] + np.arange(count)


class Memory:
    """Global memory: what was shared."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def share(self, address: int, size: int) -> None:
        self.regions.append(Region(address, size))

    def find(self, first: int, last: int, what: str) -> Region:
        for region in self.regions:
            if region.holds(first, last):
                return region
        raise PtxError(f"{what} at {first:#x}, outside of every tensor")

    def split(self, at: Array, size: int, what: str) -> list[tuple[Region, Array]]:
        """Regions, and which lanes' addresses lie there."""
        for region in self.regions:
            if region.holds(int(at.min()), int(at.max()) + size):
                return [(region, np.arange(len(at)))]
        found = [self.find(int(x), int(x) + size, what) for x in at]
        each = {id(region): region for region in found}
        return [
            (region, np.array([i for i, one in enumerate(found) if one is region]))
            for region in each.values()
        ]


_CACHES = re.compile(
    r"(nc|ca|cg|cs|cv|lu|wb|wt|weak|relaxed|acquire|release|acq_rel|gpu|cta|sys|volatile|L1@\w+|L2@\w+)$"
)


def _access(one: Instruction) -> tuple[str, int, str]:
    """Space, numbers of a vector, type."""
    *words, kind = one.parts[1:]
    count, space = 1, "generic"
    for word in words:
        if word in ("v2", "v4"):
            count = int(word[1])
        elif word in ("shared", "shared@cta", "global", "param", "local"):
            space = word.partition("@")[0]
        elif not _CACHES.match(word):
            raise PtxError(f"qualifier {word}")
    if space == "local":
        raise PtxError("local memory")
    return space, count, kind


def _vector(text: str, count: int) -> list[str]:
    return [x.strip() for x in text.strip("{}").split(",")] if count > 1 else [text.strip("{} ")]


@emits("ld", "ldu")
def _load(c: Coder, one: Instruction) -> None:
    space, count, kind = _access(one)
    base, offset = c.address(one.args[1])
    found = c.fresh()
    c.line(f"{found} = load(w, {c.mask}, '{space}', {base}, {offset}, {SIZES[kind]}, {count})")
    signed = NUMPY[kind].str[1:] if kind[0] == "s" else f"u{SIZES[kind]}"
    bits = kind if kind[0] == "s" else f"b{8 * SIZES[kind]}"
    for i, to in enumerate(_vector(one.args[0], count)):
        if to != "_":
            c.copy(to, bits, f"{found}[{i}].view('{signed}')")


@emits("st")
def _store(c: Coder, one: Instruction) -> None:
    space, count, kind = _access(one)
    base, offset = c.address(one.args[0])
    values = ", ".join(c.src(x, f"b{8 * SIZES[kind]}") for x in _vector(one.args[1], count))
    c.line(f"store(w, {c.mask}, '{space}', {base}, {offset}, {SIZES[kind]}, [{values}])")


@helper
def addresses(mask: Array, base: Array, offset: int) -> Array:
    return base[mask].astype("i8") + offset


def located(w: Any, space: str, at: Array, size: int, what: str) -> list[tuple[Region, Array, Array, bool]]:
    """Where addresses lie: region, lanes, addresses, whether in shared memory."""
    if not len(at):
        return []
    if space == "generic" and at[0] >= SHARED_WINDOW:
        space = "param" if at[0] >= PARAM_WINDOW else "shared"
        at = at - SHARED_WINDOW if space == "shared" else at
    if space in ("shared", "param"):
        region = w.block.shared if space == "shared" else w.block.parameters
        if not region.holds(int(at.min()), int(at.max()) + size):
            raise PtxError(
                f"{what} at {space} address {int(at.min())} to {int(at.max()) + size} of {region.high}"
            )
        return [(region, np.arange(len(at)), at, space == "shared")]
    return [(region, lanes, at[lanes], False) for region, lanes in w.block.memory.split(at, size, what)]


@helper
def load(w: Any, mask: Array, space: str, base: Array, offset: int, size: int, count: int) -> Array:
    at = addresses(mask, base, offset)
    found = np.zeros((count, 32), f"u{size}")
    which = np.flatnonzero(mask)
    for region, lanes, where, _ in located(w, space, at, size * count, "load"):
        view, index = region.numbers(where, size, count, "load")
        found[:, which[lanes]] = view[index].T
    return found


@helper
def store(w: Any, mask: Array, space: str, base: Array, offset: int, size: int, values: list[Array]) -> None:
    at = addresses(mask, base, offset)
    which = np.flatnonzero(mask)
    for region, lanes, where, shared in located(w, space, at, size * len(values), "store"):
        view, index = region.numbers(where, size, len(values), "store")
        view[index] = np.stack([x[which[lanes]] for x in values], 1)
        if shared and w.block.marks is not None:
            w.block.mark(where, size * len(values), w.first_thread + which[lanes])


@emits("atom", "red")
def _atomic(c: Coder, one: Instruction) -> None:
    *words, kind = one.parts[1:]
    left = [word for word in words if not _CACHES.match(word)]
    if left not in (["global", "add"], ["add"]) or kind not in ("u32", "s32", "f32", "u64"):
        raise PtxError(one.op)
    returns = one.parts[0] == "atom"
    to, address, x = one.args if returns else [None, *one.args]
    base, offset = c.address(str(address))
    found = c.fresh()
    c.line(f"{found} = atomic_add(w, {c.mask}, {base}, {offset}, {c.src(str(x), kind)})")
    if to is not None and to != "_":
        c.copy(to, f"b{8 * SIZES[kind]}", f"{found}.view('u{SIZES[kind]}')")


@helper
def atomic_add(w: Any, mask: Array, base: Array, offset: int, x: Array) -> Array:
    found, size = np.zeros(32, x.dtype), x.dtype.itemsize
    for lane in np.flatnonzero(mask):
        at = np.array([int(base[lane]) + offset])
        for region, _, where, _ in located(w, "generic", at, size, "atomic"):
            view, index = region.numbers(where, size, 1, "atomic")
            place = view[index[0]].view(x.dtype)
            found[lane] = place[0]
            view[index[0]] = (place + x[lane]).astype(x.dtype).view(view.dtype)
    return found


@emits("prefetch")
def _prefetch(c: Coder, one: Instruction) -> None:
    if one.op != "prefetch.tensormap":
        raise PtxError(one.op)
    base, offset = c.address(one.args[0])
    c.line(f"tensor_map(w, int(({base})[{c.mask}][0]) + {offset})")


def shared_memory(size: int) -> Region:
    """Full of NaN, of any type; below its base lies what is the system's."""
    memory = np.full(SHARED_BASE + -(-size // 16) * 16, 0xFF, "u1")
    region = Region(SHARED_BASE, size, memory)
    region.base = 0
    return region
