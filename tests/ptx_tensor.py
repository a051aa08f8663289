"""Matrix instructions of the PTX emulator: ldmatrix, mma.sync, wgmma. Layouts as the PTX ISA draws them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ptx_bulk import swizzled
from ptx_compile import Coder, emits, helper
from ptx_memory import addresses, located
from ptx_parse import Instruction, PtxError

Array = np.ndarray[Any, Any]
_LANE = np.arange(32)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4


def _places(registers: list[tuple[int, int]], width: int, by_row: bool) -> Array:
    """Of a fragment, where its numbers lie in a matrix of so many columns. A register, at (row, column) in
    lane 0, holds two numbers; lanes go on by groups of four, along the pairs and then across.
    """
    found = np.empty((len(registers), 32, 2), int)
    for i, (row, column) in enumerate(registers):
        for pair in range(2):
            along, across = column + 2 * _IN_GROUP + pair, row + _GROUP
            found[i, :, pair] = across * width + along if by_row else along * width + across
    return found


# A 16 x 16: rows by groups; B 16 x 8: columns by groups; C 16 x 8.
_A = _places([(0, 0), (8, 0), (0, 8), (8, 8)], 16, True)
_B = _places([(0, 0), (0, 8)], 8, False)
_C = _places([(0, 0), (8, 0)], 8, True)
_A_TAKE, _B_TAKE = np.argsort(_A.reshape(-1)), np.argsort(_B.reshape(-1))
# Sums are single numbers: registers 0, 1 of row g, 2, 3 of row g + 8.
_C_AT = _C.transpose(0, 2, 1).reshape(4, 32)


def numbers(kind: str, bits: Array) -> Array:
    if kind == "bf16":
        return (bits.astype("u4") << np.uint32(16)).view("f4")
    return bits.view("f2").astype("f4")


@emits("ldmatrix")
def _load_matrix(c: Coder, one: Instruction) -> None:
    found = re.match(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(::cta)?\.b16$", one.op)
    to = [x.strip() for x in one.args[0].strip("{}").split(",")]
    if found is None or len(to) != int(found[1]) or one.guard:
        raise PtxError(one.text)
    base, offset = c.address(one.args[1])
    c.line(
        f"w.r32[{c.index(to, '32')}] = "
        f"load_matrix(w, {c.mask}, {base}, {offset}, {len(to)}, {bool(found[2])})"
    )


@helper
def all_lanes(mask: Array) -> None:
    if not mask.all():
        raise PtxError("lanes are missing")


@helper
def load_matrix(w: Any, mask: Array, base: Array, offset: int, count: int, transposed: bool) -> Array:
    all_lanes(mask)
    at = addresses(mask, base, offset)[: 8 * count]  # lanes 8 i to 8 i + 7 name the rows of matrix i
    ((shared, _, _, _),) = located(w, "shared", at, 16, "ldmatrix")
    if (at % 16).any():
        raise PtxError("ldmatrix: a row at an address that is no multiple of 16")
    rows = shared.views[2][(at // 2)[:, None] + np.arange(8)].reshape(count, 8, 8)
    if transposed:
        rows = rows.transpose(0, 2, 1)
    # Lane l holds the numbers 2 (l % 4) and the next of row l / 4.
    return np.ascontiguousarray(rows).reshape(count, 64).view("u4")


@emits("stmatrix")
def _store_matrix(c: Coder, one: Instruction) -> None:
    found = re.match(r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(::cta)?\.b16$", one.op)
    source = [x.strip() for x in one.args[1].strip("{}").split(",")]
    if found is None or len(source) != int(found[1]) or one.guard:
        raise PtxError(one.text)
    base, offset = c.address(one.args[0])
    c.line(f"store_matrix(w, {c.mask}, {base}, {offset}, w.r32[{c.index(source, '32')}], {bool(found[2])})")


@helper
def store_matrix(w: Any, mask: Array, base: Array, offset: int, values: Array, transposed: bool) -> None:
    all_lanes(mask)
    at = addresses(mask, base, offset)[: 8 * len(values)]
    ((shared, _, _, _),) = located(w, "shared", at, 16, "stmatrix")
    if (at % 16).any():
        raise PtxError("stmatrix: a row at an address that is no multiple of 16")
    rows = values.view("u2").reshape(-1, 8, 8)
    rows = rows.transpose(0, 2, 1) if transposed else rows
    shared.views[2][(at // 2)[:, None] + np.arange(8)] = rows.reshape(-1, 8)
    if w.block.marks is not None:  # which lane stores what is the ISA's secret: all of them must fence
        w.block.mark(at, 16, w.first_thread + np.arange(len(at)) % 32)


@emits("mma")
def _multiply(c: Coder, one: Instruction) -> None:
    found = re.match(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32$", one.op)
    if found is None or one.guard:
        raise PtxError(one.op)
    d, a, b, s = ([x.strip() for x in arg.strip("{}").split(",")] for arg in one.args)
    if [len(x) for x in (d, a, b, s)] != [4, 4, 2, 4]:
        raise PtxError(one.text)
    if c.mask != "FULL":
        c.line(f"all_lanes({c.mask})")
    operands = c.index([*a, *b, *s], "32")
    c.line(f"w.r32[{c.index(d, '32')}] = multiplied('{found[1]}', w.r32[{operands}])")


@helper
def multiplied(kind: str, registers: Array) -> Array:
    a = numbers(kind, registers[:4].view("u2").reshape(-1)[_A_TAKE]).reshape(16, 16)
    b = numbers(kind, registers[4:6].view("u2").reshape(-1)[_B_TAKE]).reshape(16, 8)
    found = (a @ b).reshape(-1)[_C_AT] + registers[6:].view("f4")
    return found.astype("f4").view("u4")


# ---- wgmma ----

# Sums under way are signalling NaNs that say which sum they are: moves keep them, arithmetic does not.
_TAG, _TAG_MASK = np.uint32(0x7F800000), np.uint32(0xFFC00000)
_CHAINS = 1 << 14


@dataclass
class Product:
    """One wgmma of a warp: its 16 rows."""

    adds: bool  # to the sums, or replaces them
    left: Any  # [16, 16] numbers, or a function that reads them
    right: Callable[[], Array]  # [16, n]


@dataclass
class Chain:
    """Products onto the same sums, [n / 2, 32], in their order."""

    tag: int
    sums: Array
    products: list[Product] = field(default_factory=list)

    def form(self) -> Array:
        for one in self.products:
            left = one.left() if callable(one.left) else one.left
            found = left @ one.right()
            rows = found.reshape(2, 8, -1, 4, 2)  # row half, group, 8 columns, lane of group, pair
            sums = rows.transpose(2, 0, 4, 1, 3).reshape(-1, 32)
            self.sums = (self.sums + sums if one.adds else sums).astype("f4")
        self.products.clear()
        return self.sums


@dataclass
class Products:
    """What a warp's tensor core has under way."""

    fenced: bool = False
    issued: int = 0
    next_tag: int = 0
    open: dict[int, Chain] = field(default_factory=dict)
    groups: list[dict[int, Chain]] = field(default_factory=list)


