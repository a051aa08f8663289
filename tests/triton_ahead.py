"""Compiles the Triton kernels for GPUs that are not here, from the real host code on meta tensors, and reads
what came out. A program of its own, because TRITON_INTERPRET is read where kernels are declared.

    python tests/triton_ahead.py sm90 2 [128] [backward_q ...] [window] [dropout] [sass]

prints a JSON line for each kernel: architecture, bytes of an element, head_dim (all), passes (all).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CAPABILITY = {"sm80": 80, "sm86": 86, "sm90": 90}
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


class OfflineDriver:
    """What the JIT asks a driver for, where there is none."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """Inside, launches compile and do not run; gives (name, compiled kernel) of each."""
    found: list[tuple[str, Any]] = []
    run, active = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, kernel))
        return kernel

    driver.set_active(OfflineDriver(capability))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run
        driver._active = active


def facts(kernel: Any, sass: bool) -> dict[str, Any]:
    """Registers, spills and shared memory of a compiled kernel, and on request its instructions."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        target = re.search(r"\.target (sm_\w+)", kernel.asm["ptx"])
        assert target is not None
        command = [TOOLS / "ptxas", "-v", "--gpu-name", target[1], ptx, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True).stderr
        numbers = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
        registers = re.search(r"Used (\d+) registers", told)
        assert numbers is not None and registers is not None, told
        result = {"shared": kernel.metadata.shared, "registers": int(registers[1]), "spills": int(numbers[1])}
        if sass:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(kernel.asm["cubin"])
            code = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True).stdout
            names = ("HGMMA", "HMMA", "DMMA", "LDGSTS", "LDSM", "MUFU.EX2")
            result["instructions"] = {n: len(re.findall(rf"\b{re.escape(n)}", code)) for n in names}
    return result


def main(arch: str, size: int, dims: list[int], options: list[str]) -> None:
    from saccade.kernels import call as calls
    from saccade.kernels import config

    calls.architecture = lambda device: arch
    passes = [o for o in options if o in config.PASSES] or list(config.PASSES)
    for dim in dims or config.DIMS:
        for name in passes:
            with compiling(CAPABILITY[arch]) as found:
                launch_pass(name, DTYPES[size], dim, options)
            for kernel_name, kernel in found:
                line = {"pass": name, "kernel": kernel_name, "arch": arch, "size": size, "dim": dim}
                print(json.dumps({**line, **facts(kernel, "sass" in options)}), flush=True)


def launch_pass(name: str, dtype: torch.dtype, dim: int, options: list[str]) -> None:
    """The launches of one pass, for a causal call, or one with a window."""
    from saccade.kernels import launch
    from saccade.kernels.call import Call
    from saccade.kernels.weights import weights
    from saccade.maskbase import UNBOUNDED

    batch, heads, length = 2, 4, 2048
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    q, k, v, out, dout, dq, dk, dv = (empty(batch, heads, length, dim) for _ in range(8))
    lse, pairs = empty(batch, heads, length, kind=torch.float64), (batch, heads, length, length)
    bias = empty(*pairs) if name == "bias" else None
    seed = empty(1, kind=torch.int64) if "dropout" in options else None
    band = [128 if "window" in options else UNBOUNDED, 0, UNBOUNDED, UNBOUNDED]
    call = Call(
        q, k, v, bias, None, None, None, None, None, seed, *[None] * 10, [], band, [], 0, 0, 0, 0, dim**-0.5,
        0.0, 0.0, 0.0 if seed is None else 0.1, 0,
    )  # fmt: skip
    if name == "forward":
        launch.forward(call, out, lse)
    elif name == "weights":
        weights(call, lse, empty(*pairs), False)
    else:
        nothing = empty(0, kind=wide)
        grads = (dq, dk, dv, empty(*pairs, kind=wide), *[nothing] * 4)
        needs = {"backward_q": 1, "backward_kv": 6, "bias": 8}[name]
        launch.backward(call, dout, None, out, lse, grads, needs)


if __name__ == "__main__":
    wanted = sys.argv[3:]
    main(
        sys.argv[1],
        int(sys.argv[2]),
        [int(o) for o in wanted if o.isdigit()],
        [o for o in wanted if not o.isdigit()],
    )
