"""What Triton's launcher hands to the driver, where there is no driver."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, which Triton's launcher asks for"),
    pytest.mark.skipif(
        not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="no Python.h, which it includes"
    ),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    import triton.backends.nvidia as nvidia

    folder = tmp_path_factory.mktemp("driver")
    include = Path(nvidia.__file__).parent / "include"
    command = ["gcc", "-shared", "-fPIC", f"-I{include}", str(HERE / "libcuda_stub.cpp")]
    command += ["-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return kept | {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "variants", [("wide bias", "padding"), ("packed", "extra"), ("pages", "beam", "edge features")], ids=str
)
def test_every_parameter_arrives(variants: tuple[str, ...], environment: dict[str, str]) -> None:
    command = [sys.executable, str(HERE / "triton_launch.py"), "sm90", "64", *variants]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    launches, parameters = map(int, done.stdout.splitlines()[-1].split())
    assert launches >= 10 and parameters > 20 * launches
