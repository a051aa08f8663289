"""PTX blocks into Python functions over registers of 32 lanes. One function for a whole warp, one for some of
its lanes; made when a block is first reached.

An instruction that no emitter knows, or one of its qualifiers, is an error.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_parse import SIZES, Instruction, Kernel, PtxError

LANES = 32
FULL = np.ones(LANES, bool)
SHARED_BASE = 1024  # of the window: what lies below belongs to the system
SHARED_WINDOW, PARAM_WINDOW = 0x7D00_0000_0000_0000, 0x7E00_0000_0000_0000
_LETTERS = {"b": "U", "u": "U", "s": "S", "f": "F"}
NUMPY = {
    f"{k}{n}": np.dtype(f"{c}{n // 8}")
    for k, c in (("u", "u"), ("b", "u"), ("s", "i"))
    for n in (8, 16, 32, 64)
}
NUMPY |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
NUMPY |= {"bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4")}

Emitter = Callable[["Coder", Instruction], None]
EMITTERS: dict[str, Emitter] = {}
HELPERS: dict[str, Any] = {"np": np, "FULL": FULL}


def emits(*names: str) -> Callable[[Emitter], Emitter]:
    def register(emitter: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(names, emitter))
        return emitter

    return register


def helper(function: Callable[..., Any]) -> Callable[..., Any]:
    """What generated code may call."""
    HELPERS[function.__name__] = function
    return function


class Registers:
    """Where the registers of a kernel lie in the files of a warp."""

    def __init__(self, declared: dict[str, str]) -> None:
        self.files: dict[str, int] = {"pred": 0, "16": 0, "32": 0, "64": 0}
        self.at: dict[str, tuple[str, int]] = {}
        for name, kind in declared.items():
            file = "pred" if kind == "pred" else str(8 * max(SIZES[kind], 2))
            self.at[name] = file, self.files[file]
            self.files[file] += 1


class Coder:
    """The code of one block, for one kind of mask."""

    def __init__(self, program: Program, full: bool) -> None:
        self.program, self.full = program, full
        self.lines: list[str] = []
        self.mask = "FULL" if full else "m"
        self.count = 0

    def line(self, text: str) -> None:
        self.lines.append("    " + text)

    @property
    def where(self) -> str:
        return "" if self.mask == "FULL" else f", where={self.mask}"

    def fresh(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def const(self, kind: str, value: Any) -> str:
        return self.program.const(kind, value)

    def register(self, name: str) -> tuple[str, int]:
        if name not in self.program.registers.at:
            raise PtxError(f"no register {name}")
        return self.program.registers.at[name]

    def is_register(self, name: str) -> bool:
        return name in self.program.registers.at

    def src(self, arg: str, kind: str) -> str:
        """An operand as 32 numbers of a type."""
        if self.is_register(arg):
            file, index = self.register(arg)
            if file == "pred":
                return f"P[{index}]"
            if kind == "pred":
                raise PtxError(f"{arg} is no predicate")
            width = 8 * SIZES[kind]
            if width == int(file):
                return f"{_view(kind)}[{index}]"
            if width > int(file):
                raise PtxError(f"{arg} is narrower than {kind}")
            return f"U{file}[{index}].astype('u{width // 8}').view('{NUMPY[kind].str[1:]}')"
        if arg.startswith("%"):
            special = arg[1:].replace(".", "_")
            if special not in (
                "tid_x",
                "ctaid_x",
                "ntid_x",
                "nctaid_x",
                "laneid",
                "ctaid_y",
                "ctaid_z",
                "warpid",
                "tid_y",
                "tid_z",
                "nctaid_y",
                "nctaid_z",
            ):
                raise PtxError(f"special register {arg}")
            return f"w.special['{special}']"
        if arg in self.program.symbols:
            return self.const(kind, self.program.symbols[arg])
        return self.const(kind, literal(arg, kind))

    def dst(self, arg: str, kind: str) -> str:
        file, index = self.register(arg)
        if kind == "pred" or file == "pred":
            if kind != file:
                raise PtxError(f"{arg} is no {kind}")
            return f"P[{index}]"
        if 8 * SIZES[kind] != int(file):
            raise PtxError(f"{arg} does not hold {kind}")
        return f"{_view(kind)}[{index}]"

    def copy(self, to: str, kind: str, value: str) -> None:
        """What an expression gives, into a register of that size or a wider one."""
        file, index = self.register(to)
        if file != "pred" and 8 * SIZES[kind] < int(file):  # the upper bits follow the sign
            letter = "S" if kind[0] == "s" else "U"
            self.line(f"np.copyto({letter}{file}[{index}], {value}, 'unsafe'{self.where})")
        else:
            self.line(f"np.copyto({self.dst(to, kind)}, {value}, 'unsafe'{self.where})")

    def index(self, names: list[str], file: str) -> str:
        """The numbers of registers of one file, as an array."""
        found = [self.register(name) for name in names]
        if any(one[0] != file for one in found):
            raise PtxError(f"{names} are not all of {file} bits")
        return self.program.keep(np.array([one[1] for one in found]))

    def address(self, arg: str) -> tuple[str, int]:
        """[base + offset]: the expression of the base, and the offset."""
        found = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$", arg)
        if found is None:
            raise PtxError(f"address {arg}")
        offset = int(found[2], 0) if found[2] else 0
        if not self.is_register(found[1]) and found[1] not in self.program.symbols:
            return self.const("u64", int(found[1], 0)), offset
        width = "u32" if self.is_register(found[1]) and self.register(found[1])[0] == "32" else "u64"
        return self.src(found[1], width), offset


def _view(kind: str) -> str:
    if kind in ("bf16", "f16x2", "bf16x2"):
        return f"U{8 * SIZES[kind]}"
    return f"{_LETTERS[kind[0]]}{8 * SIZES[kind]}"


def literal(text: str, kind: str) -> Any:
    if text[:2] in ("0f", "0F", "0d", "0D"):  # the bits of a number
        if kind[0] != "f":
            return int(text[2:], 16)
        return struct.unpack(">f" if text[1] in "fF" else ">d", bytes.fromhex(text[2:]))[0]
    if kind[0] == "f":
        return float(text)
    value = int(text.rstrip("U"), 8 if re.match(r"-?0\d", text) else 0)
    return value != 0 if kind == "pred" else value & ((1 << (8 * SIZES[kind])) - 1)


class Program:
    """A kernel with its code."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.registers = kernel, Registers(kernel.registers)
        self.symbols = {name: SHARED_BASE + at for name, (at, _, _) in kernel.shared.items()}
        self.symbols |= {name: PARAM_WINDOW + at for name, at, _ in kernel.parameters}
        self.spaces = dict(HELPERS)
        self.consts: dict[tuple[str, bytes], str] = {}
        self.made: dict[tuple[int, bool], Callable[..., Any]] = {}

    def const(self, kind: str, value: Any) -> str:
        with np.errstate(over="ignore"):
            bits = NUMPY[kind].str[1:]
            array = np.full(LANES, value, "u" + bits[1:] if bits[0] == "i" else bits).view(bits)
        key = (bits, array.tobytes())
        if key not in self.consts:
            array.flags.writeable = False
            self.consts[key] = self.keep(array)
        return self.consts[key]

    def keep(self, thing: Any) -> str:
        """A name under which generated code finds a thing."""
        name = f"K{len(self.spaces)}"
        self.spaces[name] = thing
        return name

    def code(self, block: int, full: bool) -> Callable[..., Any]:
        if (block, full) not in self.made:
            self.made[block, full] = self._compile(block, full)
        return self.made[block, full]

    def _compile(self, block: int, full: bool) -> Callable[..., Any]:
        coder = Coder(self, full)
        for one in self.kernel.blocks[block].instructions:
            try:
                _emit(coder, one)
            except (PtxError, KeyError, ValueError, IndexError) as error:
                raise PtxError(f"{one.text}: {error!r}") from error
        views = "P, U16, S16, F16, U32, S32, F32, U64, S64, F64 = w.views"
        text = "\n".join([f"def run(w, m):\n    {views}", *coder.lines])
        spaces = self.spaces
        exec(compile(text, f"<{self.kernel.name} {block}>", "exec"), spaces)
        found: Callable[..., Any] = spaces["run"]
        return found


