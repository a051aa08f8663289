"""What may happen to registers of Hopper's machine code while a wgmma is under way.

A wgmma reads its first operand and its accumulators until a wait. ptxas knows that, and when it cannot tell
that all goes well it waits after every single one (its note C7515): the matrix unit then idles between them.
Some of its versions err the other way and reuse the registers of a first operand too early
(triton-lang/triton#11781), which gives wrong numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_LINE = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_WIDTHS = {"128": 4, "64": 2, "WIDE": 2, "F64": 2}
_WIDE = {"DADD", "DMUL", "DFMA", "CS2R"}


@dataclass
class Block:
    """Instructions up to a branch, and where the program may go on."""

    code: list[tuple[str, list[str]]] = field(default_factory=list)
    next: list[str] = field(default_factory=list)


def blocks_of(sass: str) -> dict[str, Block]:
    """The basic blocks of what `nvdisasm -c` prints, by label."""
    found, name, count = {"": Block()}, "", 0

    def follow(label: str, falls: bool) -> str:
        if falls:
            found[name].next.append(label)
        found.setdefault(label, Block())
        return label

    falls = True
    for line in sass.splitlines():
        if label := re.match(r"^(\.L\w+):", line):
            name, falls = follow(label[1], falls), True
        elif (parsed := _LINE.match(line)) and falls:
            operation, operands = parsed[1], [x.strip() for x in parsed[2].split(",")]
            found[name].code.append((operation, operands))
            if operation in ("BRA", "EXIT", "RET.REL.NODEC"):
                found[name].next += re.findall(r"\((\.L\w+)\)", line)
                falls = "@" in line.split(operation)[0]
                if falls:
                    count += 1
                    name = follow(f"after {count}", True)
    return found


def first_and_count(operation: str, operands: list[str]) -> tuple[int, int]:
    """The registers that an instruction sets; none: (0, 0)."""
    named = (
        operands[1:] if re.match(r"!?U?P(T|\d)", operands[0]) and operation.startswith("SHFL") else operands
    )
    if not named or not (at := re.match(r"R(\d+)\b", named[0])) or operation.startswith(("ST", "RED")):
        return 0, 0
    parts = operation.split(".")
    count = max([_WIDTHS.get(p, 1) for p in parts[1:]], default=1)
    if parts[0] == "LDSM":
        count = int(parts[-1]) if parts[-1].isdigit() else 1
    if parts[0] in ("HGMMA", "HMMA"):
        count = int(parts[1].split("x")[1]) // 2 if parts[0] == "HGMMA" else 4
    return int(at[1]), 2 if parts[0] in _WIDE else count


def hazards(sass: str) -> list[str]:
    """Instructions that set a register which a wgmma under way still reads: (the wgmma, the instruction)."""
    blocks, found = blocks_of(sass), []
    for name, block in blocks.items():
        for n, (operation, operands) in enumerate(block.code):
            if operation.startswith("HGMMA"):
                first, count = first_and_count(operation, operands)
                held = set(range(first, first + count))
                if at := re.match(r"R(\d+)$", operands[1]):
                    held |= set(range(int(at[1]), int(at[1]) + 4))
                writes = _writes_before_wait(blocks, name, n + 1, held)
                found += [f"{operation} {', '.join(operands)}: {one}" for one in writes]
    return found


def _writes_before_wait(blocks: dict[str, Block], name: str, start: int, held: set[int]) -> list[str]:
    found, seen, open_ = [], set(), [(name, start)]
    while open_:
        name, start = open_.pop()
        for operation, operands in blocks[name].code[start:]:
            if operation.startswith("WARPGROUP.DEPBAR"):
                break
            first, count = first_and_count(operation, operands)
            if not operation.startswith("HGMMA") and held & set(range(first, first + count)) and count:
                found.append(f"{operation} {', '.join(operands)}")
        else:
            for label in blocks[name].next:
                if label not in seen:
                    seen.add(label)
                    open_.append((label, 0))
    return found
