"""Compiles the Triton kernels for GPUs that are not here, from the real host code on meta tensors, and reads
what came out. A program of its own, because TRITON_INTERPRET is read where kernels are declared.

    python tests/triton_ahead.py sm90 2 [128] [backward_q ...] [dropout] [sass]

    python tests/triton_ahead.py variants sm90 64 [bias ...]

prints a JSON line for each kernel: architecture, bytes of an element, head_dim (all), passes (all).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton_wgmma
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
def in_place_of_launches(launch: Any, stand_in: Any) -> Iterator[None]:
    """Inside, every launch of a kernel is `launch` instead, and `stand_in` is the driver."""
    run, active = JITFunction.run, driver._active
    driver.set_active(stand_in)
    JITFunction.run = launch
    try:
        yield
    finally:
        JITFunction.run = run
        driver._active = active


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """Inside, launches compile and do not run; gives (name, compiled kernel) of each."""
    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, kernel))
        return kernel

    with in_place_of_launches(compile_only, OfflineDriver(capability)):
        yield found


def facts(kernel: Any, sass: bool) -> dict[str, Any]:
    """Registers, stack (spills go there), shared memory of a compiled kernel, and on request instructions."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", cubin]
        told = subprocess.run(command, capture_output=True, text=True).stdout
        numbers = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told)
        assert numbers is not None, told
        registers, stack, local = map(int, numbers.groups())
        result = {"shared": kernel.metadata.shared, "registers": registers, "stack": stack + local}
        if sass:
            code = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True).stdout
            names = ("HGMMA", "HMMA", "DMMA", "LDGSTS", "LDSM", "MUFU.EX2", "WARPGROUP.DEPBAR")
            result["instructions"] = {n: len(re.findall(rf"\b{re.escape(n)}", code)) for n in names}
            result["hazards"] = triton_wgmma.hazards(code)
    return result


def main(arch: str, size: int, dims: list[int], options: list[str]) -> None:
    from saccade.kernels import call as calls
    from saccade.kernels import config, decode

    calls.architecture = decode.architecture = lambda device: arch
    passes = [o for o in options if o in config.PASSES] or list(config.PASSES)
    wanted = [
        (n, arch, size, dim, kind) for dim in dims or config.DIMS for n in passes for kind in config.KINDS
    ]
    for key in wanted:
        if key in config.TABLE:
            with compiling(CAPABILITY[arch]) as found:
                launch_pass(key[0], DTYPES[size], key[3], key[4], "dropout" in options)
            for kernel_name, kernel in found:
                known = facts(kernel, "sass" in options)
                if kernel_name.startswith("tiled") and size == 2:
                    known["computed"] = multiplied(kernel.asm["ptx"]) / wanted_of(key, config.TABLE[key])
                print(json.dumps({"kernel": kernel_name, "key": key, **known}), flush=True)