def _emit(coder: Coder, one: Instruction) -> None:
    name = one.parts[0]
    if name in ("bra", "ret", "exit"):
        _leave(coder, one, name)
        return
    if name not in EMITTERS:
        raise PtxError(f"instruction {one.op}")
    if one.guard is None:
        EMITTERS[name](coder, one)
        return
    outer, lines = coder.mask, coder.lines
    coder.mask, coder.lines = coder.fresh(), []
    EMITTERS[name](coder, one)
    inner, coder.lines = coder.lines, lines
    coder.line(f"{coder.mask} = {_guard(coder, one, outer)}")
    coder.line(f"if {coder.mask}.any():")
    coder.lines += ["    " + line for line in inner]
    coder.mask = outer


def _guard(coder: Coder, one: Instruction, mask: str) -> str:
    value = ("~" if one.negated else "") + coder.src(one.guard or "", "pred")
    return value if mask == "FULL" else f"{value} & {mask}"


def _leave(coder: Coder, one: Instruction, name: str) -> None:
    """A block returns where its lanes go: None on to the next, else (block or -1 for the end, mask) pairs."""
    where = coder.program.kernel.labels[one.args[0]] if name == "bra" else -1
    if one.guard is None:
        coder.line(f"return (({where}, {coder.mask}),)")
        return
    coder.line(f"taken = {_guard(coder, one, coder.mask)}")
    coder.line("n = np.count_nonzero(taken)")
    coder.line("if not n: return None")
    every = "32" if coder.full else "np.count_nonzero(m)"
    coder.line(f"if n == {every}: return (({where}, {coder.mask}),)")
    coder.line(f"return (({where}, taken), (None, {coder.mask} & ~taken))")
