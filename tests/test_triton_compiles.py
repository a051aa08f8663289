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
from triton_wgmma import hazards

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

REGISTERS = 255
# Bytes of local memory that a variant may take all the same, at most: see `config.lighter`.
SPILLS = {
    (128, "wide bias", "tiled_backward_kv"): 40,
    (128, "packed", "tiled_backward_kv"): 32,
    (128, "packed by query", "tiled_backward_q"): 8,
    (64, "packed", "relative_bias_gradient"): 64,
    (64, "graph", "tiled_backward_kv"): 16,
}
SIZES = {2: "bf16", 4: "fp32", 8: "fp64"}


@functools.lru_cache
def compiled(*arguments: str) -> list[dict[str, Any]]:
    """The kernels that triton_ahead.py makes of its arguments."""
    return told("triton_ahead.py", *arguments)


def told(program: str, *arguments: str) -> list[Any]:
    """The JSON lines that a program prints, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", SIZES, ids=SIZES.get)
@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90"])
def test_every_row_fits_and_none_spills(arch: str, size: int) -> None:
    from saccade.kernels import config

    found = compiled(arch, str(size), "sass")
    rows = {tuple(k["key"]) for k in found}
    assert rows == {key for key in config.TABLE if key[1:3] == (arch, size)}
    for kernel in found:
        assert kernel["stack"] == 0, kernel
        assert kernel["registers"] <= REGISTERS, kernel
        if "computed" in kernel:  # by no two warps the same
            name, *_, kind = kernel["key"]
            loops = 3 if kind == "window" and name != "backward_kv" else 2
            assert kernel["computed"] == loops, kernel
    assert_fits(found, arch)
    assert_products_overlap(found)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("arch", "dim"), [
    ("sm90", 64), *(pytest.param(a, d, marks=pytest.mark.full) for a, d in
                    (("sm80", 64), ("sm80", 256), ("sm86", 64), ("sm86", 128), ("sm86", 256), ("sm90", 128),
                     ("sm90", 256))),
])  # fmt: skip
def test_every_variant_compiles(arch: str, dim: int) -> None:
    """The interpreter runs what the compiler may refuse."""
    found = compiled("variants", arch, str(dim))
    assert len({k["variant"] for k in found}) == 23
    assert {k["kernel"] for k in found} >= {
        "tiled_forward", "tiled_backward_q", "tiled_backward_kv", "row_statistics", "attention_weights",
        "dense_bias_gradient", "relative_bias_gradient", "query_bias_gradient", "decode_split",
        "merge_splits", "gather_forward", "merge_rows", "gather_backward_rows", "gather_backward_keys",
        "gather_backward_edges", "sum_pieces",
    }  # fmt: skip
    assert_fits(found, arch)
    assert_products_overlap(found)
    if arch == "sm90" and dim <= 128:
        assert_registers_suffice(found, dim)


def test_what_takes_most_registers_has_enough() -> None:
    """At head_dim 128, where each of these once kept tens to hundreds of bytes in local memory."""
    names = ("bias", "relative", "additive", "extra", "bounds", "joint features")
    assert_registers_suffice(compiled("variants", "sm90", "128", *names), 128)


def test_new_lengths_compile_nothing() -> None:
    """Beside decode in one split and in several, which are two kernels. (The strides of a dense bias are
    compiled in: they decide how it is read.)
    """
    (counts,) = told("triton_lengths.py")
    assert set(counts) == {"plain", "padding", "cache"}
    for case, kernels in counts.items():
        assert kernels.pop("decode_split", 4) == 4  # each with a beam and with pages
        assert kernels.pop("merge_splits", 1) == 1
        assert kernels.pop("row_statistics", 2) == 2  # of the backward pass, and for weights
        assert set(kernels.values()) <= {1}, (case, kernels)


def test_what_takes_most_shared_memory_fits_where_there_is_least() -> None:
    """The pipeline copies tiles of biases too."""
    assert_fits(compiled("variants", "sm86", "64", "wide bias", "relative", "by query"), "sm86")
    assert_fits(compiled("variants", "sm86", "256", "wide bias", "pages"), "sm86")


def assert_registers_suffice(kernels: list[dict[str, Any]], dim: int) -> None:
    """None spills for want of registers. With some to spare ptxas may still give up a few, so that more
    programs run at a time.
    """
    for kernel in kernels:
        allowed = SPILLS.get((dim, kernel["variant"], kernel["kernel"]), 0)
        if kernel["registers"] <= 168:  # of which an SM has enough for twelve warps
            allowed = 32
        assert kernel["stack"] <= allowed, kernel


def assert_fits(kernels: list[dict[str, Any]], arch: str) -> None:
    from saccade.kernels import config

    assert kernels
    for kernel in kernels:
        assert kernel["shared"] <= config.SHARED_BYTES[arch], kernel


def assert_products_overlap(kernels: list[dict[str, Any]]) -> None:
    """A product of Hopper's is several wgmma one after the other, and one wait: ptxas puts a wait after each
    where it cannot prove that registers stay as they are. And they do stay.
    """
    for kernel in kernels:
        count = kernel.get("instructions", {"HGMMA": 0})
        if count["HGMMA"] and kernel["kernel"].startswith(("tiled", "decode")):
            assert count["WARPGROUP.DEPBAR"] < count["HGMMA"], kernel
        assert not kernel.get("hazards"), kernel


@pytest.mark.parametrize(("between", "found"), [
    ("MOV R121, RZ", 1), ("IMAD.WIDE R118, R2, R3, R4", 0), ("LDS.128 R117, [R2]", 1),
    ("FADD R30, R1, R1", 1), ("STS.128 [R120], R24", 0), ("@P1 FMUL R88, R1, R1", 0),
])  # fmt: skip
def test_registers_that_change_too_early_are_found(between: str, found: int) -> None:
    """Of a product that is under way where a loop begins anew."""
    sass = f"""
    /*0000*/ MOV R120, RZ ;
.L_x_1:
    /*0010*/ {between} ;
    /*0020*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*0030*/ MOV R120, R88 ;
    /*0040*/ HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24, gsb0 ;
    /*0050*/ @!P2 BRA `(.L_x_1) ;
    /*0060*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*0070*/ EXIT ;
"""
    assert len(hazards(sass)) == found


def test_pages_are_copied_while_the_tile_before_is_computed() -> None:
    """Where a key lies is read a stage before the key: two tiles of keys and of values are under way."""
    found = [k for k in compiled("variants", "sm90", "64", "pages") if k["kernel"] == "decode_split"]
    assert len(found) == 2 and all(k["shared"] >= 2 * 2 * 64 * 64 * 2 for k in found)


def test_matrix_instructions_are_the_ones_meant() -> None:
    for arch, by_rows in (("sm80", ["HMMA"] * 3), ("sm90", ["HMMA", "HMMA", "HGMMA"])):  # of 16, 32, 64 rows
        found = [k for k in compiled(arch, "2", "128", "decode", "sass") if k["kernel"] == "decode_split"]
        for kernel, name in zip(found, [n for n in by_rows for _ in range(2)], strict=True):
            assert kernel["instructions"][name] > 0, kernel
            assert kernel["instructions"]["LDGSTS"] > 0, kernel
    for arch, wanted in (("sm80", "HMMA"), ("sm90", "HGMMA")):
        for kernel in compiled(arch, "2", "128", "forward", "backward_q", "sass"):
            if kernel["kernel"].startswith("tiled"):
                assert kernel["instructions"][wanted] > 0, kernel
                assert kernel["instructions"]["LDGSTS"] > 0, kernel  # the pipeline copies while it computes
