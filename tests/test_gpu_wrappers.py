"""The device layer on a GPU: the tests of tests/sim that its simulator passes (test_cuda_sim.py), compiled by
nvcc. What passes there and fails here is where the simulator and the hardware disagree.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from simulated import ROOT
from test_cuda_machine_code import nvcc

SOURCES = {arch: ROOT / f"tests/sim/{name}.cpp" for arch, name in ((80, "wrappers"), (90, "wrappers_sm90"))}
NAMES = {
    name: arch
    for arch, path in SOURCES.items()
    for name in re.findall(r"^TEST\((\w+)\)", path.read_text(), re.M)
}

needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def build(target: Path, arch: str) -> Path:
    """The tests of an architecture as one program: `90a` has those of Hopper too."""
    sources = [path for least, path in SOURCES.items() if least == 80 or arch == "90a"]
    command = [nvcc() or "", "-std=c++17", "-O2", "-Icsrc", "-cudart=static", "-x", "cu"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(ROOT / "tests/sim/main.cpp")]
    made = subprocess.run(
        [*command, *map(str, sources), "-o", str(target)], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return target


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"
    return build(tmp_path_factory.mktemp("wrappers") / "tests", arch)


@needs_nvcc
@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_wrapper(program: Path, name: str) -> None:
    if NAMES[name] == 90 and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper alone")
    result = subprocess.run([program, name, "0"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_nvcc
@pytest.mark.full
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_wrappers_compile(arch: str, tmp_path: Path) -> None:
    listed = subprocess.run([build(tmp_path / "tests", arch)], capture_output=True, text=True)
    least = {"80": 80, "90a": 90}[arch]
    assert listed.stdout.split() == sorted(name for name, sm in NAMES.items() if sm <= least)
