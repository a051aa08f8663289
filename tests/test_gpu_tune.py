"""`saccade.kernels.tune` where it is cut short, fails, or goes on from an earlier run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from saccade.kernels import config, tune  # noqa: E402
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


def test_an_earlier_run_is_kept(rows: Path) -> None:
    for dim in (64, 128, 64):
        tune.tune([dim], [2], by_warps, say=lambda line: None)
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

    best = tune.tune([64], [2], slow, said.append, seconds=0.25)
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

    best = tune.tune([64], [2], broken, say=lambda line: None)
    assert len(best) == 6 and all(s.num_warps == 8 and s.num_stages > 1 for s in best.values())


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
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert {"tiled_forward", "tiled_backward_q", "tiled_backward_kv"} <= set(done.stdout.split())
