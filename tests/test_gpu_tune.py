"""`saccade.kernels.tune` where it is cut short, fails, or goes on from an earlier run."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import saccade  # noqa: E402
from saccade.kernels import config, trusted, tune  # noqa: E402
from saccade.kernels.config import Config  # noqa: E402
from triton.compiler.errors import CompilationError  # noqa: E402
from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a run leaves."""
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path))
    monkeypatch.setattr(config, "this_gpu", lambda: ("GPU", "sm90"))
    monkeypatch.setattr(config, "TABLE", dict(config.TABLE))
    return tmp_path / "saccade" / "tiles-GPU.json"


def by_warps(name: str, dtype: torch.dtype, dim: int, kind: str) -> float:
    return float(config.pick(name, "sm90", 2, dim, kind).num_warps)


def right(name: str, dtype: torch.dtype, dim: int, kind: str) -> str | None:
    """A check that nothing fails."""
    return None


def test_an_earlier_run_is_kept(rows: Path) -> None:
    for dim in (64, 128, 64):
        tune.tune([dim], [2], by_warps, say=lambda line: None, check=right)
    keys = [tuple(row["key"]) for row in json.loads(rows.read_text())]
    assert len(keys) == len(set(keys)) == 12 and {key[3] for key in keys} == {64, 128}


def test_time_that_is_over(rows: Path) -> None:
    said: list[str] = []
    calls = 0

    def slow(name: str, dtype: torch.dtype, dim: int, kind: str) -> float:
        nonlocal calls
        calls += 1
        if name == "backward_q":
            tune.clock.sleep(0.3)
        return 1.0

    best = tune.tune([64], [2], slow, said.append, seconds=0.25, check=right)
    assert [key[0] for key in best] == ["forward"] and len(json.loads(rows.read_text())) == 1
    assert "time is over at backward_q" in said[-1] and calls < 200


def test_shapes_that_do_not_compile_are_left_out(rows: Path) -> None:
    def broken(name: str, dtype: torch.dtype, dim: int, kind: str) -> float:
        shape = config.pick(name, "sm90", 2, dim, kind)
        if shape.num_warps == 4:
            raise OutOfResources(1, 0, "shared memory")
        if shape.num_stages == 1:
            raise PTXASError("too much")
        return 1.0

    best = tune.tune([64], [2], broken, say=lambda line: None, check=right)
    assert len(best) == 6 and all(s.num_warps == 8 and s.num_stages > 1 for s in best.values())


def test_what_no_compiler_can_make_is_named(rows: Path) -> None:
    """Whatever it stumbles over; but a GPU in trouble stays so, and stops the run."""
    said: list[str] = []
    trouble = [CompilationError("x", None, "no such layout"), RuntimeError("PassManager::run failed"),
               IndexError("map::at"), PTXASError("too much")]  # fmt: skip

    def broken(name: str, dtype: torch.dtype, dim: int, kind: str) -> float:
        shape = config.pick(name, "sm90", 2, dim, kind)
        if name == "forward" and shape.num_warps == 4:
            raise trouble[len(said) % 4]
        return 1.0

    best = tune.tune([64], [2], broken, said.append, check=right)
    assert len(best) == 6 and best["forward", "sm90", 2, 64, "full"].num_warps == 8
    left_out = [line for line in said if "num_warps=4" in line and "left out" in line]
    for word in ("CompilationError", "PassManager::run failed", "IndexError: map::at", "PTXASError"):
        assert any(word in line for line in left_out), word

    def lost(name: str, dtype: torch.dtype, dim: int, kind: str) -> float:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.tune([64], [2], lost, said.append, check=right)


def slow_compiler(key: config.Key, shape: Config) -> None:
    time.sleep(20)


