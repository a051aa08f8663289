"""cp.async, mbarriers and proxy fences of the PTX emulator. Copies read and write at random moments between
their issue and the wait for them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ptx_bulk
from ptx_compile import Coder, emits, helper
from ptx_memory import located
from ptx_parse import Instruction, PtxError
from ptx_pending import Barrier, Pending, barrier

Array = np.ndarray[Any, Any]


# ---- cp.async ----


@emits("cp")
def _copy(c: Coder, one: Instruction) -> None:
    op = one.op
    if op == "cp.async.commit_group":
        c.line(f"copy_commit(w, {c.mask})")
    elif op == "cp.async.wait_group":
        c.line(f"copy_wait(w, {c.mask}, {int(one.args[0], 0)})")
    elif op.startswith(("cp.async.bulk", "cp.reduce")):
        ptx_bulk.emit(c, one)
    elif op in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
        (to, by), (source, more) = c.address(one.args[0]), c.address(one.args[1])
        size = int(one.args[2], 0)
        if size not in ((16,) if ".cg." in op else (4, 8, 16)):
            raise PtxError(one.text)
        taken = c.src(one.args[3], "u32") if len(one.args) > 3 else c.const("u32", size)
        places = f"addresses({c.mask}, {to}, {by}), addresses({c.mask}, {source}, {more})"
        c.line(f"copy_async(w, {c.mask}, {places}, {size}, {taken})")
    else:
        raise PtxError(op)


@helper
def copy_async(w: Any, mask: Array, here: Array, there: Array, size: int, taken: Array) -> None:
    count = taken[mask].astype("i8")
    if (count > size).any():
        raise PtxError("cp.async of more bytes than there are")
    if (there % size).any():
        raise PtxError("cp.async from an address that is no multiple of its size")
    ((shared, _, _, _),) = located(w, "shared", here, size, "cp.async")
    if (here % size).any():
        raise PtxError("cp.async to an address that is no multiple of its size")
    places = here[:, None] + np.arange(size)

    def read() -> Array:
        found = np.zeros((len(here), size), "u1")
        for bytes_ in np.unique(count[count > 0]):
            lanes = np.flatnonzero(count == bytes_)
            for region, which, at, _ in located(w, "global", there[lanes], int(bytes_), "cp.async"):
                found[lanes[which], :bytes_] = region.views[1][
                    (at - region.base)[:, None] + np.arange(bytes_)
                ]
        return found

    def write(found: Array) -> None:
        shared.views[1][places] = found
        # By the letter wgmma would see them behind a proxy fence only; Triton's pipelines have none there.
        if w.block.stale is not None:
            w.block.stale[places], w.block.marks[places] = found, 0

    w.copies.open.append(Pending(w.block, read, write))


def _together(w: Any, mask: Array) -> None:
    if not np.array_equal(mask, w.live):
        raise PtxError("groups of copies that differ from lane to lane")


@helper
def copy_commit(w: Any, mask: Array) -> None:
    _together(w, mask)
    w.copies.groups.append(w.copies.open)
    w.copies.open = []


@helper
def copy_wait(w: Any, mask: Array, left: int) -> None:
    _together(w, mask)
    while len(w.copies.groups) > left:
        for one in w.copies.groups.pop(0):
            one.finish()


# ---- mbarriers ----


@emits("mbarrier")
def _mbarrier(c: Coder, one: Instruction) -> None:
    forms = {
        "mbarrier.init.shared::cta.b64": "barrier_init(w, {m}, {a}, {x})",
        "mbarrier.init.shared.b64": "barrier_init(w, {m}, {a}, {x})",
        "mbarrier.arrive.shared::cta.b64": "barrier_arrive(w, {m}, {a}, None)",
        "mbarrier.arrive.expect_tx.shared::cta.b64": "barrier_arrive(w, {m}, {a}, {x})",
        "mbarrier.try_wait.parity.shared::cta.b64": "barrier_wait(w, {m}, {a}, {x})",
    }
    if one.op not in forms:
        raise PtxError(one.op)
    args = one.args
    returns = "init" not in one.op
    if returns and "arrive" in one.op and args[0] != "_":
        raise PtxError("the state of an mbarrier")
    base, offset = c.address(args[1 if returns else 0])
    last = c.src(args[-1], "u32") if not args[-1].startswith("[") else "None"
    call = forms[one.op].format(m=c.mask, a=f"{base}.astype('i8') + {offset}", x=last)
    if "try_wait" in one.op:
        c.copy(args[0], "pred", call)
    else:
        c.line(call)


@helper
def barrier_init(w: Any, mask: Array, at: Array, count: Array) -> None:
    for lane in np.flatnonzero(mask):
        address = int(at[lane])
        if address % 8 or not w.block.shared.holds(address, address + 8) or not 0 < count[lane] < 1 << 20:
            raise PtxError(f"mbarrier of {count[lane]} at {address}")
        w.block.barriers[address] = Barrier(int(count[lane]), int(count[lane]))


@helper
def barrier_arrive(w: Any, mask: Array, at: Array, expected: Array | None) -> None:
    for lane in np.flatnonzero(mask):
        one = barrier(w.block, int(at[lane]))
        one.bytes += 0 if expected is None else int(expected[lane])
        one.left -= 1
        one.seen = w.known() if one.seen is None else np.maximum(one.seen, w.known())
        one.step(w.block)


@helper
def barrier_wait(w: Any, mask: Array, at: Array, parity: Array) -> Array:
    found = np.zeros(32, bool)
    for lane in np.flatnonzero(mask):
        one = barrier(w.block, int(at[lane]))
        found[lane] = one.phase & 1 != parity[lane] & 1
        if found[lane] and one.seen is not None:
            w.seen = np.maximum(w.seen, one.seen)
    if not found[mask].all():
        w.polled = w.block.epoch
    return found


@emits("fence")
def _fence(c: Coder, one: Instruction) -> None:
    if one.op in ("fence.proxy.async", "fence.proxy.async.shared::cta"):
        c.line(f"w.block.fence(w, {c.mask})")
    elif one.op == "fence.mbarrier_init.release.cluster":
        c.line("barriers_known(w)")
    else:
        raise PtxError(one.op)


@helper
def barriers_known(w: Any) -> None:
    for one in w.block.barriers.values():
        one.fenced = True
