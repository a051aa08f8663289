"""What nvcc makes of csrc/cuda, on host memory: its host code launches, its PTX runs in the emulator."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptx_compile import Program
from ptx_machine import Launch, Machine
from ptx_parse import PtxError, kernel_text, parse
from simulated import CXX, FOLDER, HEADERS, ROOT, Simulated, run
from simulated_params import Params, pointer
from test_cuda_machine_code import nvcc
from torch import Tensor

FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Icsrc", "-DSACCADE_HAS_SM90=1", "-Xcompiler=-fPIC"]
_BACKWARD = ["backward_sm80", "backward_keys_sm80", "backward_queries_sm80", "backward_bias_sm80"]
# What the launchers of a library are made of.
SOURCES = {
    "forward_sm80": ["forward_sm80"],
    "forward_sm90": ["forward_sm90"],
    "backward_sm80": _BACKWARD,
    # What is left out is for calls that no test makes.
    "backward_sm90": ["backward_sm90", "backward_sm80", "backward_queries_sm80"],
    "decode": ["decode"],
    "gather": ["gather_forward", "gather_backward"],
}


def compiled(stem: str) -> tuple[Path, Path]:
    """The host object and the PTX of a source; kept in build/sim, made again when a source is newer."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    source, made = ROOT / f"csrc/cuda/{stem}.cu", FOLDER / f"ptx.{stem}.o"
    text = made.with_suffix(".ptx")
    arch = "90a" if stem.endswith("_sm90") else "80"
    with open(FOLDER / f"ptx.{stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in [source, *HEADERS])
        if not (text.exists() and made.exists() and made.stat().st_mtime > newest):
            folder = FOLDER / f"ptx.{stem}.keep"
            folder.mkdir(exist_ok=True)
            code = f"-gencode=arch=compute_{arch},code=compute_{arch}"  # no ptxas
            keep = ["-keep", "-keep-dir", str(folder), "-c", str(source.relative_to(ROOT)), "-o", str(made)]
            run([nvcc() or "", *FLAGS, code, *keep])
            os.replace(folder / f"{stem}.ptx", text)
            for left in folder.iterdir():
                left.unlink()
            folder.rmdir()
    return made, text


def library(name: str) -> Path:
    """The launchers of a pass over a runtime that hands launches on (tests/sim/ptx/runtime.cpp)."""
    objects = [compiled(stem)[0] for stem in [*SOURCES[name], "refuse"]]
    target, source = FOLDER / f"ptx.{name}.so", ROOT / "tests/sim/ptx/runtime.cpp"
    with open(FOLDER / f"ptx.{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in [source, *objects])
        if not target.exists() or target.stat().st_mtime < newest:
            made = FOLDER / f"ptx.{name}.runtime.o"
            run([nvcc() or "", "-std=c++17", "-Xcompiler=-fPIC", "-c", str(source), "-o", str(made)])
            # A runtime that is loaded already, torch's say, must not be taken for this one.
            run([*CXX, "-shared", "-Wl,-Bsymbolic", *map(str, [*objects, made]), "-o", str(target)])
    return target


# Regular expressions, and what stands in their place.
Changes = list[tuple[str, str | Callable[[re.Match[str]], str]]]
_programs: dict[tuple[str, str], Program] = {}


def program(name: str, texts: list[str], changes: Changes, changed: list[int]) -> Program:
    """A kernel of one of these modules, changed or not; `changed` gets how often."""
    if (name, repr(changes)) not in _programs:
        text = next(kernel_text(text, name) for text in texts if f".entry {name}(" in text)
        for old, new in changes:
            text, count = re.subn(old, new, text)
            changed.append(count)
        _programs[name, repr(changes)] = Program(parse(text, name))
    return _programs[name, repr(changes)]


class Launchers:
    """The libraries as one; each is loaded, or made, when one of its functions is first asked for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def __getattr__(self, function: str) -> Any:
        words = function.removeprefix("saccade_cuda_").removesuffix("_counted").removesuffix("_workspace")
        words = "gather" if words.startswith("gather") else words
        name = f"backward_sm{self.arch}" if words == "backward" else words
        self.loaded = ctypes.CDLL(str(library(name)), mode=os.RTLD_LAZY)
        self.texts = [compiled(stem)[1].read_text() for stem in SOURCES[name]]
        return getattr(self.loaded, function)


class Emulated(Simulated):
    """The CUDA kernels of one architecture as nvcc compiles them, in place of those on the simulator."""

    def __init__(
        self, arch: int, seed: int = 0, deterministic: bool = True, changes: Changes | None = None
    ) -> None:
        self.changes, self.changed = changes or [], list[int]()
        self.arch, self.device, self.seed, self.deterministic = arch, arch, seed, deterministic
        self.library: Any = Launchers(arch)
        self.machine, self.error, self.launched = Machine(seed), "", list[str]()

    def share(self, *tensors: Tensor | None) -> None:
        for t in tensors:
            if t is not None and t.numel():
                last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                self.machine.memory.share(t.data_ptr(), (last + 1) * t.element_size())

    def call(self, name: str, p: Params, seed: Tensor | None, *more: Any) -> None:
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint64,
            ctypes.POINTER(ctypes.c_void_p),
        )  # fmt: skip
        run_kernel, self.error = kind(self._run), ""
        launcher = getattr(self.library, name)
        self.library.loaded.saccade_ptx_run(run_kernel)
        launcher.restype = ctypes.c_char_p
        failed = launcher(ctypes.byref(p), ctypes.c_void_p(pointer(seed)), *more, self.device, None)
        self.machine.memory.regions.clear()
        if self.error or failed:
            raise RuntimeError(self.error or failed.decode())

    def _run(self, name: bytes, grid: Any, threads: int, shared: int, parameters: Any) -> int:
        try:
            code = program(name.decode(), self.library.texts, self.changes, self.changed)
            at = [(offset, size) for _, offset, size in code.kernel.parameters]
            data = bytearray(code.kernel.parameter_bytes)
            for i, (offset, size) in enumerate(at):
                data[offset : offset + size] = ctypes.string_at(parameters[i], size)
            launch = Launch(code, (grid[0], grid[1], grid[2]), threads, bytes(data))
            launch.shared_bytes = shared
            self.launched.append(name.decode())
            self.machine.launch(launch)
        except Exception as error:  # ctypes would swallow it
            self.error = repr(error) if not isinstance(error, PtxError) else str(error)
            return 1
        return 0
