"""Functions, conversions, moves and shuffles of the PTX emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
from ptx_arithmetic import Array, only
from ptx_compile import NUMPY, Coder, emits, helper
from ptx_parse import SIZES, Instruction, PtxError

# ---- functions ----


@helper
def exp2(x: Array) -> Array:
    """Subnormal numbers count as 0, before and after."""
    return flushed(np.exp2(flushed(x).astype("f8")).astype("f4"))


@helper
def flushed(x: Array) -> Array:
    return np.where(np.abs(x) < np.finfo("f4").tiny, np.copysign(np.float32(0), x), x)


@emits("ex2", "rcp", "lg2", "sqrt", "rsqrt")
def _function(c: Coder, one: Instruction) -> None:
    x = c.src(one.args[1], one.parts[-1])
    forms = {
        "ex2.approx.ftz.f32": "exp2({})",
        "ex2.approx.f32": "np.exp2({}.astype('f8'))",
        "rcp.approx.ftz.f32": "flushed(1 / flushed({}))",
        "rcp.rn.f32": "1 / {}",
        "rcp.approx.ftz.f64": "(1 / {}).view('u8') & np.uint64(0xFFFFFFFF00000000)",
        "lg2.approx.f32": "np.log2({})",
        "lg2.approx.ftz.f32": "np.log2(flushed({}))",
        "sqrt.rn.f32": "np.sqrt({})",
    }
    if one.op not in forms:
        raise PtxError(one.op)
    kind = "b64" if one.op == "rcp.approx.ftz.f64" else one.parts[-1]
    c.copy(one.args[0], kind, forms[one.op].format(x))


# ---- conversions ----


@helper
def from_bf16(x: Array) -> Array:
    return (x.astype("u4") << np.uint32(16)).view("f4")


@helper
def to_integer(x: Array, kind: str) -> Array:
    """Towards zero; what does not fit becomes the nearest number that does, NaN 0."""
    limits = np.iinfo(kind)
    cut = np.nan_to_num(np.trunc(x.astype("f8")), nan=0.0, posinf=np.inf, neginf=-np.inf)
    high = cut >= float(limits.max)
    low = cut <= float(limits.min)
    inside = np.where(high | low, 0, cut).astype(kind)
    return np.where(high, limits.max, np.where(low, limits.min, inside)).astype(kind)


@emits("cvt")
def _convert(c: Coder, one: Instruction) -> None:
    *how, to, source = one.parts[1:]
    if to in ("bf16x2", "f16x2") and how == ["rn"] and source == "f32":
        high, low = (c.src(arg, "f32") for arg in one.args[1:])
        half = (lambda x: f"bf16_bits({x})") if to == "bf16x2" else (lambda x: f"{x}.astype('f2').view('u2')")
        c.copy(one.args[0], to, f"{half(high)}.astype('u4') << np.uint32(16) | {half(low)}")
        return
    x = c.src(one.args[1], source)
    if source == "bf16":
        x, source = f"from_bf16({x})", "f32"
        if to == "f32" and not how:
            c.copy(one.args[0], to, x)
            return
    if to == "bf16":
        if how != ["rn"] or source != "f32":
            raise PtxError(one.op)
        c.copy(one.args[0], "b16", f"bf16_bits({x})")
        return
    kinds = (to[0] == "f", source[0] == "f")
    allowed = {
        (True, True): ([], ["rn"]) if SIZES[to] != SIZES[source] else (["rmi"], ["rpi"], ["rzi"], ["rni"]),
        (True, False): (["rn"],),
        (False, True): (["rzi"],),
        (False, False): ([],),
    }
    if how not in allowed[kinds] or (kinds == (True, True) and not how and SIZES[to] < SIZES[source]):
        raise PtxError(f"qualifiers {how}")
    if kinds == (False, True):
        x = f"to_integer({x}, '{NUMPY[to].str[1:]}')"
    elif kinds[0] and how and how[0] in ("rmi", "rpi", "rzi", "rni"):
        x = f"np.{ {'rmi': 'floor', 'rpi': 'ceil', 'rzi': 'trunc', 'rni': 'rint'}[how[0]] }({x})"
    elif SIZES[to] < 8:
        x = f"{x}.astype('{NUMPY[to].str[1:]}')"
    c.copy(one.args[0], to, x)


# ---- moves ----


@emits("mov")
def _move(c: Coder, one: Instruction) -> None:
    kind = only(one)
    to, source = one.args
    if to.startswith("{"):
        parts = [x.strip() for x in to[1:-1].split(",")]
        size = SIZES[kind] // len(parts)
        value = c.fresh()
        whole = c.src(source, f"u{8 * SIZES[kind]}")
        c.line(f"{value} = {whole}.view('u{size}').reshape(32, {len(parts)}).copy()")
        for i, part in enumerate(parts):
            if part != "_":
                c.copy(part, f"b{8 * size}", f"{value}[:, {i}]")
    elif source.startswith("{"):
        parts = [x.strip() for x in source[1:-1].split(",")]
        size = SIZES[kind] // len(parts)
        values = ", ".join(c.src(part, f"u{8 * size}") for part in parts)
        c.copy(to, f"b{8 * SIZES[kind]}", f"np.stack([{values}], 1).view('u{SIZES[kind]}').reshape(32)")
    else:
        # As bits: to load and store a signalling NaN as a number would change it.
        bits = kind if kind == "pred" else f"b{8 * SIZES[kind]}"
        c.copy(to, bits, c.src(source, bits))


@emits("cvta")
def _generic(c: Coder, one: Instruction) -> None:
    how = ".".join(one.parts[1:])
    windows = {"to@shared.u64": "-", "shared.u64": "+"}
    how = how.replace("to.", "to@")
    x = c.src(one.args[1], "u64")
    if how in ("param.u64", "to@global.u64", "global.u64"):
        c.copy(one.args[0], "b64", x)
    elif how in windows:
        c.copy(one.args[0], "b64", f"{x} {windows[how]} np.uint64(SHARED_WINDOW)")
    else:
        raise PtxError(one.op)


@emits("shfl")
def _shuffle(c: Coder, one: Instruction) -> None:
    if one.parts[1] != "sync" or one.parts[2] not in ("bfly", "idx", "up", "down") or one.parts[3] != "b32":
        raise PtxError(one.op)
    to, _, predicate = one.args[0].partition("|")
    x, other, clamp, members = (c.src(arg, "u32") for arg in one.args[1:5])
    found = c.fresh()
    c.line(f"{found} = shuffled(w, {c.mask}, '{one.parts[2]}', {x}, {other}, {clamp}, {members})")
    c.copy(to, "b32", f"{found}[0]")
    if predicate:
        c.copy(predicate, "pred", f"{found}[1]")


_LANE = np.arange(32, dtype="i8")


@helper
def shuffled(
    w: Any, mask: Array, how: str, x: Array, other: Array, clamp: Array, members: Array
) -> tuple[Array, Array]:
    w.all_there(mask, members)
    segment, most = (clamp.astype("i8") >> 8) & 31, clamp.astype("i8") & 31
    last = (_LANE & segment) | (most & ~segment)
    first, other = _LANE & segment, other.astype("i8") & 31
    if how == "up":
        source = _LANE - other
        inside = source >= last
    elif how == "down":
        source = _LANE + other
        inside = source <= last
    elif how == "bfly":
        source = _LANE ^ other
        inside = source <= last
    else:
        source = first | (other & ~segment)
        inside = source <= last
    source = np.where(inside, source, _LANE)
    if not mask[source[mask]].all():
        raise PtxError("shfl.sync of a lane that is not there")
    return x[source].copy(), inside


@emits("redux")
def _reduce(c: Coder, one: Instruction) -> None:
    functions = {"min": "minimum", "max": "maximum", "add": "add", "and": "bitwise_and", "or": "bitwise_or"}
    _, how, which, kind = one.parts
    if how != "sync" or which not in functions or kind not in ("s32", "u32", "b32"):
        raise PtxError(one.op)
    c.line(f"w.all_there({c.mask}, {c.src(one.args[2], 'u32')})")
    c.copy(one.args[0], kind, f"np.{functions[which]}.reduce({c.src(one.args[1], kind)}[{c.mask}])")