def multiplied(ptx: str) -> float:
    """Multiplications by a warp in the matrix products of all loops, once around each."""
    wide = (
        sum(64 * int(n) * 16 for n in re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16", ptx)) / 4
    )
    return wide + 16 * 8 * 16 * len(re.findall(r"mma\.sync\.aligned\.m16n8k16", ptx))


def wanted_of(key: Any, shape: Any) -> float:
    """A warp's share of the products of one tile."""
    products = {"forward": 2, "backward_q": 3, "backward_kv": 4}[key[0]]
    return products * shape.block_m * shape.block_n * key[3] / shape.num_warps


def launch_pass(name: str, dtype: torch.dtype, dim: int, kind: str, dropout: bool) -> None:
    """The launches of one pass, for a causal call, or one with a window."""
    from saccade.kernels import launch
    from saccade.kernels.call import Call
    from saccade.kernels.weights import weights
    from saccade.maskbase import UNBOUNDED

    if name == "decode":
        launch_decode(dtype, dim)
        return
    batch, heads, length = 2, 4, 2048
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    q, k, v, out, dout, dq, dk, dv = (empty(batch, heads, length, dim) for _ in range(8))
    lse, pairs = empty(batch, heads, length, kind=torch.float64), (batch, heads, length, length)
    bias = empty(*pairs) if name == "bias" else None
    seed = empty(1, kind=torch.int64) if dropout else None
    band = [128 if kind == "window" else UNBOUNDED, 0, UNBOUNDED, UNBOUNDED]
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


def launch_decode(dtype: torch.dtype, dim: int) -> None:
    """Decode with each number of rows that a tile may have, and of splits: a causal call with lengths, and
    one with a window, which one split serves.
    """
    from saccade.kernels import decode
    from saccade.kernels.call import Call
    from saccade.maskbase import UNBOUNDED

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    lengths, k, compiled = empty(2, kind=torch.int64), empty(2, 1, 4096, dim), set()
    for heads, left in itertools.product((1, 32, 64), (UNBOUNDED, 99)):  # of one key head
        call = Call(
            empty(2, heads, 1, dim), k, k, *[None] * 14, lengths, None, None, [],
            [left, 0, UNBOUNDED, UNBOUNDED], [], 1, 4096, 0, 0, dim**-0.5, 0.0, 0.0, 0.0, 1,
        )  # fmt: skip
        variant = decode.tile_shape(call)[0].block_m, left
        if variant not in compiled:
            compiled.add(variant)
            decode.forward(call, torch.empty_like(call.q), empty(2, heads, 1, kind=torch.float64))


def variants(arch: str, dim: int, *only: str) -> None:  # noqa: C901
    """Every flag and every optional argument of the bodies, each compiled once: the interpreter never asks
    whether the compiler would take them.
    """
    from dataclasses import replace

    from saccade.kernels import call as calls
    from saccade.kernels import decode, launch, launch_gather
    from saccade.kernels.weights import weights
    from saccade.maskbase import UNBOUNDED

    calls.architecture = decode.architecture = lambda device: arch
    batch, heads, heads_k, n = 2, 4, 2, 256

    def empty(*shape: int, kind: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    def ints(*shape: int) -> torch.Tensor:
        return empty(*shape, kind=torch.int32)

    def longs(*shape: int) -> torch.Tensor:
        return empty(*shape, kind=torch.int64)

    def floats(*shape: int) -> torch.Tensor:
        return empty(*shape, kind=torch.float32)

    q, k, v = empty(batch, heads, n, dim), empty(batch, heads_k, n, dim), empty(batch, heads_k, n, dim)
    rest: list[Any] = [None] * 17
    numbers: list[Any] = [[], [UNBOUNDED, 0, UNBOUNDED, UNBOUNDED], [], 0, 0, 0, 0, 0.125, 0.0, 0.0, 0.0, 0]
    plain = calls.Call(*[q, k, v, *rest, *numbers])
    lists = [longs(9, 64), *(ints(x) for x in (5, 4, 9, 9) * 2)]
    packed = {"q": empty(500, heads, dim), "k": empty(500, heads_k, dim), "v": empty(500, heads_k, dim),
              "cu_q": longs(3), "cu_k": longs(3), "max_q": n, "max_k": n}  # fmt: skip
    changes: dict[str, dict[str, Any]] = {
        "bias": {"bias": empty(batch, heads, n, n)},
        "wide bias": {"bias": floats(batch, heads, n, n), "seed": longs(1), "dropout_p": 0.1},
        "relative": {"rel_bias": floats(heads, 2 * n - 1)},
        "by query": {"rel_bias": floats(batch, heads, n, 17)},
        "packed by query": {**packed, "rel_bias": floats(heads, 500, 17)},
        "additive": {"score": 1, "weight": floats(heads, dim)},
        "gatv2": {"score": 2, "weight": floats(heads, dim), "slope": 0.2, "softcap": 3.0},
        "sink": {"sink": floats(heads), "softcap": 2.0},
        "extra": {"extra_k": empty(heads, dim), "extra_v": empty(heads, dim), "activation": 3},
        "dropout": {"seed": longs(1), "dropout_p": 0.1},
        "bounds": {"head_bounds": longs(heads, 4), "chunks": [16, 1]},
        "padding": {"lengths": longs(batch), "keep": empty(batch, n, kind=torch.bool)},
        "segments": {"q_ids": ints(batch, n), "k_ids": ints(batch, n), "activation": 1},
        "sigmoid": {"activation": 2},
        "packed": {**packed, "rel_bias": floats(heads, 2 * n - 1), "seed": longs(1), "dropout_p": 0.1},
        "graph": {"tiles": lists, "rel_bias": floats(heads, 2 * n - 1), "bias": empty(batch, heads, n, n)},
    }
    for name, change in changes.items():
        if name not in (only or changes):
            continue
        call = replace(plain, **change)
        with compiling(CAPABILITY[arch]) as found:
            rows = (heads, 500) if call.cu_q is not None else (batch, heads, n)
            lse, out = empty(*rows, kind=torch.float64), torch.empty_like(call.q)
            launch.forward(call, out, lse)
            optional = (call.bias, call.rel_bias, call.weight, call.extra_k, call.extra_v)
            grads = [torch.empty_like(x) for x in (call.q, call.k, call.v)]
            grads += [floats(0) if x is None else x.float() for x in optional]
            needs = 7 | sum(8 << bit for bit, x in enumerate(optional) if x is not None)
            launch.backward(call, torch.empty_like(out), lse, out, lse, tuple(grads), needs)
            if call.cu_q is None:
                for average in (False, True):
                    columns = n + (call.extra_k is not None) + (call.activation == 3)
                    shape = (batch, n, columns) if average else (batch, heads, n, columns)
                    weights(call, lse, empty(*shape), average)
        _print(name, arch, found)
    caches: dict[str, dict[str, Any]] = {
        "cache": {"seqused_k": longs(batch), "max_q": 1, "max_k": 4 * n, "sink": floats(heads)},
        "pages": {"seqused_k": longs(batch), "page_table": ints(batch, 64), "max_q": 1, "max_k": 4 * n,
                  "k": empty(32, heads_k, 16, dim), "v": empty(32, heads_k, 16, dim)},
        "beam": {"seqused_k": longs(batch), "beam": ints(batch, 4 * n), "max_q": 1, "max_k": 4 * n,
                 "score": 1, "weight": floats(heads, dim)},
    }  # fmt: skip
    few = replace(plain, q=empty(batch, heads, 1, dim))
    for name, change in caches.items():
        if name not in (only or caches):
            continue
        with compiling(CAPABILITY[arch]) as found:
            row = empty(batch, heads, 1, kind=torch.float64)
            for left in (UNBOUNDED, 99):  # in several splits, and in one
                band = [left, 0, UNBOUNDED, UNBOUNDED]
                decode.forward(replace(few, **change, band=band), empty(batch, heads, 1, dim), row)
        _print(name, arch, found)
    work = [ints(40), longs(40), longs(40), ints(40), ints(3), ints(4)]
    edge_terms = {
        "edges": (None, None, None),
        "edge bias": (floats(heads, 900), None, None),
        "edge features": (floats(1, 900), empty(batch, heads, n, 8), empty(900, 8)),
        "joint features": (floats(heads, 900), floats(1, heads, dim, 8), empty(900, 8)),
    }
    for name, edge in edge_terms.items():
        if name not in (only or edge_terms):
            continue
        for other in {"edge bias": ("dropout", "gatv2"), "joint features": ("additive", "gatv2")}.get(
            name, ("dropout",)
        ):
            call = replace(plain, **changes[other])
            g = launch_gather.GatherCall(call, work, ints(900), longs(900), *edge, 900)
            lse = empty(batch, heads, n, kind=torch.float64)
            with compiling(CAPABILITY[arch]) as found:
                mixed = torch.empty_like(edge[1]) if edge[1] is not None and not call.score else empty(0)
                launch_gather.forward(g, torch.empty_like(q), lse, mixed)
                heads_of = (
                    torch.empty_like(q),
                    lse,
                    mixed if mixed.numel() else None,
                    torch.empty_like(q),
                    lse,
                )
                likes = (call.weight, edge[0], edge[1], edge[2])
                grads = [torch.empty_like(x) for x in (q, k, v)]
                grads += [floats(0) if x is None else torch.empty_like(x) for x in likes]
                by_key = (work, ints(900), longs(900), ints(900))
                launch_gather.backward(g, heads_of, by_key, tuple(grads))
            _print(name, arch, found)


def _print(name: str, arch: str, found: list[tuple[str, Any]]) -> None:
    for kernel_name, kernel in found:
        line = {"variant": name, "kernel": kernel_name, "arch": arch}
        sass = arch == "sm90" and kernel_name.startswith(("tiled", "decode"))
        print(json.dumps(line | facts(kernel, sass)), flush=True)


if __name__ == "__main__" and sys.argv[1] == "variants":
    variants(sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
elif __name__ == "__main__":
    wanted = sys.argv[3:]
    main(
        sys.argv[1],
        int(sys.argv[2]),
        [int(o) for o in wanted if o.isdigit()],
        [o for o in wanted if not o.isdigit()],
    )
