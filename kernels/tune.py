"""`python -m saccade.kernels.tune`: measures the rows of the tile table on the GPU at hand and keeps the best
of each in the user's cache folder, where `config.pick` finds them from the next process on. What is measured
is kept at once, beside the rows of earlier runs: a run may be cut short.

Shapes that do not fit the GPU, or do not compile for it, are left out. No user's call ever tunes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time as clock
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from . import config
from .config import Config, Key

_SEQLEN, _HEADS, _TOKENS = 4096, 16, 16384
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
Timer = Callable[[str, torch.dtype, int, str], float]


def candidates(key: Key) -> list[Config]:
    """The shapes worth a try for a row of the table, its own among them."""
    (name, arch, size, dim, kind) = key
    own = config.pick(name, arch, size, dim, kind)
    blocks = {2: (32, 64, 128), 4: (16, 32, 64), 8: (16, 32)}[size]
    found = [own]
    for m, n, warps, stages in itertools.product(blocks, blocks, (4, 8), (1, 2, 3)):
        if m * n <= 128 * 128 and name in config.PASSES[:3] and m * dim <= 128 * 256:
            found.append(Config(m, n, own.block_d, warps, stages))
    return list(dict.fromkeys(found))


def tune(
    dims: Iterable[int] = config.DIMS, sizes: Iterable[int] = (2,), time: Timer | None = None,
    say: Callable[[str], None] = print, seconds: float = math.inf, workers: int = 1,
) -> dict[Key, Config]:  # fmt: skip
    """The best shape of every row asked for on the current GPU, written to `config.cache_file()`.
    `time` gives the milliseconds of a pass under the shapes now in force, or raises: the GPU's clock, unless
    given. No shape is tried after `seconds`. `workers`: processes that compile.

    Raises RuntimeError without a CUDA device.
    """
    if time is None:
        if not torch.cuda.is_available():
            raise RuntimeError("saccade.kernels.tune: needs a CUDA device, and there is none")
        time = milliseconds
    name, arch = config.this_gpu()
    best: dict[Key, Config] = {}
    end = clock.monotonic() + seconds
    with ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext() as pool:
        for dim, size, kind, one in itertools.product(dims, sizes, config.KINDS, config.PASSES[:3]):
            key = (one, arch, size, dim, kind)
            shapes = candidates(key)
            if pool is not None and clock.monotonic() < end:  # Triton keeps on disk what it has compiled
                list(pool.map(_compile, itertools.repeat(key), shapes))
            timed: list[tuple[float, Config]] = []
            for shape in shapes:
                if clock.monotonic() > end:  # half of the candidates have no best
                    say(f"time is over at {one}, head_dim {dim}, {kind}: that row and the next stay")
                    return best
                if (took := _try(time, key, shape, say)) is not None:
                    timed.append((took, shape))
            if timed:
                took, shape = min(timed, key=lambda x: x[0])
                best[key] = replace(shape, measured=f"{name}, {took:.3f} ms")
                say(f"{one} {arch} {8 * size} bits, head_dim {dim}, {kind}: {best[key]}")
                _keep(config.cache_file(name), key, best[key])
    return best


def _compile(key: Key, shape: Config) -> None:
    """Launch a shape once, for what the compiler leaves on disk. What is wrong with it is said later."""
    name, _, size, dim, kind = key
    with suppress(Exception), config.override({name: shape}):
        one_pass(name, _DTYPES[size], dim, kind)()


def _keep(path: Path, key: Key, shape: Config) -> None:
    """One more row in the file, in place of an earlier one for its key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text()) if path.is_file() else []
    rows = [row for row in rows if row["key"] != list(key)]
    rows.append({"key": list(key), "config": asdict(shape)})
    path.write_text(json.dumps(rows, indent=1))
    config.load(path)


def _try(time: Timer, key: Key, shape: Config, say: Callable[[str], None]) -> float | None:
    from triton.runtime.errors import OutOfResources, PTXASError

    name, _, size, dim, kind = key
    try:
        with config.override({name: shape}):
            return time(name, _DTYPES[size], dim, kind)
    except OutOfResources:
        return None
    except PTXASError as error:
        say(f"{name}, {shape}: {str(error).splitlines()[0]}")
        return None


def milliseconds(name: str, dtype: torch.dtype, dim: int, kind: str) -> float:
    """The median time of a pass at 4096 tokens: causal, or a window of 512 keys."""
    import triton.testing

    return float(triton.testing.do_bench(one_pass(name, dtype, dim, kind), return_mode="median"))


def one_pass(name: str, dtype: torch.dtype, dim: int, kind: str, device: str = "cuda") -> Callable[[], None]:
    """What is timed, its tensors made ready."""
    from . import launch
    from .call import Call

    batch = max(1, _TOKENS // _SEQLEN)
    size = (batch, _HEADS, _SEQLEN, dim)
    q, k, v, dout = (torch.randn(size, device=device, dtype=dtype) for _ in range(4))
    out, lse = torch.empty_like(q), torch.empty(size[:3], device=device, dtype=torch.float64)
    free = 1 << 62
    rest: list[Any] = [None] * 17
    left = free if kind == "full" else 511
    numbers: list[Any] = [[], [left, 0, free, free], [], 0, 0, 0, 0, dim**-0.5, 0.0, 0.0, 0.0, 0]
    call = Call(*[q, k, v, *rest, *numbers])
    launch.forward(call, out, lse)
    nothing = torch.empty(0, device=device)
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *[nothing] * 5)
    needs = {"backward_q": 1, "backward_kv": 6}

    def run() -> None:
        if name == "forward":
            launch.forward(call, out, lse)
        else:
            launch.backward(call, dout, None, out, lse, grads, needs[name])

    return run


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--dims", type=int, nargs="*", default=list(config.DIMS))
    asked.add_argument("--bytes", type=int, nargs="*", default=[2], help="sizes of an element: 2, 4, 8")
    asked.add_argument("--seconds", type=float, default=math.inf, help="try no shape after so long")
    asked.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="that compile")
    given = asked.parse_args()
    tune(given.dims, given.bytes, seconds=given.seconds, workers=given.workers)
