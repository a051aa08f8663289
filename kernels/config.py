"""Tile shapes as data: one row for each pass, architecture, size of element and head_dim. Nothing is tuned in
a user's call; `saccade.kernels.tune` measures the rows again on the GPU at hand and keeps them in a file.

`measured` says where a row was measured. Rows that no GPU has timed yet were chosen by what the compiler
makes of them: registers, spills and shared memory (tests/test_triton_compiles.py).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

UNMEASURED = "not yet measured"
_SLACK = 4096


@dataclass(frozen=True, slots=True)
class Config:
    """Queries and keys of a tile, columns of q, k and v held at once, warps, stages of the pipeline."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    measured: str = UNMEASURED


# Products that feed a product are laid out by rows, 16 to a warp; warps beyond that compute what others do.
# So tiles have as many rows as warps want (tests/test_triton_compiles.py counts).
#
# Shared memory of a block decides what fits: 227 KB on sm_90, 163 on sm_80, 99 on sm_86, sm_89 and sm_120.
ARCHITECTURES = ("sm80", "sm86", "sm90")
SHARED_BYTES = {"sm80": 166_912, "sm86": 101_376, "sm90": 232_448}
PASSES = ("forward", "backward_q", "backward_kv", "weights", "bias", "decode")
ITEM = 256  # edges of a graph's row that one program takes
DIMS = (16, 32, 64, 128, 256)  # wider heads are split into blocks of the widest

KINDS = ("full", "window")  # of mask: a window is a band with two bounds

Key = tuple[str, str, int, int, str]  # pass, architecture, bytes of an element, head_dim, kind of mask
Shape = tuple[int, int, int, int, int]

_AMPERE: dict[str, dict[int, Shape]] = {
    "forward": {16: (128, 64, 16, 4, 3), 32: (128, 64, 32, 4, 3), 64: (128, 64, 64, 8, 3),
                128: (64, 64, 128, 4, 2), 256: (32, 64, 256, 4, 2)},
    "backward_q": {16: (64, 64, 16, 4, 2), 32: (64, 64, 32, 4, 2), 64: (64, 64, 64, 4, 2),
                   128: (64, 64, 128, 8, 2), 256: (32, 32, 256, 4, 1)},
    "backward_kv": {16: (64, 64, 16, 4, 2), 32: (64, 64, 32, 4, 2), 64: (64, 32, 64, 4, 2),
                    128: (32, 64, 128, 4, 2), 256: (32, 32, 256, 4, 1)},
}  # fmt: skip
_HOPPER: dict[str, dict[int, Shape]] = {
    "forward": {16: (128, 64, 16, 4, 3), 32: (128, 64, 32, 4, 3), 64: (128, 128, 64, 8, 3),
                128: (128, 64, 128, 8, 3), 256: (128, 32, 256, 8, 2)},
    "backward_q": {16: (64, 64, 16, 4, 2), 32: (64, 64, 32, 4, 2), 64: (128, 64, 64, 8, 2),
                   128: (128, 64, 128, 8, 3), 256: (128, 32, 256, 8, 2)},
    "backward_kv": {16: (64, 64, 16, 4, 2), 32: (64, 64, 32, 4, 2), 64: (64, 128, 64, 8, 2),
                    128: (32, 128, 128, 8, 2), 256: (32, 32, 256, 4, 2)},
}  # fmt: skip
# M queries of a window of W keys visit W + M + N of them: smaller tiles throw less away. Rows that differ.
_WINDOWS: dict[str, dict[str, dict[int, Shape]]] = {
    "sm80": {"forward": {16: (64, 64, 16, 4, 3), 32: (64, 64, 32, 4, 3), 64: (64, 64, 64, 4, 3)}},
    "sm90": {"forward": {16: (64, 64, 16, 4, 3), 32: (64, 64, 32, 4, 3), 64: (64, 64, 64, 4, 3),
                         128: (64, 64, 128, 4, 3)},
             "backward_q": {64: (64, 64, 64, 4, 2), 128: (64, 64, 128, 4, 2)},
             "backward_kv": {64: (64, 64, 64, 4, 2)}},
}  # fmt: skip
_WINDOWS["sm86"] = _WINDOWS["sm80"]
# Of decode, by size of element and the widest head_dim they are for: the most rows of a tile, keys, warps,
# stages. All columns of q, k and v are held.
_DECODE: dict[int, dict[int, tuple[int, int, int, int]]] = {
    2: {16: (64, 32, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 4, 3)},
    4: {64: (32, 32, 8, 3), 256: (32, 16, 8, 3)},
    8: {32: (16, 32, 4, 2), 256: (16, 16, 8, 2)},
}


