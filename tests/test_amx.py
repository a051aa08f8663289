"""The AMX machine code, its instructions emulated where the processor lacks them."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from saccade import ops

pytestmark = pytest.mark.skipif(
    not ops.LOADED
    or platform.machine() != "x86_64"
    or sys.platform != "linux"
    or shutil.which("g++") is None,
    reason="needs the operator library, Linux on x86-64 and g++",
)

SCRIPT = """
import ctypes, sys
import torch
from saccade import Causal, Graph, KeyPadding, _C
from saccade.functional import attend_with_weights
from saccade.problem import Problem
from saccade.testing import Shape, check_attention, make_inputs

native = {"amx_tile", "amx_bf16"} <= set(_C.cpu_features())
emulator = ctypes.CDLL(sys.argv[1])
if not native:
    emulator.amx_emulator_start()
assert torch.ops.saccade.cpu_isa("amx" if native else "amx!").split()[0] == "amx"
torch.set_num_threads(2)
for sizes in (
    (1, 1, 1, 1, 1, 1, 1), (2, 4, 2, 17, 33, 5, 7), (1, 2, 1, 70, 131, 48, 33), (1, 1, 1, 65, 130, 64, 64)
):
    shape = Shape(*sizes)
    for mask in (None, Causal()):
        check_attention(make_inputs(shape, torch.bfloat16), mask, "cpu")
padded = make_inputs(Shape(2, 2, 2, 17, 33, 24, 40), torch.bfloat16)
check_attention(padded, KeyPadding(torch.tensor([33, 12])), "cpu", softcap=5.0, dropout_p=0.3, seed=7)
torch.manual_seed(0)
graph = Graph.from_dense(torch.rand(70, 131) < 0.5)
check_attention(make_inputs(Shape(1, 1, 1, 70, 131, 32, 16), torch.bfloat16), graph, "cpu")
problem = Problem.of(*(x.detach() for x in make_inputs(Shape(8, 2, 2, 70, 131, 48, 33), torch.bfloat16)))
one_pass, truth = (attend_with_weights(problem, True, name) for name in ("cpu", "reference"))
torch.testing.assert_close(one_pass, truth, rtol=0.02, atol=0.01)
assert native or emulator.amx_emulator_count() > 1000, "no AMX instruction was met"
print("ok")
"""


def test_amx_code(tmp_path: Path) -> None:
    from saccade import _C

    if "amx" not in _C.instruction_sets:
        pytest.skip("the AMX kernels were not compiled")
    features = set(_C.cpu_features())
    if not {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"} <= features:
        pytest.skip("the code around the tiles needs AVX512-BF16")
    library = tmp_path / "libamx_emulator.so"
    source = Path(__file__).with_name("amx_emulator.cpp")
    subprocess.run(["g++", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    found = subprocess.run([sys.executable, "-c", SCRIPT, str(library)], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.split() == ["ok"], found.stderr[-3000:]