@emits("wgmma")
def _warpgroup(c: Coder, one: Instruction) -> None:
    if one.guard:
        raise PtxError(one.text)
    if one.op in ("wgmma.fence.sync.aligned", "wgmma.commit_group.sync.aligned"):
        c.line(f"wgmma_{one.parts[1].partition('_')[0]}(w, {c.mask})")
        return
    if one.op == "wgmma.wait_group.sync.aligned":
        c.line(f"wgmma_wait(w, {c.mask}, {int(one.args[0], 0)})")
        return
    found = re.match(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(b?f16)\.\2$", one.op)
    if found is None:
        raise PtxError(one.op)
    d = [x.strip() for x in one.args[0].strip("{}").split(",")]
    a, b, on, *flags = one.args[1:]
    in_registers = a.startswith("{")
    if len(d) != int(found[1]) // 2 or len(set(d)) != len(d) or len(flags) != (3 if in_registers else 4):
        raise PtxError(one.text)
    if flags[:2] != ["1", "1"]:
        raise PtxError(f"signs of operands {flags}")
    transposed = [flag == "1" for flag in flags[2:]]
    left = (
        f"w.r32[{c.index([x.strip() for x in a[1:-1].split(',')], '32')}]"
        if in_registers
        else c.src(a, "u64")
    )
    right = c.src(b, "u64")
    scale = c.src(on, "pred")
    names, flags_of = c.index(d, "32"), (not in_registers and transposed[0], transposed[-1])
    c.line(f"wgmma(w, {c.mask}, '{found[2]}', {names}, ({left}, {right}, {scale}), {flags_of})")


def products(w: Any, mask: Array) -> Products:
    all_lanes(mask)
    if w.products is None:
        w.products = Products()
    found: Products = w.products
    return found


@helper
def wgmma_fence(w: Any, mask: Array) -> None:
    products(w, mask).fenced = True


@helper
def wgmma_commit(w: Any, mask: Array) -> None:
    state = products(w, mask)
    state.groups.append(state.open)
    state.open, state.fenced = {}, False


@helper
def wgmma_wait(w: Any, mask: Array, left: int) -> None:
    state = products(w, mask)
    while len(state.groups) > left:
        for tag, chain in state.groups.pop(0).items():
            sums = chain.form()
            if any(tag in later for later in (*state.groups, state.open)):
                continue  # a later group goes on with them
            found = (w.r32 & _TAG_MASK == _TAG) & (w.r32 >> np.uint32(8) & np.uint32(_CHAINS - 1) == tag)
            rows, lanes = np.nonzero(found)
            w.r32[rows, lanes] = sums.view("u4")[w.r32[rows, lanes] & np.uint32(255), lanes]


def one_value(x: Array, what: str) -> int:
    if (x != x[0]).any():
        raise PtxError(f"{what} differs between lanes")
    return int(x[0])


@helper
def wgmma(
    w: Any, mask: Array, kind: str, d: Array, operands: tuple[Array, ...], transposed: tuple[bool, bool]
) -> None:
    state, (left, right, on) = products(w, mask), operands
    count, scale, sums = len(d), bool(one_value(on, "the sums' predicate")), w.r32[d]
    rows = 16 * (w.number % 4)
    if left.ndim == 2:  # of registers: what they hold now
        operand: Any = numbers(kind, left.view("u2").reshape(-1)[_A_TAKE]).reshape(16, 16)
    else:
        operand = _reader(w, kind, one_value(left, "a descriptor"), (rows, 16), transposed[0])
    b = _reader(w, kind, one_value(right, "a descriptor"), (0, 2 * count), transposed[1])
    _same(w, state, (count, on[0], left[0] if left.ndim == 1 else None, right[0]))
    chain = _chain(state, sums) if scale else None
    if not state.fenced and (chain is None or left.ndim == 2):
        raise PtxError("wgmma without wgmma.fence after registers were written")
    if chain is None:
        chain = Chain(state.next_tag % (_CHAINS - 1) + 1, sums.view("f4").copy())
        state.next_tag += 1
        tags = _TAG | np.uint32(chain.tag << 8) | np.arange(count, dtype="u4")
        w.r32[d] = tags[:, None]
    else:
        w.r32[d] = sums
    chain.products.append(Product(scale, operand, lambda: b().T))
    state.open[chain.tag] = chain
    if w.block.random.random() < 0.2:
        chain.form()  # early; else at the wait


def _same(w: Any, state: Products, what: tuple[Any, ...]) -> None:
    """The four warps of a warpgroup execute the same products."""
    state.issued += 1
    if w.block.products.setdefault((w.number // 4, state.issued), what) != what:
        raise PtxError(f"wgmma: warps of a warpgroup execute different ones, {what}")


def _chain(state: Products, sums: Array) -> Chain | None:
    """The products under way that these registers wait for."""
    under_way = sums & _TAG_MASK == _TAG
    if not under_way.any():
        return None
    tag = int(sums[0, 0] >> np.uint32(8)) & (_CHAINS - 1)
    wanted = _TAG | np.uint32(tag << 8) | np.arange(len(sums), dtype="u4")
    if not (sums == wanted[:, None]).all():
        raise PtxError("wgmma onto sums of several products under way, or in another order")
    for group in (state.open, *reversed(state.groups)):
        if tag in group:
            return group[tag]
    raise PtxError("wgmma onto sums of a product that was never waited for")


def _reader(w: Any, kind: str, descriptor: int, rows: tuple[int, int], transposed: bool) -> Any:
    """Reads rows [first, first + count) of an operand, 16 numbers deep: [count, 16]."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    width = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62)
    known = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 3 << 62
    if width is None or descriptor & ~known:
        raise PtxError(f"matrix descriptor {descriptor:#x}")
    if start >> 7 & width // 16 - 1:
        raise PtxError(f"matrix descriptor {descriptor:#x} needs a base offset")
    mn, k = np.arange(rows[0], rows[0] + rows[1])[:, None], np.arange(16)
    if transposed:  # rows side by side, `width` bytes of them; depth by depth, eight to a group
        panel = width // 2
        at = start + mn % panel * 2 + mn // panel * leading + k % 8 * width + k // 8 * stride
    else:  # depth side by side; row by row, eight to a group
        at = start + mn % 8 * width + mn // 8 * stride + k * 2
    at = swizzled(at, width)
    shared = w.block.shared
    if not shared.holds(int(at.min()), int(at.max()) + 2):
        raise PtxError(f"wgmma: an operand outside of shared memory, descriptor {descriptor:#x}")
    index = at // 2
    return lambda: numbers(kind, w.block.stale.view("u2")[index])