def _table() -> dict[Key, Config]:
    """Every row; one of kind window stands only where it differs from that of a full mask."""
    table: dict[Key, Config] = {}
    for arch, shapes in (("sm80", _AMPERE), ("sm86", _AMPERE), ("sm90", _HOPPER)):
        for kind, rows in (("full", shapes), ("window", _WINDOWS[arch])):
            for name, row in rows.items():
                for dim, shape in row.items():
                    table[name, arch, 2, dim, kind] = Config(*shape)
        for dim in DIMS:
            # Exact fp32 and fp64 products keep more numbers in registers: small tiles, and wide heads in
            # blocks.
            for name in shapes:
                table[name, arch, 4, dim, "full"] = Config(32, 32, min(dim, 32), 8, 1)
                table[name, arch, 8, dim, "full"] = Config(16, 16, 16 if dim <= 32 else 32, 4, 1)
            for name in ("weights", "bias"):
                for size, block in ((2, 64), (4, 32), (8, 16)):
                    table[name, arch, size, dim, "full"] = Config(block, block, min(dim, block), 4, 1)
            for size, by_dim in _DECODE.items():
                m, n, warps, stages = by_dim[min(widest for widest in by_dim if dim <= widest)]
                table["decode", arch, size, dim, "full"] = Config(m, n, dim, warps, stages)
        table["backward_q", arch, 4, 32, "full"] = Config(32, 32, 32, 4, 1)
    # On sm_86 the compiler aims at fewer registers, and these would spill.
    for dim in (16, 32):
        table["decode", "sm86", 4, dim, "full"] = Config(32, 32, dim, 8, 2)
    table["forward", "sm86", 2, 256, "full"] = Config(32, 64, 256, 4, 1)
    table["backward_q", "sm86", 4, 64, "full"] = Config(32, 16, 32, 8, 1)
    for dim in (64, 128, 256):
        table["backward_kv", "sm86", 4, dim, "full"] = Config(32, 32, 32, 4, 1)
    table["backward_q", "sm86", 8, 16, "full"] = Config(16, 16, 16, 8, 1)
    table["bias", "sm86", 8, 64, "full"] = Config(16, 16, 16, 8, 1)
    table["decode", "sm80", 2, 16, "full"] = Config(64, 64, 16, 4, 3)
    table["decode", "sm80", 2, 256, "full"] = Config(64, 32, 256, 8, 3)
    # Here it is shared memory that decode has less of.
    table["decode", "sm86", 2, 128, "full"] = Config(64, 64, 128, 4, 2)
    table["decode", "sm86", 2, 256, "full"] = Config(32, 32, 256, 4, 2)
    table["decode", "sm86", 4, 256, "full"] = Config(16, 16, 256, 8, 2)
    return table


TABLE = _table()
_override: list[dict[str, Config]] = []


@contextlib.contextmanager
def override(configs: dict[str, Config]) -> Iterator[None]:
    """Inside, these passes take these tiles: for tests, and for measuring."""
    _override.append(configs)
    try:
        yield
    finally:
        _override.pop()


def width(dim: int) -> int:
    """The least table width that holds `dim` columns, or the widest."""
    return next((w for w in DIMS if dim <= w), DIMS[-1])


def architecture(capability: tuple[int, int]) -> str:
    """The table's column for a compute capability: the one with no more shared memory than it has."""
    major, minor = capability
    if (major, minor) == (8, 0):
        return "sm80"
    return "sm90" if major in (9, 10) else "sm86"


