"""Launches the Triton kernels through Triton's launcher onto a driver that only remembers (libcuda_stub),
and compares every parameter with what was meant: numbers and pointers, tuple inside tuple.

    TRITON_LIBCUDA_PATH=FOLDER TRITON_CACHE_DIR=FOLDER python tests/triton_launch.py sm90 64 bias ...

The variants are those of triton_ahead.py. Prints how many launches and parameters were seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton_ahead
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime.jit import JITFunction

_BITS = {"i1": 8, "u1": 8, "i8": 8, "i16": 16, "i32": 32, "u32": 32, "i64": 64, "u64": 64}
_STUB = ctypes.CDLL(str(Path(os.environ["TRITON_LIBCUDA_PATH"], "libcuda.so.1")), mode=ctypes.RTLD_GLOBAL)
_seen = (ctypes.c_int64 * 512).in_dll(_STUB, "stub_parameters")
_wanted = ctypes.c_int.in_dll(_STUB, "stub_wanted")
_launches = ctypes.c_int.in_dll(_STUB, "stub_launches")
_grid = (ctypes.c_uint * 3).in_dll(_STUB, "stub_grid")
totals = {"launches": 0, "parameters": 0}


class StubDriver(triton_ahead.OfflineDriver):
    """The offline driver, with what loads and launches."""

    def __init__(self, capability: int) -> None:
        super().__init__(capability)
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

    def get_current_device(self) -> int:
        return 0


def flat(kind: Any, value: Any) -> list[tuple[str, Any]]:
    """(type, value) of the parameters that a compiled kernel takes of an argument."""
    if isinstance(kind, tuple):
        assert len(kind) == len(value)
        return [one for pair in zip(kind, value, strict=True) for one in flat(*pair)]
    return [] if kind == "constexpr" else [(kind, value)]


@contextlib.contextmanager
def launching(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """In place of triton_ahead.compiling."""
    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        bind = self.device_caches[0][-1]
        bound, specialised, _ = bind(*args, **options)
        meant = [
            x for value, kind in zip(bound.values(), specialised, strict=True) for x in flat(kind[0], value)
        ]
        _wanted.value, before = len(meant), _launches.value
        kernel = run(self, *args, grid=grid, warmup=False, **options)
        assert _launches.value == before + 1 and _grid[0] == grid[0], self.fn.__name__
        for n, (kind, value) in enumerate(meant):
            bits = 64 if kind[0] == "*" else _BITS[kind]
            want = value.data_ptr() if kind[0] == "*" else int(value)
            assert (_seen[n] - want) % (1 << bits) == 0, (self.fn.__name__, n, kind, _seen[n], want)
        totals["launches"] += 1
        totals["parameters"] += len(meant)
        found.append((self.fn.__name__, kernel))
        return kernel

    with triton_ahead.in_place_of_launches(launch, StubDriver(capability)):
        yield found


if __name__ == "__main__":
    empty = torch.empty
    torch.empty = lambda *size, device=None, **options: empty(  # addresses to compare, where meta has none
        *size, device="cpu" if device == "meta" else device, **options
    )
    triton_ahead.compiling = launching
    triton_ahead.variants(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
    print(totals["launches"], totals["parameters"])
