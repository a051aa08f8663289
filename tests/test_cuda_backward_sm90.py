"""Hopper's backward on the host simulator: head_dim 256, where two warpgroups share their keys; softcap and
bounds per head at every size. The rest is in test_cuda_tiled.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saccade import Band, Causal, KeyPadding, Window, attention_varlen
from saccade.packed import packed_layout
from saccade.testing import Shape, assert_no_worse_than, derivatives, make_inputs, poisoned, widened
from simulated import needs_compiler
from test_cuda_tiled import check_gradients, simulated

pytestmark = needs_compiler

BF16, FP16 = torch.bfloat16, torch.float16
PER_HEAD = Band(torch.tensor([5, 70]), torch.tensor([0, 70]))
MASKS = {
    "dense": None,
    "causal": Causal(),
    "window": Window(20, 3),
    "band beyond the keys": Band(-10, 12),
    "lengths": KeyPadding(torch.tensor([61])) & Causal(align="start"),
    "no key": KeyPadding(torch.tensor([0])),
    "per head": PER_HEAD,
}

modes = pytest.mark.parametrize("arch", [90, -90])
sizes = pytest.mark.parametrize("head_dim", [64, 128, 256])


def gradients(arch: int, inputs: Any, mask: Any = None, schedule: int = 0, **options: Any) -> Any:
    return derivatives(simulated(arch, inputs, mask, schedule, **options), inputs)


@modes
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks(mask: Any, arch: int) -> None:
    check_gradients(make_inputs(Shape(1, 2, 1, 77, 131, 256, 136), BF16), mask, arch)


@modes
@pytest.mark.parametrize(
    "shape", [Shape(2, 2, 2, 129, 63, 136, 256), Shape(1, 3, 1, 67, 129, 200, 200)], ids=str
)
def test_shapes(shape: Shape, arch: int) -> None:
    check_gradients(make_inputs(shape, FP16, "bshd"), Causal(), arch)


@modes
@sizes
@pytest.mark.parametrize("mask", [Causal(), PER_HEAD], ids=["causal", "per head"])
def test_softcap(mask: Any, head_dim: int, arch: int) -> None:
    shape = Shape(1, 2, 1, 70, 90, head_dim, head_dim)
    check_gradients(make_inputs(shape, BF16), mask, arch, softcap=0.8, activation="softmax1")


@sizes
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"mask": PER_HEAD}], ids=str)
def test_the_call_is_hoppers_own(options: dict[str, Any], head_dim: int) -> None:
    """The kernels of sm_80, to which it would fall, add up in another order."""
    inputs = make_inputs(Shape(1, 2, 1, 70, 90, head_dim, head_dim), BF16)
    own, other = gradients(-90, inputs, **options), gradients(80, inputs, **options)
    assert not torch.equal(own[1], other[1])


@pytest.mark.parametrize("head_dim", [128, 256])
def test_any_schedule(head_dim: int) -> None:
    """The deterministic mode repeats bitwise whatever runs first; of the fast mode dK and dV do."""
    inputs = make_inputs(Shape(1, 2, 1, 140, 200, head_dim, head_dim), BF16)
    exact = gradients(-90, inputs, Causal())
    for schedule in range(1, 4):
        for a, b in zip(gradients(-90, inputs, Causal(), schedule), exact, strict=True):
            assert torch.equal(a, b)
        dq, *others = gradients(90, inputs, Causal(), schedule)
        for a, b in zip(others, exact[1:], strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(dq, exact[0], rtol=0.02, atol=0.02)


@modes
@pytest.mark.parametrize("mask", [Window(6, 0), KeyPadding(torch.tensor([77])), PER_HEAD & Window(6, 0)])
def test_dead_keys_are_never_read(mask: Any, arch: int) -> None:
    """NaN in keys that no query of any head keeps reaches nothing."""
    q, k, v = make_inputs(Shape(1, 2, 1, 70, 90, 256, 256), BF16)
    dead = ~mask.materialize(70, 90).reshape(-1, 90).any(0).expand(1, 1, 90)
    assert dead.any()
    bad, good = (q, poisoned(k, dead), poisoned(v, dead)), (q, k, v)
    for a, b in zip(gradients(arch, bad, mask), gradients(arch, good, mask), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=0, atol=0 if arch < 0 else 0.02)


def packed(lengths_q: list[int], lengths_k: list[int], head_dim: int) -> tuple[Any, tuple[Any, ...]]:
    """q, k, v of packed sequences, and where they lie, as attention_varlen takes it."""
    ends = [torch.tensor([0, *n]).cumsum(0) for n in (lengths_q, lengths_k)]
    draw = torch.Generator().manual_seed(4)
    shapes = [(sum(n), h, head_dim) for n, h in ((lengths_q, 2), (lengths_k, 1), (lengths_k, 1))]
    inputs = tuple(torch.randn(shape, generator=draw).to(BF16).requires_grad_() for shape in shapes)
    return inputs, (*ends, max(lengths_q), max(lengths_k))


@modes
def test_varlen(arch: int) -> None:
    inputs, at = packed([0, 70, 3, 40], [5, 90, 0, 64], 256)
    found: list[Any] = []
    for wide in (inputs, widened(inputs)):
        outputs = attention_varlen(*wide, *at, causal=True, return_lse=True, backend="reference")
        found.append(derivatives(outputs, wide))
    got = gradients(arch, inputs, causal=True, layout=packed_layout(*inputs[:2], *at))
    for name, *values in zip(("dq", "dk", "dv"), got, *found, strict=True):
        assert_no_worse_than(*values, factor=3.0, name=name)


@modes
@sizes
def test_the_next_sequence_is_never_read(head_dim: int, arch: int) -> None:
    """NaN in the queries of a sequence stays there."""
    inputs, at = packed([37, 50], [40, 50], head_dim)
    layout = packed_layout(*inputs[:2], *at)
    bad = inputs[0].detach().clone()
    bad[37:] = torch.nan
    bad = (bad.requires_grad_(), *inputs[1:])
    for a, b, end in zip(
        gradients(arch, bad, layout=layout), gradients(arch, inputs, layout=layout), (37, 40, 40), strict=True
    ):
        assert torch.equal(a[:end], b[:end])
        assert a[end:].isnan().any()


@modes
@pytest.mark.parametrize("lengths", [([3, 40], [0, 0]), ([0, 0], [3, 40])], ids=["no keys", "no queries"])
def test_nothing_is_there_where_max_seqlen_promises_some(lengths: tuple[list[int], ...], arch: int) -> None:
    """TMA cannot describe a tensor without rows."""
    inputs, (*cu, _, _) = packed(*lengths, 64)
    got = simulated(arch, inputs, layout=packed_layout(*inputs[:2], *cu, 64, 64), return_lse=True)
    assert not got[0].any() and got[1].eq(-torch.inf).all()
    assert all(not x.any() for x in derivatives(got[0], inputs))
