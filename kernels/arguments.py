"""What no kernel is compiled for: numbers that change from call to call. Of other integers Triton compiles 1
and whether 16 divides in, so that rows are read 16 bytes at a time; a kernel for each length would be many.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Names of arguments: lengths, bounds and counts.
RUNTIME = [
    "seqlen_q", "seqlen_k", "left_end", "right_end", "left_start", "right_start", "rel_size", "blocks",
    "splits", "batch", "columns", "items", "slots", "cut", "count", "span",
]  # fmt: skip


def runtime(n: int) -> int:
    """A number inside of a tuple that no kernel is to be compiled for, as a stride that follows from a
    length: there Triton compiles in 1 and whether 16 divides, whatever `do_not_specialize` says, and this is
    neither.
    """
    return 2 * n + 3


@triton.jit
def plain(n):
    """The n of `runtime`, as int64."""
    return (tl.cast(n, tl.int64) - 3) >> 1
