"""PTX text into kernels: parameters, registers, shared memory, instructions in straight lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Bytes of the types that name a size.
SIZES = {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)}
SIZES |= {"bf16": 2, "f16x2": 4, "bf16x2": 4, "pred": 0, "b128": 16}

# Instructions that all threads of a warp execute together: where lanes have parted, they wait for each other.
_TOGETHER = re.compile(
    r"(bar\.(sync|arrive|red|warp)|barrier\.|shfl\.sync|vote\.sync|redux\.sync|elect\.sync|mma\.sync|ldmatrix"
    r"|stmatrix|wgmma|setmaxnreg|match)"
)
# After these another warp may be let in, or must be.
_YIELDS = re.compile(r"(bar\.(sync|arrive)|barrier\.|mbarrier\.(try_wait|test_wait))")


class PtxError(Exception):
    """What the emulator does not know, or what the ISA does not allow."""


@dataclass
class Instruction:
    op: str
    args: list[str]
    guard: str | None = None  # a predicate register
    negated: bool = False
    text: str = ""

    @property
    def parts(self) -> list[str]:
        return self.op.replace("::", "@").split(".")


@dataclass
class Block:
    """Instructions in a straight line; `together` if every lane of the warp has to be there."""

    instructions: list[Instruction] = field(default_factory=list)
    together: bool = False


@dataclass
class Kernel:
    name: str
    target: str
    parameters: list[tuple[str, int, int]]  # name, offset, bytes
    registers: dict[str, str]  # name, type
    shared: dict[str, tuple[int, int, int]]  # name: offset, bytes, alignment
    blocks: list[Block]
    labels: dict[str, int]

    @property
    def parameter_bytes(self) -> int:
        return max((at + size for _, at, size in self.parameters), default=0)


def split_arguments(text: str) -> list[str]:
    """At the commas outside of brackets."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{(") - (c in "]})")
        if c == "," and not depth:
            found.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*found, last] if last else found


def strip(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.M)


def kernel_names(text: str) -> list[str]:
    return re.findall(r"\.entry\s+([\w$]+)", text)


def kernel_text(text: str, name: str) -> str:
    """What a module says before its first kernel, and this kernel."""
    first, entry = text.find(".entry"), re.search(rf"\.entry\s+{re.escape(name)}\s*\(", text)
    if entry is None:
        raise PtxError(f"no kernel {name}")
    following = text.find(".entry", entry.end())
    return text[:first] + text[entry.start() : following if following > 0 else len(text)]


def parse(text: str, name: str) -> Kernel:
    """One kernel of a module."""
    module = strip(kernel_text(text, name))
    entry = module.index(".entry")
    start, close = module.index("(", entry) + 1, module.index(")", entry)
    target = re.search(r"\.target\s+(\w+)", module)
    assert target is not None
    reader = _Reader()
    for found in re.finditer(r"\.shared\s+[^;]*;", module[:entry]):
        reader.declare_shared(found[0])
    reader.read(_body(module[module.index("{", close) :]))
    return Kernel(
        name, target[1], _parameters(module[start:close]), reader.registers, reader.shared, *reader.blocks()
    )


def _body(text: str) -> str:
    """Between a brace and the one that closes it."""
    depth = 0
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[1 : brace.start()]
    raise PtxError("a brace that nothing closes")


def _parameters(text: str) -> list[tuple[str, int, int]]:
    found, at = [], 0
    for one in split_arguments(text):
        words = re.match(r"\.param\s+(.*?)([\w$]+)(?:\[(\d+)\])?$", one, re.S)
        if words is None:
            raise PtxError(f"parameter {one}")
        kind = re.search(r"\.([busf]\d+)", words[1])
        align = re.search(r"\.align\s+(\d+)", words[1])
        size = SIZES[kind[1]] if kind else 0
        step = max(size, int(align[1]) if align and ".ptr" not in words[1] else 1)
        at = -(-at // step) * step
        found.append((words[2], at, size * int(words[3] or 1)))
        at += size * int(words[3] or 1)
    return found


class _Reader:
    def __init__(self) -> None:
        self.registers: dict[str, str] = {}
        self.shared: dict[str, tuple[int, int, int]] = {}
        self.scopes: list[dict[str, str]] = [{}]
        self.items: list[tuple[list[dict[str, str]], str | None, str]] = []
        self.count = 0

    def declare_shared(self, text: str) -> None:
        found = re.search(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?", text)
        if found is None:
            raise PtxError(text)
        if found[3] in self.shared:
            return
        align, size = int(found[1] or SIZES[found[2]]), SIZES[found[2]]
        size *= 1 if found[4] is None else int(found[4] or 0)  # [] is as long as the launch says
        at = max((a + n for a, n, _ in self.shared.values()), default=0)
        at = -(-at // align) * align
        self.shared[found[3]] = (at, size, align)

    def read(self, body: str) -> None:
        """Statements, with the scopes whose names they may use."""
        statement = re.compile(
            r"\s*(?:(?P<label>[\w$]+):(?!:)|(?P<open>\{)|(?P<close>\})|(?P<text>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*;))"
        )
        at = 0
        while body[at:].strip():
            found = statement.match(body, at)
            if found is None:
                raise PtxError(f"cannot read {body[at : at + 200]!r}")
            at = found.end()
            if found["label"]:
                self.items.append(([*self.scopes], self._name(found["label"]), ""))
            elif found["open"]:
                self.scopes.append({})
            elif found["close"]:
                self.scopes.pop()
            else:
                self._statement(" ".join(found["text"][:-1].split()))

    def _name(self, name: str) -> str:
        """A name of an inner scope gets one of its own."""
        if len(self.scopes) == 1:
            return name
        self.count += 1
        self.scopes[-1][name] = f"{name}${self.count}"
        return self.scopes[-1][name]

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            for name in names.split(","):
                many = re.match(r"\s*(%?[\w$]+)<(\d+)>", name)
                each = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
                for one in each:
                    self.registers[self._name(one)] = kind[1:]
        elif text.startswith(".shared"):
            self.declare_shared(text + ";")
        elif text and not text.startswith(".pragma"):
            self.items.append(([*self.scopes], None, text))

    def blocks(self) -> tuple[list[Block], dict[str, int]]:
        blocks, labels = [Block()], {}
        for scopes, label, text in self.items:
            if label is not None:
                if blocks[-1].instructions:
                    blocks.append(Block())
                labels[label] = len(blocks) - 1
                continue
            one = self._instruction(text, scopes)
            if _TOGETHER.match(one.op) and not blocks[-1].together:
                if blocks[-1].instructions:
                    blocks.append(Block())
                blocks[-1].together = True
            blocks[-1].instructions.append(one)
            if one.op.split(".")[0] in ("bra", "ret", "exit", "trap") or _YIELDS.match(one.op):
                blocks.append(Block())
        return blocks, labels

    def _instruction(self, text: str, scopes: list[dict[str, str]]) -> Instruction:
        inner = {name: new for scope in scopes[1:] for name, new in scope.items()}
        found = re.match(r"(?:@(!?)(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)$", text, re.S)
        if found is None:
            raise PtxError(f"cannot read {text!r}")
        args = found[4]
        if inner:
            args = re.sub(r"%?[\w$]+", lambda m: inner.get(m[0], m[0]), args)
        guard = inner.get(found[2], found[2]) if found[2] else None
        return Instruction(found[3], split_arguments(args), guard, found[1] == "!", text)