def test_compilers_end_with_the_time(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_compile", slow_compiler)
    said: list[str] = []
    began = time.monotonic()
    tune.tune([64], [2], by_warps, said.append, seconds=1, workers=2, check=right)
    assert time.monotonic() - began < 10 and "time is over at forward" in said[-1]
    # Whoever waits for a process second, the pool's thread or tune, may see it for a moment after its end.
    while left := multiprocessing.active_children():
        assert time.monotonic() - began < 15, left  # they would sleep for 20
        time.sleep(0.05)


def test_the_gpu_is_asked_for_what_nobody_gives(rows: Path) -> None:
    """A row is never kept unchecked because only the clock was given."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for given in ({"time": by_warps}, {"check": right}):
        with pytest.raises(RuntimeError, match="needs a CUDA device"):
            tune.tune([64], [2], **given)
    assert not rows.exists()


def test_wrong_shapes_are_left_out(rows: Path) -> None:
    """Also where every shape is wrong, its own row among them: then nothing is kept."""
    said: list[str] = []

    def check(name: str, dtype: torch.dtype, dim: int, kind: str) -> str | None:
        shape = config.pick(name, "sm90", 2, dim, kind)
        return "dk is not finite" if name == "backward_kv" or shape.num_warps == 4 else None

    best = tune.tune([64], [2], by_warps, said.append, check=check)
    assert {key[0] for key in best} == {"forward", "backward_q"}
    assert all(shape.num_warps == 8 for shape in best.values())
    assert len(json.loads(rows.read_text())) == 4
    left_out = [line for line in said if "wrong, and left out: dk is not finite" in line]
    assert len(left_out) > 40 and any(
        line.startswith("backward_kv, head_dim 64, window, Config(") for line in left_out
    )


PLANTED = {  # a result of each pass, and what becomes of it in one head
    "forward": ("out", lambda x: x * 1.1), "lse": ("lse", lambda x: x + 1.0),
    "backward_q": ("dq", torch.zeros_like), "backward_kv": ("dv", lambda x: x.roll(1, 0)),
    "nan": ("dk", lambda x: x * float("nan")),
}  # fmt: skip


@pytest.mark.skipif(not saccade.ops_triton.INTERPRETED, reason="without the interpreter it needs a GPU")
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_wrong_shape_is_found(planted: str, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real check, on kernels that really run: the fastest shape is wrong in the last head."""
    monkeypatch.setattr(tune, "_HEADS", 2)
    monkeypatch.setattr(tune, "_CHECKED", (32, 21))
    monkeypatch.setattr(tune, "_WINDOW", 9)
    monkeypatch.setattr(tune, "wrong", functools.partial(tune.wrong, device="cpu"))
    shapes = [Config(16, 16, 16, warps, 1) for warps in (1, 4, 8)]  # "warps" are what each is told by
    monkeypatch.setattr(tune, "candidates", lambda key: shapes)
    result, spoil = PLANTED[planted]
    run = tune._Sample.run

    def spoiled(self: tune._Sample, name: str) -> None:
        run(self, name)
        results = {
            "out": self.out,
            "lse": self.lse,
            **dict(zip(("dq", "dk", "dv"), self.grads, strict=False)),
        }
        if result in trusted.PASSES[name] and config.pick(name, "sm90", 2, 16).num_warps == 1:
            results[result][0, 1] = spoil(results[result][0, 1])

    monkeypatch.setattr(tune._Sample, "run", spoiled)
    tune._answered.cache_clear()
    said: list[str] = []
    best = tune.tune([16], [2], by_warps, said.append, check=tune.wrong)
    assert len(best) == 6
    for (name, *_), shape in best.items():
        assert shape.num_warps == (4 if result in trusted.PASSES[name] else 1), name
    lines = [line for line in said if "wrong, and left out" in line]
    assert len(lines) == 2 and all(
        f": {result} is " in line and "(head 1, 32 tokens)" in line for line in lines
    )
    tune._answered.cache_clear()


@pytest.mark.skipif(not saccade.ops_triton.INTERPRETED, reason="without the interpreter it needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_right_shapes_pass(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are right are not called wrong; the backward's check does not rest on the forward's."""
    monkeypatch.setattr(tune, "_HEADS", 2)
    monkeypatch.setattr(tune, "_CHECKED", (48, 37))
    monkeypatch.setattr(tune, "_WINDOW", 9)
    for kind in config.KINDS:
        for name in ("backward_kv", "backward_q", "forward"):
            assert tune.wrong(name, dtype, 16, kind, "cpu") is None
    tune._answered.cache_clear()


def test_what_is_trusted() -> None:
    """It is torch's own attention, in fp64."""
    q, k, v, dout = (torch.randn(30, 16, dtype=torch.float64) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    far = torch.arange(30)[:, None] - torch.arange(30)
    for left in (30, 9):
        found = trusted.attention((q, k, v, dout), left)
        keep = (far >= 0) & (far <= left)
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=keep)
        grads = torch.autograd.grad(out, leaves, dout)
        scores = torch.where(keep, q @ k.mT / 4, float("-inf"))
        for a, b in zip(found, (out, scores.logsumexp(-1), *grads), strict=True):
            torch.testing.assert_close(a, b)


def test_what_is_timed_compiles() -> None:
    """The launches of every pass, ahead of time: on meta tensors, for a GPU that is not here."""
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from triton_ahead import compiling
from saccade.kernels import call, tune
call.architecture = lambda device: "sm90"
for name in ("forward", "backward_q", "backward_kv"):
    for kind in ("full", "window"):
        with compiling(90) as found:
            tune.one_pass(name, torch.bfloat16, 64, kind, "meta")()
        print(*(kernel for kernel, _ in found))
"""
    assert {"tiled_forward", "tiled_backward_q", "tiled_backward_kv"} <= set(offline(program).split())


def test_what_is_checked_is_what_is_timed() -> None:
    """Not another kernel, compiled for other sizes: what goes wrong may be one kernel's alone."""
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from triton_ahead import compiling
from saccade.kernels import call, tune
call.architecture = lambda device: "sm90"
with compiling(90) as found:
    tune.one_pass("forward", torch.bfloat16, 64, "full", "meta")()
    for length in tune._CHECKED:
        for name in ("forward", "backward_q", "backward_kv"):
            tune._Sample.of(torch.bfloat16, 64, "full", "meta", (1, length)).run(name)
for name in sorted({{name for name, _ in found}}):
    print(name, len({{id(kernel) for other, kernel in found if other == name}}))
"""
    counts = dict(line.split() for line in offline(program).splitlines())
    assert set(counts.values()) == {"1"} and "tiled_backward_kv" in counts


def offline(program: str) -> str:
    """What a program prints, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
