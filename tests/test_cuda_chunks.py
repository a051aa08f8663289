"""Masks of chunks in the CUDA kernels of every body, on the host simulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saccade import Band, Causal, Chunks, Graph, KeyPadding, Window, attention_varlen
from saccade.ops import DECODE, GATHER
from saccade.packed import cache_layout, packed_layout
from saccade.testing import Shape, assert_no_worse_than, derivatives, make_inputs, poisoned, widened
from simulated import needs_compiler
from test_cuda_tiled import check, check_gradients, simulated

pytestmark = needs_compiler

BF16, FP16 = torch.bfloat16, torch.float16


def chunks(size: int, left: int | None = None) -> Chunks:
    return Chunks(size, left, align="end")


MASKS = {
    "blocks": chunks(16, 0),
    "one before": chunks(24, 1),
    "two odd ones before": chunks(37, 2),
    "all before": chunks(50),
    "larger than the keys": chunks(1000),
    "larger than any": chunks(1 << 40, 3),
    "single keys": chunks(1, 9),
    "causal": chunks(32, 1) & Causal(),
    "window": chunks(40, 3) & Window(60, 10),
    "lengths": chunks(24, 1) & KeyPadding(torch.tensor([61])),
}
# A band that leaves out a query's own position: keys at the end of a chunk are no query's.
GAPS = {
    "far back": chunks(16, 0) & Band(30, -5),
    "ahead": chunks(24, 1) & Band(-6, 40),
    "per head": chunks(16, 0) & Band(torch.tensor([5, 70]), torch.tensor([0, -2])),
    "from the start": chunks(16, 0) & Band(30, -5, align="start"),
}
modes = pytest.mark.parametrize("arch", [80, 90, -90])


@modes
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("sizes", [(147, 147), (70, 150), (150, 70)], ids=str)
def test_gradients(sizes: tuple[int, int], mask: Any, arch: int) -> None:
    check_gradients(make_inputs(Shape(1, 2, 1, *sizes, 32, 24), BF16), mask, arch)


@modes
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("mask", [MASKS["two odd ones before"], MASKS["causal"]], ids=["odd", "causal"])
def test_every_size(mask: Any, head_dim: int, arch: int) -> None:
    check_gradients(make_inputs(Shape(1, 2, 1, 140, 140, head_dim, head_dim), FP16), mask, arch)


@pytest.mark.parametrize("mask", GAPS.values(), ids=GAPS)
def test_dead_keys_between_chunks(mask: Any) -> None:
    """NaN in keys that no query of the block keeps reaches nothing; Hopper leaves such masks to sm_80."""
    q, k, v = make_inputs(Shape(1, 2, 2, 90, 90, 64, 64), BF16)
    check_gradients((q, k, v), mask)
    dead = ~mask.materialize(90, 90).reshape(-1, 90, 90).any(1).expand(2, 90)[None]
    assert dead.any()
    bad = (q, poisoned(k, dead), poisoned(v, dead))
    for body in (0, DECODE):
        got, clean = (simulated(80, x, mask, body=body) for x in (bad, (q, k, v)))
        assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
    grads = [derivatives(simulated(80, x, mask), x) for x in (bad, (q, k, v))]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with pytest.raises(RuntimeError, match="does not serve chunks beside a band"):
        simulated(90, (q, k, v), mask)


@modes
def test_dead_keys_outside_chunks(arch: int) -> None:
    """Of the last queries alone: chunks in front of theirs are nobody's."""
    q, k, v = make_inputs(Shape(1, 2, 1, 40, 190, 64, 64), BF16)
    mask = chunks(32, 1)
    dead = ~mask.materialize(40, 190).reshape(-1, 190).any(0).expand(1, 1, 190)
    assert dead.sum() == 96
    bad = (q, poisoned(k, dead), poisoned(v, dead))
    grads = [[*(o := simulated(arch, x, mask)), *derivatives(o, x)] for x in (bad, (q, k, v))]
    assert torch.equal(grads[0][0], grads[1][0])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b) or (arch == 90 and torch.allclose(a, b, rtol=0.02, atol=0.02))


@pytest.mark.parametrize("name", ["dropout", "bias"])
def test_with_terms(name: str) -> None:
    bias = torch.randn(1, 2, 70, 90, generator=torch.Generator().manual_seed(1)).requires_grad_()
    options = {"dropout_p": 0.3, "seed": 11} if name == "dropout" else {"bias": bias}
    check_gradients(make_inputs(Shape(1, 2, 1, 70, 90, 64, 64), BF16), chunks(24, 1), **options)


@modes
def test_packed_sequences(arch: int) -> None:
    lengths = torch.tensor([0, 70, 3, 90])
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    draw = torch.Generator().manual_seed(4)
    inputs = tuple(torch.randn(163, h, 64, generator=draw).to(BF16).requires_grad_() for h in (2, 1, 1))
    found: list[Any] = []
    for x in (inputs, widened(inputs)):
        options = {"mask": Chunks(20, 1), "return_lse": True, "backend": "reference"}
        outputs = attention_varlen(*x, cu, cu, 90, 90, **options)
        found.append([*outputs, *derivatives(outputs, x)])
    layout = packed_layout(*inputs[:2], cu, cu, 90, 90)
    outputs = simulated(arch, inputs, Chunks(20, 1), layout=layout)
    got = [*outputs, *derivatives(outputs, inputs)]
    for name, *values in zip(("out", "lse", "dq", "dk", "dv"), got, *found, strict=True):
        assert_no_worse_than(*values, factor=3.0 if name[0] == "d" else 2.0, name=name)


@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("name", ["one before", "all before", "causal", "window"])
def test_decode(name: str, seqlen_q: int) -> None:
    check(80, make_inputs(Shape(2, 4, 2, seqlen_q, 700, 64, 64), BF16), MASKS[name], body=DECODE)


def test_cache() -> None:
    """Each sequence's chunks are counted from its own first key."""
    q, k, v = (x.detach() for x in make_inputs(Shape(3, 2, 1, 2, 500, 64, 64), BF16))
    lengths = torch.tensor([500, 33, 1])
    out, lse = simulated(
        80, (q, k, v), chunks(32, 2), body=DECODE, layout=cache_layout(q, k, lengths, None, None)
    )
    for b, n in enumerate(lengths.tolist()):
        one = (q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        single = simulated(80, one, chunks(32, 2), body=DECODE)
        torch.testing.assert_close(out[b], single[0][0], rtol=0.01, atol=0.01)
        torch.testing.assert_close(lse[b], single[1][0], rtol=1e-6, atol=1e-6)


def test_of_a_graph() -> None:
    index = torch.randint(0, 90, (2, 400), generator=torch.Generator().manual_seed(1))
    graph = Graph.from_edge_index(index, (90, 90))
    check_gradients(make_inputs(Shape(1, 2, 1, 90, 90, 16, 16), BF16), graph & chunks(20, 1), body=GATHER)
