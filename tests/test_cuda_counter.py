"""Hopper's forward kernel on the host simulator with the counter by which blocks take items as they come
free: the same numbers as in turns, whatever the mask.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from saccade import Causal, KeyPadding, Window
from saccade.packed import packed_layout
from saccade.testing import Shape, make_inputs
from simulated import Simulated, needs_compiler
from test_cuda_tiled import simulated

pytestmark = needs_compiler

MASKS = {
    "causal": Causal(),
    "window": Window(20, 3),
    "lengths": KeyPadding(torch.tensor([61, 200])),
    "dense": None,  # takes turns all the same
}


class Counted(Simulated):
    """Calls the kernel with a counter that is not yet zero."""

    taken = 0

    def call(self, name: str, p: Any, seed: Any, *more: Any) -> None:
        if name == "saccade_cuda_forward_sm90":
            counter = torch.full((1,), 77, dtype=torch.int32)
            self.share(counter)
            super().call(f"{name}_counted", p, seed, *more, ctypes.c_void_p(counter.data_ptr()))
            Counted.taken = int(counter)
            return
        super().call(name, p, seed, *more)


@pytest.mark.parametrize("schedule", range(2))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_same_numbers(mask: str, head_dim: int, schedule: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Shape(2, 3, 1, 201, 230, head_dim, head_dim), torch.bfloat16)
    want = simulated(90, inputs, MASKS[mask], schedule, return_lse=True)
    monkeypatch.setattr("test_cuda_tiled.Simulated", Counted)
    got = simulated(90, inputs, MASKS[mask], schedule, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    items = 2 * 3 * -(-201 // (192 if head_dim == 64 else 128))
    assert Counted.taken == (77 if mask == "dense" else items)  # of each block the last is beyond the end


def test_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([0, 70, 70, 300, 301])
    q, k, v = (torch.randn(301, 2, 128, dtype=torch.bfloat16) for _ in range(3))
    layout = packed_layout(q, k, ends, ends, 230, 230)
    want = simulated(90, (q, k, v), causal=True, layout=layout)[0]
    monkeypatch.setattr("test_cuda_tiled.Simulated", Counted)
    assert torch.equal(simulated(90, (q, k, v), causal=True, layout=layout)[0], want)
