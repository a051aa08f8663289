"""Every row of the tile tables, compiled for GPUs that are not here: it fits, and nothing spills."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

REGISTERS = 255
SIZES = {2: "bf16", 4: "fp32", 8: "fp64"}


@functools.lru_cache
def compiled(*arguments: str) -> list[dict[str, Any]]:
    """The kernels that triton_ahead.py makes of its arguments, in a process without the interpreter."""
    program = Path(__file__).with_name("triton_ahead.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", SIZES, ids=SIZES.get)
@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90"])
def test_every_row_fits_and_none_spills(arch: str, size: int) -> None:
    from saccade.kernels import config

    found = compiled(arch, str(size))
    rows = {tuple(k["key"]) for k in found}
    assert rows == {key for key in config.TABLE if key[1:3] == (arch, size)}
    for kernel in found:
        assert kernel["stack"] == 0, kernel
        assert kernel["registers"] <= REGISTERS, kernel
    assert_fits(found, arch)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("arch", "dim"), [
    ("sm90", 64), *(pytest.param(a, d, marks=pytest.mark.full) for a, d in
                    (("sm80", 64), ("sm80", 256), ("sm86", 64), ("sm86", 128), ("sm86", 256), ("sm90", 256))),
])  # fmt: skip
def test_every_variant_compiles(arch: str, dim: int) -> None:
    """The interpreter runs what the compiler may refuse."""
    found = compiled("variants", arch, str(dim))
    assert len({k["variant"] for k in found}) == 22
    assert {k["kernel"] for k in found} >= {
        "tiled_forward", "tiled_backward_q", "tiled_backward_kv", "row_statistics", "attention_weights",
        "dense_bias_gradient", "relative_bias_gradient", "query_bias_gradient", "decode_split",
        "merge_splits", "gather_forward", "merge_rows", "gather_backward_rows", "gather_backward_keys",
        "gather_backward_edges", "sum_pieces",
    }  # fmt: skip
    assert_fits(found, arch)


def test_what_takes_most_shared_memory_fits_where_there_is_least() -> None:
    """The pipeline copies tiles of biases too."""
    assert_fits(compiled("variants", "sm86", "64", "wide bias", "relative", "by query"), "sm86")
    assert_fits(compiled("variants", "sm86", "256", "wide bias", "pages"), "sm86")


def assert_fits(kernels: list[dict[str, Any]], arch: str) -> None:
    from saccade.kernels import config

    assert kernels
    for kernel in kernels:
        assert kernel["shared"] <= config.SHARED_BYTES[arch], kernel


def test_matrix_instructions_are_the_ones_meant() -> None:
    for arch, by_rows in (("sm80", ["HMMA"] * 3), ("sm90", ["HMMA", "HMMA", "HGMMA"])):  # of 16, 32, 64 rows
        found = [k for k in compiled(arch, "2", "128", "decode", "sass") if k["kernel"] == "decode_split"]
        for kernel, name in zip(found, by_rows, strict=True):
            assert kernel["instructions"][name] > 0, kernel
            assert kernel["instructions"]["LDGSTS"] > 0, kernel
    for arch, wanted in (("sm80", "HMMA"), ("sm90", "HGMMA")):
        for kernel in compiled(arch, "2", "128", "forward", "backward_q", "sass"):
            if kernel["kernel"].startswith("tiled"):
                assert kernel["instructions"][wanted] > 0, kernel
                assert kernel["instructions"]["LDGSTS"] > 0, kernel  # the pipeline copies while it computes
