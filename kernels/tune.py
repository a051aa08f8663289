"""`python -m saccade.kernels.tune`: measures the rows of the tile table on the GPU at hand and keeps the best
of each in the user's cache folder, where `config.pick` finds them from the next process on.

Shapes that do not fit the GPU are left out. No user's call ever tunes.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
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
    say: Callable[[str], None] = print,
) -> dict[Key, Config]:  # fmt: skip
    """The best shape of every row asked for on the current GPU, written to `config.cache_file()`.
    `time` gives the milliseconds of a pass under the shapes now in force, or raises: the GPU's clock, unless
    given.

    Raises RuntimeError without a CUDA device.
    """
    if time is None:
        if not torch.cuda.is_available():
            raise RuntimeError("saccade.kernels.tune: needs a CUDA device, and there is none")
        time = milliseconds
    name, arch = config.this_gpu()
    best: dict[Key, Config] = {}
    for dim, size, kind, one in itertools.product(dims, sizes, config.KINDS, config.PASSES[:3]):
        key = (one, arch, size, dim, kind)
        timed = [(took, shape) for shape in candidates(key) if (took := _try(time, key, shape)) is not None]
        if timed:
            took, shape = min(timed, key=lambda x: x[0])
            best[key] = replace(shape, measured=f"{name}, {took:.3f} ms")
            say(f"{one} {arch} {8 * size} bits, head_dim {dim}, {kind}: {best[key]}")
    path = config.cache_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"key": list(key), "config": asdict(shape)} for key, shape in best.items()]
    path.write_text(json.dumps(rows, indent=1))
    config.load(path)
    return best


def _try(time: Timer, key: Key, shape: Config) -> float | None:
    from triton.runtime.errors import OutOfResources

    name, _, size, dim, kind = key
    try:
        with config.override({name: shape}):
            return time(name, _DTYPES[size], dim, kind)
    except OutOfResources:
        return None


def milliseconds(name: str, dtype: torch.dtype, dim: int, kind: str) -> float:
    """The median time of a pass at 4096 tokens: causal, or a window of 512 keys."""
    import triton.testing

    from . import launch
    from .call import Call

    batch = max(1, _TOKENS // _SEQLEN)
    size = (batch, _HEADS, _SEQLEN, dim)
    q, k, v, dout = (torch.randn(size, device="cuda", dtype=dtype) for _ in range(4))
    out, lse = torch.empty_like(q), torch.empty(size[:3], device="cuda", dtype=torch.float64)
    free = 1 << 62
    rest: list[Any] = [None] * 17
    left = free if kind == "full" else 511
    numbers: list[Any] = [[], [left, 0, free, free], [], 0, 0, 0, 0, dim**-0.5, 0.0, 0.0, 0.0, 0]
    call = Call(*[q, k, v, *rest, *numbers])
    launch.forward(call, out, lse)
    nothing = torch.empty(0, device="cuda")
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *[nothing] * 5)
    needs = {"backward_q": 1, "backward_kv": 6}

    def run() -> Any:
        if name == "forward":
            launch.forward(call, out, lse)
        else:
            launch.backward(call, dout, None, out, lse, grads, needs[name])

    return float(triton.testing.do_bench(run, return_mode="median"))


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--dims", type=int, nargs="*", default=list(config.DIMS))
    asked.add_argument("--bytes", type=int, nargs="*", default=[2], help="sizes of an element: 2, 4, 8")
    given = asked.parse_args()
    tune(given.dims, given.bytes)
