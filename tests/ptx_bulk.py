"""The copy engine (TMA) of the PTX emulator: bulk copies of boxes of tensors and of runs of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ptx_compile import PARAM_WINDOW, Coder, helper
from ptx_memory import located
from ptx_parse import Instruction, PtxError
from ptx_pending import Barrier, Pending, barrier

Array = np.ndarray[Any, Any]

_TO_SHARED = ".shared::cluster.global.mbarrier::complete_tx::bytes"
_FROM_SHARED = ".global.shared::cta.bulk_group"


def emit(c: Coder, one: Instruction) -> None:
    op, args = one.op, one.args
    if op == "cp.async.bulk.commit_group":
        c.line(f"bulk_commit(w, {c.mask})")
    elif op in ("cp.async.bulk.wait_group", "cp.async.bulk.wait_group.read"):
        c.line(f"bulk_wait(w, {c.mask}, {int(args[0], 0)}, {op.endswith('read')})")
    elif op == "cp.async.bulk.tensor.4d" + _TO_SHARED:
        _tensor(c, args[0], args[1], args[2])
    elif op == "cp.async.bulk.tensor.4d" + _FROM_SHARED:
        _tensor(c, args[1], args[0], None)
    elif op == "cp.async.bulk" + _TO_SHARED:
        to, source, known = (_at(c, args[i]) for i in (0, 1, 3))
        c.line(f"bulk_load(w, {c.mask}, {to}, {source}, {c.src(args[2], 'u32')}, {known})")
    elif op == "cp.reduce.async.bulk" + _FROM_SHARED + ".add.f32":
        c.line(f"bulk_add(w, {c.mask}, {_at(c, args[0])}, {_at(c, args[1])}, {c.src(args[2], 'u32')})")
    else:
        raise PtxError(op)


def _at(c: Coder, arg: str) -> str:
    base, offset = c.address(arg)
    return f"({base}.astype('i8') + {offset})"


def _tensor(c: Coder, tile: str, tensor: str, barrier_: str | None) -> None:
    pointer, _, coordinates = tensor[1:-1].partition(",")
    places = [c.src(x.strip(), "s32") for x in coordinates.strip()[1:-1].split(",")]
    known = _at(c, barrier_) if barrier_ else "None"
    map_at = c.src(pointer.strip(), "u64")
    c.line(f"tensor_copy(w, {c.mask}, {_at(c, tile)}, {map_at}, [{', '.join(places)}], {known})")


@dataclass
class TensorMap:
    """What cuTensorMapEncodeTiled was given (tests/sim/ptx/runtime.cpp), sizes from the innermost out."""

    data: int
    element: int
    sizes: list[int]
    strides: list[int]  # bytes; the first is that of one element
    box: list[int]
    swizzle: int  # bytes


_MAGIC = 0x5ACCADE


@helper
def tensor_map(w: Any, address: int) -> TensorMap:
    region = (
        w.block.parameters
        if address >= PARAM_WINDOW
        else w.block.memory.find(address, address + 128, "tensor map")
    )
    if address % 64 or not region.holds(address, address + 128):
        raise PtxError("a tensor map is 128 bytes at a multiple of 64")
    words = [int(x) for x in region.views[8][(address - region.base) // 8 :][:16]]
    if words[0] != _MAGIC:
        raise PtxError("no tensor map")
    element, rank, swizzle = words[1] & 255, words[1] >> 8 & 255, words[1] >> 16
    box = [words[11 + i // 2] >> 32 * (i % 2) & 0xFFFFFFFF for i in range(rank)]
    return TensorMap(words[2], element, words[3 : 3 + rank], [element, *words[8 : 7 + rank]], box, swizzle)


def swizzled(at: Array, width: int) -> Array:
    """16-byte chunks of 8 rows of `width` bytes change places by the number of their row."""
    bits = {128: 7, 64: 3, 32: 1, 16: 0}[width]
    return at ^ ((at >> 7 & bits) << 4)


def _lane(mask: Array) -> int:
    lanes = np.flatnonzero(mask)
    if len(lanes) != 1:
        raise PtxError("a bulk copy by several lanes")
    return int(lanes[0])


def _complete(block: Any, known: Barrier, size: int) -> None:
    known.bytes -= size
    known.step(block)


class Box:
    """The part of a tensor that a copy moves, element by element: where each lies."""

    def __init__(self, w: Any, one: TensorMap, start: int, corner: list[int]) -> None:
        if len(corner) != len(one.sizes) or start % (1024 if one.swizzle == 128 else 128):
            raise PtxError(f"TMA: a box at {start}, coordinates {corner}")
        grid = np.indices(one.box[::-1]).reshape(len(one.box), -1)[::-1]
        places = [x + first for x, first in zip(grid, corner, strict=True)]
        self.inside = np.logical_and.reduce(
            [(x >= 0) & (x < n) for x, n in zip(places, one.sizes, strict=True)]
        )
        there = one.data + sum(x * s for x, s in zip(places, one.strides, strict=True))
        self.there = np.asarray(there)[self.inside]
        self.bytes, self.kind = grid.shape[1] * one.element, f"u{one.element}"
        here = swizzled(start + np.arange(grid.shape[1]) * one.element, one.swizzle)
        self.here, self.elements = here, here // one.element
        self.w, self.block, self.size = w, w.block, one.element
        if not self.block.shared.holds(start, start + self.bytes):
            raise PtxError("TMA: a box outside of shared memory")

    def from_global(self) -> Array:
        """What lies outside of the tensor is 0."""
        found = np.zeros(len(self.here), self.kind)
        for region, which, at, _ in located(self.w, "global", self.there, self.size, "TMA"):
            found[np.flatnonzero(self.inside)[which]] = region.views[self.size][
                (at - region.base) // self.size
            ]
        return found

    def to_global(self, found: Array) -> None:
        for region, which, at, _ in located(self.w, "global", self.there, self.size, "TMA"):
            region.views[self.size][(at - region.base) // self.size] = found[self.inside][which]

    def from_shared(self) -> Array:
        return np.asarray(self.block.stale.view(self.kind)[self.elements])

    def to_shared(self, found: Array) -> None:
        self.block.shared.views[self.size][self.elements] = found
        self.block.stale.view(self.kind)[self.elements] = found
        self.block.marks[(self.here[:, None] + np.arange(self.size)).reshape(-1)] = 0


@helper
def tensor_copy(
    w: Any, mask: Array, tile: Array, pointer: Array, corner: list[Array], at: Array | None
) -> None:
    lane, block = _lane(mask), w.block
    box = Box(w, tensor_map(w, int(pointer[lane])), int(tile[lane]), [int(x[lane]) for x in corner])
    if at is None:
        w.copies.bulk_open.setdefault(lane, []).append(Pending(block, box.from_shared, box.to_global))
        return
    known = barrier(block, int(at[lane]))
    if not known.fenced:
        raise PtxError("TMA: an mbarrier that the copy engine does not know")

    def land(found: Array) -> None:
        box.to_shared(found)
        _complete(block, known, box.bytes)

    Pending(block, box.from_global, land)


def _run(w: Any, mask: Array, shared: Array, far: Array, size: Array) -> tuple[int, int, int, int]:
    lane = _lane(mask)
    here, there, count = int(shared[lane]), int(far[lane]), int(size[lane])
    if here % 16 or there % 16 or count % 16 or not w.block.shared.holds(here, here + count):
        raise PtxError(f"a bulk copy of {count} bytes at {here}")
    return lane, here, there, count


@helper
def bulk_load(w: Any, mask: Array, to: Array, source: Array, size: Array, at: Array) -> None:
    lane, here, there, count = _run(w, mask, to, source, size)
    block, known = w.block, barrier(w.block, int(at[lane]))
    if not known.fenced:
        raise PtxError("a bulk copy with an mbarrier that the copy engine does not know")

    def read() -> Array:
        region = block.memory.find(there, there + count, "bulk copy")
        return np.array(region.views[1][there - region.base :][:count])

    def write(found: Array) -> None:
        block.shared.views[1][here : here + count] = block.stale[here : here + count] = found
        block.marks[here : here + count] = 0
        _complete(block, known, count)

    Pending(block, read, write)


@helper
def bulk_add(w: Any, mask: Array, to: Array, source: Array, size: Array) -> None:
    lane, here, there, count = _run(w, mask, source, to, size)
    block = w.block

    def write(found: Array) -> None:
        region = block.memory.find(there, there + count, "bulk reduction")
        view = region.views[4][(there - region.base) // 4 :][: count // 4].view("f4")
        view += found.view("f4")

    w.copies.bulk_open.setdefault(lane, []).append(
        Pending(block, lambda: block.stale[here : here + count].copy(), write)
    )


@helper
def bulk_commit(w: Any, mask: Array) -> None:
    for lane in np.flatnonzero(mask):
        w.copies.bulk.setdefault(int(lane), []).append(w.copies.bulk_open.pop(int(lane), []))


@helper
def bulk_wait(w: Any, mask: Array, left: int, read: bool) -> None:
    for lane in np.flatnonzero(mask):
        groups = w.copies.bulk.get(int(lane), [])
        for group in groups[: len(groups) - left]:
            for one in group:
                one.read() if read else one.finish()
        if not read:
            del groups[: max(len(groups) - left, 0)]
