"""Runs what Triton compiles for a GPU in the PTX emulator, on the host's memory, against the yardstick. A
program of its own, because TRITON_INTERPRET is read where kernels are declared.

    python tests/ptx_triton.py sm90 plain [dropout ...] [--change OLD NEW ...]

prints a JSON line for each case: its kernels, and what went wrong, if anything did. Each `--change` plants a
fault, and is run by itself: what a regular expression finds in the PTX, and what stands in its place.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import sys
from collections.abc import Iterator
from typing import Any

import ptx_cases
import torch
import triton_ahead
from ptx_compile import Program
from ptx_machine import Launch, Machine
from ptx_parse import kernel_names, parse
from saccade import ops_triton
from saccade.kernels import call as calls
from saccade.kernels import decode
from triton.runtime.jit import JITFunction

_FLOATS = {"fp32": "f", "fp64": "d"}
_programs: dict[tuple[int, str], Program] = {}


def flat(kind: Any, value: Any) -> list[tuple[str, Any]]:
    """(type, value) of the parameters that a compiled kernel takes of an argument."""
    if isinstance(kind, tuple):
        return [one for pair in zip(kind, value, strict=True) for one in flat(*pair)]
    return [] if kind == "constexpr" else [(kind, value)]


def packed(program: Program, arguments: list[tuple[str, Any]]) -> bytes:
    """In the order of the signature; pointers to scratch memory follow, of which there is none."""
    places, data = program.kernel.parameters, bytearray(program.kernel.parameter_bytes)
    assert len(places) - len(arguments) == 2, (places, [kind for kind, _ in arguments])
    for (_, offset, size), (kind, value) in zip(places, arguments, strict=False):
        if kind[0] == "*":
            value = value.data_ptr()
        bits = struct.pack(_FLOATS[kind], value) if kind in _FLOATS else None
        data[offset : offset + size] = bits or int(value).to_bytes(8, "little", signed=int(value) < 0)[:size]
    return bytes(data)


@contextlib.contextmanager
def emulating(capability: int, changes: list[tuple[str, str]]) -> Iterator[list[str]]:
    """Inside, launches compile and run in the emulator; gives the names of the kernels."""
    found: list[str] = []
    run = JITFunction.run

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        bound, specialised, _ = self.device_caches[capability][-1](*args, **options)
        arguments = [
            x for value, kind in zip(bound.values(), specialised, strict=True) for x in flat(kind[0], value)
        ]
        key = id(kernel), repr(changes)
        if key not in _programs:
            text = kernel.asm["ptx"]
            for old, new in changes:
                text = re.sub(old, new, text)
            _programs[key] = Program(parse(text, kernel_names(text)[0]))
        program = _programs[key]
        machine = Machine(len(found))
        for kind, value in arguments:
            if kind[0] == "*" and value.numel():
                last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
                machine.memory.share(value.data_ptr(), (last + 1) * value.element_size())
        sizes = (*grid, 1, 1)[:3]
        one = Launch(program, sizes, 32 * kernel.metadata.num_warps, packed(program, arguments))
        one.shared_bytes = kernel.metadata.shared
        machine.launch(one)
        found.append(self.fn.__name__)
        return kernel

    with triton_ahead.in_place_of_launches(launch, triton_ahead.OfflineDriver(capability)):
        yield found


def run(arch: str, name: str, change: list[tuple[str, str]]) -> dict[str, Any]:
    torch.manual_seed(0)
    with emulating(triton_ahead.CAPABILITY[arch], change) as found:
        wrong = ""
        try:
            ptx_cases.run(ptx_cases.TRITON[name], lambda *_, **__: ops_triton)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
    return {"case": name, "change": change[0][0] if change else "", "kernels": found, "wrong": wrong}


def main(arch: str, words: list[str]) -> None:
    calls.architecture = decode.architecture = lambda device: arch
    end = words.index("--change") if "--change" in words else len(words)
    changes = [[(old, new)] for old, new in zip(words[end + 1 :: 3], words[end + 2 :: 3], strict=True)]
    for name in words[:end]:
        for change in changes or [[]]:
            print(json.dumps(run(arch, name, change)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
