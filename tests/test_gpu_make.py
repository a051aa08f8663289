"""The stages of `make gpu`, as far as a machine without a GPU can show them."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_calls import GENERAL, HOPPERS, call_of
from saccade.backends import cuda
from saccade.problem import Problem

ROOT = Path(__file__).parents[1]
STAGES = re.findall(r"^gpu: (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split()

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("stage", ["gpu", STAGES[-1]])
def test_every_stage_asks_for_a_gpu_first(stage: str) -> None:
    done = make(stage, f"PYTHON={sys.executable}")
    assert done.returncode and "has no torch that sees a CUDA device" in done.stdout


def test_stages_come_in_order_and_fetch_nothing_else() -> None:
    done = make("-n", "gpu", f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stderr
    wanted = [
        "pip install", "saccade doctor", "test_gpu_wrappers.py", "test_gpu.py", "-k pairwise", "memcheck",
        "racecheck", "saccade.kernels.tune", "--suite gpu ", "--suite gpu-graph", "CUDA_VISIBLE_DEVICES= ",
    ]  # fmt: skip
    places = [done.stdout.index(text) for text in wanted]
    assert places == sorted(places)
    installs = [line for line in done.stdout.splitlines() if "install" in line and "-e ." in line]
    assert installs and all("--no-build-isolation --no-deps" in line for line in installs)


def test_racecheck_is_shown_no_copy_engine() -> None:
    """It takes the plain bulk copies of Hopper's kernels for races."""
    assert "racecheck" in (told := make("-n", "gpu-sanitize", f"PYTHON={sys.executable}").stdout)
    (chosen,) = re.findall(r"racecheck.* -k '(.*)' tests/test_gpu.py", told)
    assert chosen == "cuda and general"
    source = (ROOT / "tests/test_gpu.py").read_text()
    assert re.findall(r"def (\w*general\w*)", source) == [
        f"test_general_{x}" for x in ("calls", "decode", "graph")
    ]
    assert re.search(r'"name", GENERAL\)\n.*\ndef test_general_calls', source)  # others have none
    for name, dim in itertools.product((*GENERAL, *HOPPERS), (64, 128, 256)):
        tensors, mask, options = call_of(name, dim, "cpu")
        assert cuda.takes_hopper(Problem.of(*tensors, mask, **options)) == (name in HOPPERS), name


def test_a_doctor_who_finds_something_stops_nothing(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *doctor*) echo "cuda: missing"; exit 1;; esac\nexit 0\n')
    python.chmod(0o755)
    done = make("gpu-build", f"PYTHON={python}")
    assert done.returncode == 0 and "cuda: missing" in done.stdout


def test_without_xdist_a_stage_runs_in_one_process(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\ncase "$2" in *xdist*) exit 1;; esac\nexit 0\n')
    bare.chmod(0o755)
    for python, spread in ((str(bare), False), (sys.executable, True)):
        for stage in ("gpu-check", "gpu-pairwise"):
            assert ("-n 8" in make("-n", stage, f"PYTHON={python}").stdout) == spread, stage
