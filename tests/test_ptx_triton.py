"""What Triton compiles, run in an emulator of PTX (ptx_machine.py) on host memory: results against the
yardstick, and faults planted in the PTX that must be found.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from test_triton_compiles import told

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

CASES = [
    "plain", "wide", "wide, many tiles", "widest", "single", "gradients", "padding", "dropout", "chunks",
    "bias", "keep", "positions", "scores", "tiles", "decode", "gather", "gather single",
]  # fmt: skip
DEFAULT = {"sm80": ["plain", "chunks"], "sm90": ["gradients", "decode"]}


def emulated(arch: str, *arguments: str) -> list[dict[str, Any]]:
    return told("ptx_triton.py", arch, *arguments)


@pytest.mark.parametrize("arch", DEFAULT)
def test_results(arch: str) -> None:
    found = emulated(arch, *DEFAULT[arch])
    assert [one["case"] for one in found] == DEFAULT[arch]
    for one in found:
        assert one["kernels"] and not one["wrong"], one


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", DEFAULT)
def test_all_results(arch: str) -> None:
    found = emulated(arch, *CASES)
    for one in found:
        assert one["kernels"] and not one["wrong"], one
    assert {name for one in found for name in one["kernels"]} == {
        "tiled_forward", "row_statistics", "tiled_backward_q", "tiled_backward_kv", "dense_bias_gradient",
        "decode_split", "merge_splits", "gather_forward", "gather_backward_rows", "gather_backward_keys",
        "gather_backward_edges",
    }  # fmt: skip


FAULTS = {
    "sm80": [
        (r"(mma\.sync[^{]*\{[^}]*\}, \{ *)(%r\d+), (%r\d+)", r"\1\3, \2"),
        (r"cp\.async\.wait_group\s+\d", "cp.async.wait_group 9"),
        (r"bar\.sync\s+0;", ""),
    ],
    "sm90": [
        (r"wgmma\.wait_group\.sync\.aligned \d", "wgmma.wait_group.sync.aligned 7"),
        (r"fence\.proxy\.async\.shared::cta;", ""),
        (r"(%p\d+, 1, 1), 1;", r"\1, 0;"),
        (r"bar\.sync\s+0;", ""),
    ],
}


@pytest.mark.parametrize("arch", FAULTS)
def test_planted_faults_are_found(arch: str) -> None:
    words = [word for old, new in FAULTS[arch] for word in ("--change", old, new)]
    found = emulated(arch, "plain", *words)
    assert len(found) == len(FAULTS[arch])
    for one in found:
        assert one["wrong"], one
