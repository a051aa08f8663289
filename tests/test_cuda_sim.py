"""The host simulator that the CUDA kernels are tested on: every wrapper right, every planted fault found."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from simulated import ROOT, build, needs_compiler

pytestmark = needs_compiler

SOURCES = sorted({*ROOT.glob("tests/sim/*.cpp")} - {ROOT / "tests/sim/operators.cpp"})  # that one needs torch
NAMES = re.findall(r"^TEST\((\w+)\)", "".join(path.read_text() for path in SOURCES), re.M)
SEEDS = range(8)

# What the simulator says of a fault, where it is not just a wrong number.
MESSAGES = {
    "fault_barrier_fence": "TMA load: no async fence since thread 0 stored",
    "fault_bounds": "global address out of bounds: 4 bytes, ending 4 bytes past the nearest tensor",
    "fault_deadlock": "deadlock in block 0: threads 0-0 wait at mbarrier",
    "fault_empty_barrier": "more arrivals than expected",
    "fault_hand_back": "is there again before the others",
    "fault_parity": "deadlock",
    "fault_product_fence": "wgmma: no async fence since thread",
    "fault_reduce_fence": "bulk reduce-add: no async fence since thread",
    "fault_store_fence": "TMA store: no async fence since thread",
}


@pytest.fixture(scope="session")
def program() -> Path:
    return build("tests", [path for path in SOURCES if path.name != "bridge.cpp"])


def outcome(program: Path, name: str, seed: int) -> str:
    result = subprocess.run([program, name, str(seed)], capture_output=True, text=True, timeout=60)
    assert result.returncode in (0, 1), f"{name} died: {result.stderr}"
    return result.stdout if result.returncode else ""


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("fault_")])
def test_wrapper(program: Path, name: str) -> None:
    for seed in SEEDS:
        assert outcome(program, name, seed) == "", f"seed {seed}"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("fault_")])
def test_fault_is_found(program: Path, name: str) -> None:
    found = [outcome(program, name, seed) for seed in SEEDS]
    assert any(found), "no schedule showed the fault"
    assert any(MESSAGES.get(name, "got ") in text for text in found), found
