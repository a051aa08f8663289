"""Arithmetic, conversions and moves of the PTX emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
from ptx_compile import NUMPY, Coder, emits, helper
from ptx_parse import Instruction, PtxError

Array = np.ndarray[Any, Any]


def only(one: Instruction, *allowed: str) -> str:
    """The type, which comes last; whatever stands before it must be known."""
    *between, kind = one.parts[1:]
    if extra := set(between) - set(allowed):
        raise PtxError(f"qualifiers {sorted(extra)}")
    if kind not in NUMPY:
        raise PtxError(f"type {kind}")
    return kind


_UFUNCS = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
}


def packed(c: Coder, one: Instruction, kind: str, formula: str) -> None:
    """Two 16-bit numbers in a register."""
    args = ", ".join(c.src(a, kind) for a in one.args[1:])
    c.copy(one.args[0], kind, f"{formula}('{kind}', {args})")


@emits("add", "sub", "mul", "and", "or", "xor")
def _binary(c: Coder, one: Instruction) -> None:
    name = one.parts[0]
    if name == "mul" and one.parts[1] in ("wide", "hi"):
        _product(c, one)
        return
    kind = only(one, *(("rn",) if one.parts[-1][0] in "fb" else ()), *(("lo",) if name == "mul" else ()))
    if kind in ("f16x2", "bf16x2", "bf16"):
        packed(c, one, kind, f"half_{name}")
        return
    a, b = (c.src(arg, kind) for arg in one.args[1:])
    c.line(f"np.{_UFUNCS[name]}({a}, {b}, {c.dst(one.args[0], kind)}{c.where})")


@helper
def bf16_bits(x: Array) -> Array:
    """To the nearest, ties to even."""
    bits = x.view("u4")
    found = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(x != x, np.uint32(0x7FFF), found).astype("u2")


@helper
def _halves(kind: str, x: Array) -> Array:
    bits = x.view("u2").reshape(32, -1)
    return bits.view("f2").astype("f4") if kind[0] == "f" else (bits.astype("u4") << 16).view("f4")


def _joined(kind: str, x: Array) -> Array:
    bits = x.astype("f2").view("u2") if kind[0] == "f" else bf16_bits(x.astype("f4"))
    return np.ascontiguousarray(bits).view("u4" if kind.endswith("x2") else "u2").reshape(32)


@helper
def half_add(kind: str, a: Array, b: Array) -> Array:
    return _joined(kind, _halves(kind, a) + _halves(kind, b))


@helper
def half_sub(kind: str, a: Array, b: Array) -> Array:
    return _joined(kind, _halves(kind, a) - _halves(kind, b))


@helper
def half_mul(kind: str, a: Array, b: Array) -> Array:
    return _joined(kind, _halves(kind, a) * _halves(kind, b))


@helper
def half_fma(kind: str, a: Array, b: Array, d: Array) -> Array:
    return _joined(kind, _halves(kind, a).astype("f8") * _halves(kind, b) + _halves(kind, d))


def _product(c: Coder, one: Instruction) -> None:
    kind = only(one, "wide", "hi")
    a, b = (c.src(arg, kind) for arg in one.args[1:])
    if one.parts[1] == "hi":
        c.copy(one.args[0], kind, f"high_product({a}, {b})")
        return
    wide = kind[0] + str(2 * int(kind[1:]))
    c.copy(one.args[0], wide, f"np.multiply({a}, {b}, dtype='{NUMPY[wide].str[1:]}')")


@helper
def high_product(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return (
        np.array([int(x) * int(y) >> bits & ((1 << bits) - 1) for x, y in zip(a, b, strict=True)])
        .astype(f"u{bits // 8}")
        .view(a.dtype)
    )


@emits("mad", "fma")
def _multiply_add(c: Coder, one: Instruction) -> None:
    kind = only(one, "lo", "rn", "wide")
    if kind in ("f16x2", "bf16x2", "bf16"):
        packed(c, one, kind, "half_fma")
        return
    if "wide" in one.parts:
        wide = kind[0] + str(2 * int(kind[1:]))
        a, b = (c.src(arg, kind) for arg in one.args[1:3])
        product = f"np.multiply({a}, {b}, dtype='{NUMPY[wide].str[1:]}')"
        c.copy(one.args[0], wide, f"{product} + {c.src(one.args[3], wide)}")
        return
    a, b, d = (c.src(arg, kind) for arg in one.args[1:])
    # The product of two fp32 numbers is exact in fp64.
    exact = f"np.multiply({a}, {b}, dtype='f8')" if kind == "f32" else f"{a} * {b}"
    c.copy(one.args[0], kind, f"{exact} + {d}")


@helper
def divide(a: Array, b: Array) -> Array:
    """Towards zero."""
    b = np.where(b == 0, 1, b).astype(a.dtype)
    found = np.floor_divide(a, b)
    return found + ((found < 0) & (found * b != a)).astype(a.dtype)


@helper
def remainder(a: Array, b: Array) -> Array:
    return a - divide(a, b) * b


@emits("div", "rem")
def _divide(c: Coder, one: Instruction) -> None:
    kind = only(one, "rn", "full")
    a, b = (c.src(arg, kind) for arg in one.args[1:])
    if kind[0] == "f":
        c.line(f"np.divide({a}, {b}, {c.dst(one.args[0], kind)}{c.where})")
    else:
        c.copy(one.args[0], kind, f"{'divide' if one.parts[0] == 'div' else 'remainder'}({a}, {b})")


@emits("min", "max")
def _extreme(c: Coder, one: Instruction) -> None:
    name, kind = one.parts[0], only(one, "relu" if one.parts[-1] == "s32" else "NaN")
    a, b = (c.src(arg, kind) for arg in one.args[1:])
    if "relu" in one.parts:
        c.copy(one.args[0], kind, f"np.maximum(np.{name}imum({a}, {b}), 0)")
        return
    full = {"min": "minimum", "max": "maximum"}[name]
    # Of a number and a NaN the number, except with .NaN.
    function = full if kind[0] != "f" or "NaN" in one.parts else f"f{name}"
    c.line(f"np.{function}({a}, {b}, out={c.dst(one.args[0], kind)}{c.where})")


@emits("neg", "not", "abs")
def _unary(c: Coder, one: Instruction) -> None:
    kind = only(one)
    function = {"neg": "negative", "not": "invert", "abs": "absolute"}[one.parts[0]]
    c.line(f"np.{function}({c.src(one.args[1], kind)}, {c.dst(one.args[0], kind)}{c.where})")


@emits("shl", "shr")
def _shift(c: Coder, one: Instruction) -> None:
    name, kind = one.parts[0], only(one)
    c.copy(one.args[0], kind, f"{name}({c.src(one.args[1], kind)}, {c.src(one.args[2], 'u32')})")


@helper
def shl(a: Array, by: Array) -> Array:
    """Amounts beyond the width count as the width."""
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, np.left_shift(a, np.minimum(by, bits - 1).astype(a.dtype)), 0)


@helper
def shr(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    found = np.right_shift(a, np.minimum(by, bits - 1).astype(a.dtype))
    return found if a.dtype.kind == "i" else np.where(by < bits, found, 0)


@emits("shf")
def _funnel(c: Coder, one: Instruction) -> None:
    if one.op not in ("shf.l.wrap.b32", "shf.r.wrap.b32"):
        raise PtxError(one.op)
    a, b, by = (c.src(arg, "u32") for arg in one.args[1:])
    both = f"({b}.astype('u8') << np.uint64(32) | {a})"
    by = f"({by} & 31).astype('u8')"
    moved = f"{both} >> {by}" if one.parts[1] == "r" else f"({both} << {by}) >> np.uint64(32)"
    c.copy(one.args[0], "b32", moved)


@emits("bfi")
def _insert(c: Coder, one: Instruction) -> None:
    kind = only(one)
    a, b = (c.src(arg, kind) for arg in one.args[1:3])
    position, length = (c.src(arg, "u32") for arg in one.args[3:])
    c.copy(one.args[0], kind, f"inserted({a}, {b}, {position}, {length})")


@helper
def inserted(a: Array, b: Array, position: Array, length: Array) -> Array:
    ones = shl(np.full_like(a, 1), length) - np.asarray(1, a.dtype)
    field = shl(ones, position)
    return (shl(a, position) & field) | (b & ~field)


@emits("bfe")
def _extract(c: Coder, one: Instruction) -> None:
    kind = only(one)
    a = c.src(one.args[1], kind)
    position, length = (c.src(arg, "u32") for arg in one.args[2:])
    c.copy(one.args[0], kind, f"extracted({a}, {position}, {length})")


@helper
def extracted(a: Array, position: Array, length: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    inside = np.minimum(length & 255, bits - np.minimum(position & 255, bits))
    if a.dtype.kind == "i" and (inside < (length & 255)).any():
        raise PtxError("a signed field beyond the last bit")
    unused = (bits - inside).astype("u4")  # shifted out above, then the field comes down with its sign
    up = shl(a, unused - np.minimum(position & np.uint32(255), unused))
    return np.where(inside == 0, 0, shr(up, unused))


@emits("lop3")
def _logic(c: Coder, one: Instruction) -> None:
    kind, table = only(one), int(one.args[4], 0)
    c.copy(one.args[0], kind, f"looked_up({', '.join(c.src(a, kind) for a in one.args[1:4])}, {table})")


@helper
def looked_up(a: Array, b: Array, d: Array, table: int) -> Array:
    found = np.zeros_like(a)
    for bit in range(8):  # of the table: a * 4 + b * 2 + d
        if table >> bit & 1:
            found |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (d if bit & 1 else ~d)
    return found


@emits("prmt")
def _permute(c: Coder, one: Instruction) -> None:
    if one.op != "prmt.b32":
        raise PtxError(one.op)
    a, b, select = (c.src(arg, "u32") for arg in one.args[1:])
    c.copy(one.args[0], "b32", f"permuted({a}, {b}, {select})")


@helper
def permuted(a: Array, b: Array, select: Array) -> Array:
    source = b.astype("u8") << np.uint64(32) | a
    found = np.zeros(32, "u4")
    for i in range(4):
        nibble = (select >> np.uint32(4 * i)) & np.uint32(15)
        byte = (source >> (8 * (nibble & 7)).astype("u8")).astype("u4") & np.uint32(255)
        spread = np.where(
            byte & 128, np.uint32(255), np.uint32(0)
        )  # the sign of the byte instead of the byte
        found |= np.where(nibble & 8, spread, byte) << np.uint32(8 * i)
    return found


@emits("selp")
def _select(c: Coder, one: Instruction) -> None:
    kind = only(one)
    a, b = (c.src(arg, kind) for arg in one.args[1:3])
    c.copy(one.args[0], kind, f"np.where({c.src(one.args[3], 'pred')}, {a}, {b})")


_COMPARES = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}


@emits("setp")
def _compare(c: Coder, one: Instruction) -> None:
    how, *joined, kind = one.parts[1:]
    if kind in ("f16x2", "bf16x2") and how in ("eq", "neu") and not joined and "|" in one.args[0]:
        pairs = (f"_halves({kind!r}, {c.src(arg, kind)})" for arg in one.args[1:3])
        equal = c.fresh()
        c.line(f"{equal} = {(' == ' if how == 'eq' else ' != ').join(pairs)}")
        for i, to in enumerate(one.args[0].split("|")):  # of the lower half, of the upper
            c.copy(to.strip(), "pred", f"{equal}[:, {i}]")
        return
    a, b = (c.src(arg, kind) for arg in one.args[1:3])
    if how in _UNORDERED:
        value = f"({a} {_COMPARES[_UNORDERED[how]]} {b}) | ({a} != {a}) | ({b} != {b})"
    elif how in ("nan", "num"):
        value = f"({a} != {a}) | ({b} != {b})"
        value = value if how == "nan" else f"~({value})"
    elif how == "ne" and kind[0] == "f":
        value = f"({a} < {b}) | ({a} > {b})"
    else:
        value = f"{a} {_COMPARES[how]} {b}"
    if joined:
        if joined[0] not in ("and", "or", "xor"):
            raise PtxError(one.op)
        operator = {"and": "&", "or": "|", "xor": "^"}[joined[0]]
        value = f"({value}) {operator} {c.src(one.args[3].lstrip('!'), 'pred')}"
        if one.args[3].startswith("!"):
            raise PtxError(one.args[3])
    if "|" in one.args[0]:
        raise PtxError("two predicates")
    c.copy(one.args[0], "pred", value)
