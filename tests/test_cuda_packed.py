"""Packed sequences as a GPU gets them: nobody has read where they end before the kernels do."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade import ops_triton, packed
from saccade.autograd import attend
from saccade.problem import Problem
from saccade.testing import derivatives
from simulated import Simulated, needs_compiler
from torch import Tensor

pytestmark = needs_compiler

TRITON = "triton" in saccade.backends() and ops_triton.INTERPRETED
KERNELS = [
    80, 90, -90, pytest.param(0, marks=pytest.mark.skipif(not TRITON, reason="triton is not interpreted")),
]  # fmt: skip
on_kernels = pytest.mark.parametrize("arch", KERNELS, ids=["sm80", "sm90", "sm90 repeatable", "triton"])


def run(arch: int, ends: list[int], longest: int, **options: Any) -> list[Tensor]:
    """Output, lse and gradients of 40 rows."""
    draw = torch.Generator().manual_seed(4)
    sizes = ((40, h, 16) for h in (2, 1, 1))
    inputs = [torch.randn(size, generator=draw).bfloat16().requires_grad_() for size in sizes]
    cu = torch.tensor(ends)
    layout = packed.packed_layout(*inputs[:2], cu, cu, longest, longest)
    kernels: Any = Simulated(abs(arch), deterministic=arch != 90) if arch else ops_triton
    out, lse = attend(Problem.of(*inputs, causal=True, layout=layout, **options), 0, kernels)
    return [out, lse.T, *derivatives(out, inputs)]


@on_kernels
@pytest.mark.parametrize(
    ("ends", "rows"), [([-9, 20, 60], [0, 20, 40]), ([30, 10, 1 << 40], [0, 10, 40])], ids=str
)
def test_rows_that_are_not_there(
    arch: int, ends: list[int], rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither read nor written; what is inside is right. Of the second the first sequence is empty."""
    monkeypatch.setattr(packed, "_readable", lambda x: False)
    first = 0 if ends[0] < 0 else rows[1]
    for a, b in zip(run(arch, ends, 64), run(arch, rows, 64), strict=True):
        assert torch.equal(a[first:], b[first:])


@pytest.mark.parametrize("arch", [KERNELS[0], KERNELS[-1]], ids=["sm80", "triton"])
@pytest.mark.parametrize("position", ["distance", "query"])
def test_longer_than_promised(arch: int, position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative bias has numbers for no more distances."""
    if position == "query" and arch:
        pytest.skip("triton's")
    monkeypatch.setattr(packed, "_readable", lambda x: False)
    terms: Any = {
        "distance": saccade.ALiBi(torch.tensor([0.5, -0.1])),
        "query": saccade.Shaw(torch.linspace(-1, 1, 9 * 16).view(9, 16)),
    }
    for ends in ([0, 20, 60], [-9, 60, 70]):
        run(arch, ends, 16, position=terms[position])