def this_gpu() -> tuple[str, str]:
    """Name and architecture of the current GPU."""
    return torch.cuda.get_device_name(), architecture(torch.cuda.get_device_capability())


def cache_file(gpu: str) -> Path:
    """Where `tune` keeps the rows of a GPU."""
    home = os.environ.get("SACCADE_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "saccade" / f"tiles-{re.sub('[^A-Za-z0-9]+', '-', gpu)}.json"


def load(path: Path) -> None:
    """Take the rows of a file that `tune` wrote in place of the table's."""
    for row in json.loads(path.read_text()):
        name, arch, size, dim, kind = row["key"]
        TABLE[name, arch, size, dim, kind] = Config(**row["config"])


@functools.lru_cache(maxsize=1)
def _load_tuned() -> None:
    if torch.cuda.is_available() and cache_file(torch.cuda.get_device_name()).is_file():
        load(cache_file(torch.cuda.get_device_name()))


def fitted(shape: Config, name: str, arch: str, size: int, pair: int) -> Config:
    """`shape` with as many stages as leave room for more than the table's own call needs: tiles of `pair`
    bytes for each of their pairs (biases, which the pipeline copies too; what dropout rearranges), and a
    little. `size`: bytes of an element of q.
    """
    m, n = shape.block_m, shape.block_n
    held, streamed = {"backward_q": (2 * m, n), "backward_kv": (2 * n, m)}.get(name, (m, n))
    row = shape.block_d * size

    def needs(stages: int) -> int:
        return held * row + stages * 2 * streamed * row + max(stages - 1, 1) * m * n * pair + _SLACK

    stages = shape.num_stages
    while stages > 1 and needs(stages) > SHARED_BYTES[arch]:
        stages -= 1
    return replace(shape, num_stages=stages)


def pick(name: str, arch: str, size: int, dim: int, kind: str = "full", load: str = "") -> Config:
    """The tile shape of a pass for elements of `size` bytes, heads of `dim` columns, a kind of mask, and what
    the call does beside the table's for each pair: nothing, "mask", "terms" or "scores".
    """
    if _override and name in _override[-1]:
        return _override[-1][name]
    _load_tuned()
    full = TABLE[name, arch, size, width(dim), "full"]
    found = TABLE.get((name, arch, size, width(dim), kind), full)
    return lighter(found, name, load) if load and name != "decode" else found


def lighter(shape: Config, name: str, load: str) -> Config:
    """`shape` for a call with terms of its own for each pair (biases, softcap, dropout), or with scores that
    are no product: those take registers too, which tiles of more than 64 x 64 do not leave. Masks beyond a
    band take as many only beside the two sums of the keys' pass.

    Two calls at head_dim 128 still keep numbers in local memory, 32 and 40 bytes in that pass on sm_90:
    packed sequences with a bias by distance and dropout, and a dense fp32 bias with dropout. Of 255 registers
    dK and dV take 64, and scores, dP, weights and gradients 16 each, as both groups of warps hold the same 64
    keys.
    """
    wide = shape.block_d >= 128
    if name in ("weights", "bias"):
        return replace(shape, num_warps=8) if shape.block_m >= 64 else shape
    if shape.block_m < 64 and not wide:
        return shape
    if name == "backward_kv" and wide:
        return replace(shape, block_m=32, block_n=min(shape.block_n, 64), num_warps=8)
    if shape.block_m < 64:
        return replace(shape, block_n=32, num_warps=8)
    sums = name == "backward_kv" and min(shape.block_n, shape.block_d) >= 64
    if load == "mask":
        if name == "backward_q" and wide:
            return replace(shape, num_warps=8)
        return replace(shape, block_m=32) if sums else shape
    streamed = 32 if shape.block_d >= 128 else 64
    narrow = {"forward": False, "backward_q": shape.block_d > 128, "backward_kv": True}[name]
    m = 32 if sums and load == "terms" else min(shape.block_m, streamed if narrow else 64)
    n = min(shape.block_n, streamed if name == "forward" else 64)
    few = name == "forward" and load == "terms" and shape.block_d <= 128
    return replace(shape, block_m=m, block_n=n, num_warps=4 if few else 8)
