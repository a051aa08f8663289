"""`python -m saccade.kernels.tune`: measures the rows of the tile table on the GPU at hand and keeps the best
of each in the user's cache folder, where `config.pick` finds them from the next process on. What is measured
is kept at once, beside the rows of earlier runs: a run may be cut short.

Shapes that do not fit the GPU, do not compile for it, or compute something else than plain PyTorch does
(trusted.py) are left out. No user's call ever tunes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import time as clock
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import config, trusted
from .config import Config, Key

_SEQLEN, _HEADS, _TOKENS, _WINDOW = 4096, 16, 16384, 511
_CHECKED = (_SEQLEN, 999)  # lengths: what is timed, and one that cuts tiles. The same kernels serve both.
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
Timer = Callable[[str, torch.dtype, int, str], float]
Checker = Callable[[str, torch.dtype, int, str], str | None]


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
    check: Checker | None = None,
) -> dict[Key, Config]:  # fmt: skip
    """The best shape of every row asked for on the current GPU, written to `config.cache_file()`.
    `time` gives the milliseconds of a pass under the shapes now in force, or raises: the GPU's clock, unless
    given. `check` says what is wrong with its results, or None: `wrong`, unless given. No shape is tried
    or compiled ahead after `seconds`. `workers`: processes that compile.

    Raises RuntimeError without a CUDA device, and what CUDA raises: a GPU in trouble stays so.
    """
    if (time is None or check is None) and not torch.cuda.is_available():
        raise RuntimeError("saccade.kernels.tune: needs a CUDA device, and there is none")
    trial = time or milliseconds, check or wrong
    name, arch = config.this_gpu()
    best: dict[Key, Config] = {}
    end = clock.monotonic() + seconds
    with _compilers(workers) as compile_ahead:
        for dim, size, kind, one in itertools.product(dims, sizes, config.KINDS, config.PASSES[:3]):
            key = (one, arch, size, dim, kind)
            shapes = candidates(key)
            compile_ahead(key, shapes, end - clock.monotonic())
            timed: list[tuple[float, Config]] = []
            for shape in shapes:
                if clock.monotonic() > end:  # half of the candidates have no best
                    say(f"time is over at {one}, head_dim {dim}, {kind}: that row and the next stay")
                    return best
                if (took := _try(trial, key, shape, say)) is not None:
                    timed.append((took, shape))
            if timed:
                took, shape = min(timed, key=lambda x: x[0])
                best[key] = replace(shape, measured=f"{name}, {took:.3f} ms")
                say(f"{one} {arch} {8 * size} bits, head_dim {dim}, {kind}: {best[key]}")
                _keep(config.cache_file(name), key, best[key])
    return best


@contextmanager
def _compilers(workers: int) -> Iterator[Callable[[Key, list[Config], float], None]]:
    """A function that compiles shapes in other processes for so many seconds, since Triton keeps on disk what
    it has compiled; what is not ready then is compiled where it is tried. No process is left at the end.
    """
    if workers < 2:
        yield lambda key, shapes, seconds: None
        return
    others = set(active_children())
    pool = ProcessPoolExecutor(workers, get_context("spawn"))

    def compile_ahead(key: Key, shapes: list[Config], seconds: float) -> None:
        with suppress(BrokenProcessPool):  # a compiler that crashed takes its process along
            if seconds > 0:
                shares = [pool.submit(_compile, key, shape) for shape in shapes]
                wait(shares, None if seconds == math.inf else seconds)

    try:
        yield compile_ahead
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(active_children()) - others:
            child.terminate()
            child.join()


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


def _try(trial: tuple[Timer, Checker], key: Key, shape: Config, say: Callable[[str], None]) -> float | None:
    """The milliseconds of a shape whose results are right."""
    from triton.runtime.errors import OutOfResources

    name, _, size, dim, kind = key
    time, check = trial
    try:
        with config.override({name: shape}):
            if (fault := check(name, _DTYPES[size], dim, kind)) is not None:
                say(f"{name}, head_dim {dim}, {kind}, {shape}: wrong, and left out: {fault}")
                return None
            return time(name, _DTYPES[size], dim, kind)
    except OutOfResources:
        return None
    except Exception as error:
        if isinstance(error, RuntimeError) and "CUDA" in str(error):  # no later shape would fare better
            raise
        last = str(error).strip().splitlines()[-1:]  # Triton's own begin with the source
        say(f"{name}, head_dim {dim}, {kind}, {shape}: left out: {type(error).__name__}: {''.join(last)}")
        return None


def milliseconds(name: str, dtype: torch.dtype, dim: int, kind: str) -> float:
    """The median time of a pass at 4096 tokens: causal, or a window of 512 keys."""
    import triton.testing

    return float(triton.testing.do_bench(one_pass(name, dtype, dim, kind), return_mode="median"))


@dataclass(frozen=True)
class _Sample:
    """A call [B, H, S, D] and where its results go."""

    call: Any
    dout: Tensor
    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...]

    @staticmethod
    def of(dtype: torch.dtype, dim: int, kind: str, device: str, sizes: tuple[int, int]) -> _Sample:
        """`sizes`: sequences and their length."""
        from .call import Call

        size = (sizes[0], _HEADS, sizes[1], dim)
        q, k, v, dout = (torch.randn(size, device=device, dtype=dtype) for _ in range(4))
        out, lse = torch.empty_like(q), torch.empty(size[:3], device=device, dtype=torch.float64)
        free = 1 << 62
        left = free if kind == "full" else _WINDOW
        rest: list[Any] = [None] * 17
        numbers: list[Any] = [[], [left, 0, free, free], [], 0, 0, 0, 0, dim**-0.5, 0.0, 0.0, 0.0, 0]
        nothing = torch.empty(0, device=device)
        grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *[nothing] * 5)
        return _Sample(Call(*[q, k, v, *rest, *numbers]), dout, out, lse, grads)

    def run(self, name: str) -> None:
        from . import launch

        if name == "forward":
            launch.forward(self.call, self.out, self.lse)
        else:
            needs = {"backward_q": 1, "backward_kv": 6}[name]
            launch.backward(self.call, self.dout, None, self.out, self.lse, self.grads, needs)


def one_pass(name: str, dtype: torch.dtype, dim: int, kind: str, device: str = "cuda") -> Callable[[], None]:
    """What is timed, its tensors made ready."""
    sample = _Sample.of(dtype, dim, kind, device, (max(1, _TOKENS // _SEQLEN), _SEQLEN))
    sample.run("forward")
    return functools.partial(sample.run, name)


def wrong(name: str, dtype: torch.dtype, dim: int, kind: str, device: str = "cuda") -> str | None:
    """What a pass gets wrong under the shapes now in force, or None: in the first, the middle and the last
    head of one sequence of each length that is checked. The backward passes start from the trusted out and
    lse.
    """
    for length in _CHECKED:
        sample, heads = _answered(dtype, dim, kind, device, length)
        dq, dk, dv = sample.grads[:3]
        got = {"out": sample.out, "lse": sample.lse, "dq": dq, "dk": dk, "dv": dv}
        for result in trusted.PASSES[name]:
            got[result].fill_(float("nan"))
        if name != "forward":
            for h, (exact, _) in heads.items():
                sample.out[0, h], sample.lse[0, h] = exact.out.to(dtype), exact.lse
        sample.run(name)
        for result, (h, (exact, allowed)) in itertools.product(trusted.PASSES[name], heads.items()):
            pair = getattr(exact, result), getattr(allowed, result)
            if (fault := trusted.fault(result, got[result][0, h], *pair, dtype)) is not None:
                return f"{fault} (head {h}, {length} tokens)"
    return None


@functools.lru_cache(maxsize=2 * len(_CHECKED))
def _answered(
    dtype: torch.dtype, dim: int, kind: str, device: str, length: int
) -> tuple[_Sample, dict[int, tuple[trusted.Results, trusted.Results]]]:
    """A sample, and what is expected of a few of its heads."""
    sample = _Sample.of(dtype, dim, kind, device, (1, length))
    sample.out.zero_()
    sample.lse.zero_()
    call, left = sample.call, length if kind == "full" else _WINDOW
    tensors = (call.q, call.k, call.v, sample.dout)
    heads = sorted({0, _HEADS // 2, _HEADS - 1})
    return sample, {h: trusted.expected(tuple(x[0, h] for x in tensors), left) for h in heads}


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--dims", type=int, nargs="*", default=list(config.DIMS))
    asked.add_argument("--bytes", type=int, nargs="*", default=[2], help="sizes of an element: 2, 4, 8")
    asked.add_argument("--seconds", type=float, default=math.inf, help="try no shape after so long")
    asked.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="that compile")
    given = asked.parse_args()
    tune(given.dims, given.bytes, seconds=given.seconds, workers=given.workers)
