"""The CUDA kernels as nvcc compiles them, run in an emulator of PTX (ptx_machine.py) on host memory: results
against the yardstick, and faults planted in the PTX that must be found.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import ptx_cases
import pytest
from ptx_cuda import Changes, Emulated
from simulated import needs_compiler
from test_cuda_machine_code import nvcc

pytestmark = [needs_compiler, pytest.mark.skipif(nvcc() is None, reason="no nvcc")]

# What needs other sources is left to `make test-full`: compiling them takes a minute.
DEFAULT = ("sm80", "sm90", "sm90 backward", "sm90 backward, 256")


def cases() -> list[Any]:
    full = [name for name in ptx_cases.CUDA if not re.match(r"sm(80|90)(?! backward)", name)]
    return [
        pytest.param(n, id=n, marks=[pytest.mark.full] * (n in full and n not in DEFAULT))
        for n in ptx_cases.CUDA
    ]


# By case, the first that fits: kernels that it must reach.
KERNELS = {
    "sm80 backward, bias": ["rows_sm80", "keys_sm80", "queries_sm80", "bias_sm80"],
    "sm80 backward": ["forward_sm80", "rows_sm80", "keys_sm80", "queries_sm80"],
    "sm90 backward, repeatable": ["13backward_sm90", "rows_sm80", "queries_sm80"],
    "sm90 backward": ["forward_sm90", "13backward_sm90", "rows_sm80", "round_sm90"],
    "sm80": ["forward_sm80"],
    "sm90": ["forward_sm90"],
    "decode": ["6decode"],
    "gather": ["gather_forward", "gather_backward_queries", "gather_backward_keys"],
}


@pytest.mark.parametrize("name", cases())
def test_results(name: str) -> None:
    made: list[Emulated] = []

    def kernels(arch: int, seed: int, deterministic: bool) -> Emulated:
        made.append(Emulated(arch, seed, deterministic))
        return made[-1]

    ptx_cases.run(ptx_cases.CUDA[name], kernels, seed=1)
    launched = [kernel for one in made for kernel in one.launched]
    for part in next(parts for start, parts in KERNELS.items() if name.startswith(start)):
        assert any(part in kernel for kernel in launched), (part, launched)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize(
    "name", ["sm80 backward", "sm90", "sm90, 128", "sm90 backward", "sm90 backward, 256"]
)
def test_any_schedule(name: str, seed: int) -> None:
    ptx_cases.run(ptx_cases.CUDA[name], Emulated, seed)


def other_stride(found: re.Match[str]) -> str:
    """A matrix descriptor whose groups of eight rows are half as far apart."""
    return str(int(found[0]) - (32 << 32))


# By kernel: what is changed in the PTX.
FAULTS: dict[str, list[tuple[str, Changes]]] = {
    "sm80": [
        ("rows of A swapped", [(r"(mma\.sync[^;]*?\{[^}]*\},\s*\{)(%r\d+), (%r\d+)", r"\1\3, \2")]),
        ("depths of B swapped", [(r"(mma\.sync[^;]*\{)(%r\d+), (%r\d+)(\}, \{[^}]*\};)", r"\1\3, \2\4")]),
        ("sums swapped", [(r"(mma\.sync[^{]*\{%f\d+, )(%f\d+), (%f\d+)", r"\1\3, \2")]),
        ("not transposed", [(r"\.x4\.trans\.shared", ".x4.shared")]),
        ("halves of a pair swapped", [(r"(cvt\.rn\.bf16x2\.f32 %r\d+), (%f\d+), (%f\d+)", r"\1, \3, \2")]),
        ("no wait for copies", [(r"cp\.async\.wait_group 0", "cp.async.wait_group 9")]),
        ("no barrier", [(r"bar\.sync\s+0;", "")]),
    ],
    "sm80, 40": [("bytes beyond a row", [(r"(cp\.async\.cg[^;]*), 16, %r\d+;", r"\1, 16;")])],
    "sm90": [
        ("another stride of a descriptor", [(r"\b46116862933\d+", other_stride)]),
        ("B not transposed", [(r"on, 1, 1, 1;", "on, 1, 1, 0;")]),
        ("B transposed", [(r"on, 1, 1, 0, 0;", "on, 1, 1, 0, 1;")]),
        ("operands change places", [(r"\}, (%rd\d+), (%rd\d+), on", r"}, \2, \1, on")]),
        ("no wait for a product", [(r"(wgmma\.wait_group\.sync\.aligned) \d", r"\1 7")]),
        ("no fence of registers", [(r"wgmma\.fence\.sync\.aligned;", "")]),
        ("no fence before the output leaves", [(r"fence\.proxy\.async\.shared::cta;", "")]),
        ("coordinates change places", [(r"(\.4d\.shared[^{]*\{%r\d+, )(%r\d+), (%r\d+)", r"\1\3, \2")]),
        ("a stage is never given back", [(r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "")]),
        ("no wait for a stage", [(r"@!done\S* bra again\S*;", "")]),
        ("the other parity", [(r"(mbarrier\.try_wait\S+ done\S*, \[%r\d+\]), %r\d+", r"\1, 0")]),
        ("more registers than there are", [(r"(setmaxnreg\.inc\S+) \d+", r"\1 248")]),
        ("fewer bytes expected", [(r"(expect_tx\S+ _, \[%r\d+\]), %r\d+", r"\1, 64")]),
        ("barriers the copy engine does not know", [(r"fence\.mbarrier_init\.release\.cluster;", "")]),
    ],
    "sm90 backward, 256": [("dQ leaves too early", [(r"fence\.proxy\.async\.shared::cta;", "")])],
    "sm90 backward, 128": [
        ("no barrier of a warpgroup", [(r"bar\.sync %r\d+, %r\d+;", "")]),
        ("A not transposed", [(r"on, 1, 1, 1, (\d);", r"on, 1, 1, 0, \1;")]),
    ],
    "decode": [("no wait for copies", [(r"cp\.async\.wait_group \d", "cp.async.wait_group 9")])],
    "gather": [
        ("lanes alone", [(r"shfl\.sync\.bfly\.b32\s+(%r\d+)\S+ (%r\d+),[^;]*;", r"mov.b32 \1, \2;")]),
    ],
}  # fmt: skip


def faults() -> list[Any]:
    full = [pytest.mark.full]
    return [
        pytest.param(
            name, changes, id=f"{name}: {what}", marks=[] if name in DEFAULT or name == "sm80, 40" else full
        )
        for name, many in FAULTS.items()
        for what, changes in many
    ]


@pytest.mark.parametrize(("name", "changes"), faults())
def test_planted_faults_are_found(name: str, changes: Changes) -> None:
    """In one of a few schedules."""
    applied: list[Emulated] = []

    def kernels(arch: int, seed: int, deterministic: bool) -> Emulated:
        applied.append(Emulated(arch, seed, deterministic, changes))
        return applied[-1]

    found = functools.partial(ptx_cases.run, ptx_cases.CUDA[name], kernels)
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(4):
            found(seed=seed)
    assert any(any(one.changed) for one in applied), "the PTX has nothing of the kind"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (r"fma\.rn\.f32", "fma.rz.f32", "rz"),
        (r"max\.f32", "max.xorsign.abs.f32", "xorsign"),
        (r"ldmatrix\.sync\.aligned\.m8n8\.x4", "ldmatrix.sync.aligned.m8n16.x4", "m8n16"),
        (r"mov\.u32(\s+%r\d+), %tid\.x", r"mov.u32\1, %clock", "%clock"),
        (r"bar\.sync(\s+)0;", r"bar.red.popc.u32\1%r1, 0, %p1;", "bar.red"),
    ],
)
def test_what_is_not_known_is_named(old: str, new: str, named: str) -> None:
    kernels = functools.partial(Emulated, changes=[(old, new)])
    with pytest.raises(RuntimeError, match=re.escape(named)):
        ptx_cases.run(ptx_cases.CUDA["sm80"], kernels)
