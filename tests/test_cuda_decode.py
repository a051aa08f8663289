"""The CUDA kernels of the decode body, run on the host simulator, against the yardstick."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saccade import ALiBi, Band, Causal, KeyPadding, Segments, Window
from saccade.autograd import attend
from saccade.ops import DECODE
from saccade.packed import cache_layout
from saccade.problem import Problem
from saccade.testing import (
    ORDERS,
    Shape,
    assert_no_worse_than,
    make_inputs,
    pairwise,
    plain_attention,
    poisoned,
    widened,
)
from simulated import Simulated, needs_compiler
from test_cuda_tiled import check, check_gradients, simulated
from torch import Tensor

pytestmark = needs_compiler

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DRAW = torch.Generator().manual_seed(1)
KEEP = torch.rand(2, 300, generator=DRAW) < 0.7
IDS = torch.sort(torch.randint(0, 3, (2, 300), generator=DRAW)).values

MASKS = {
    "dense": None,
    "causal": Causal(),
    "window": Window(150, 0),
    "per head": Band(torch.tensor([5, 290, 0, 40]), torch.tensor([0, 2, 0, -20])),
    "lengths": KeyPadding(torch.tensor([61, 0])) & Causal(),
    "keep": KeyPadding(KEEP),
    "segments": Segments(IDS[:, -3:].clone(), IDS),
}
TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "negative scale": {"scale": -0.3},
    "sink": {"sink": torch.tensor([0.5, -2.0, 0.0, 4.0])},
    "softmax1": {"activation": "softmax1"},
    "dropout": {"dropout_p": 0.3, "seed": 11},
    "bias": {"bias": torch.randn(2, 4, 3, 300, generator=DRAW)},
    "hiding bias": {"bias": torch.where(torch.rand(300, generator=DRAW) < 0.5, -torch.inf, 0.0)},
}
CASES = pairwise(
    {
        "mask": list(MASKS),
        "terms": list(TERMS),
        "heads_k": [1, 2, 4],
        "dims": [(32, 24), (64, 64), (128, 96), (40, 256)],
        "dtype": [BF16, FP16, FP32],
    }
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_options(case: dict[str, Any]) -> None:
    inputs = make_inputs(Shape(2, 4, case["heads_k"], 3, 300, *case["dims"]), case["dtype"])
    check(80, inputs, MASKS[case["mask"]], body=DECODE, **TERMS[case["terms"]])


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 1, 1, 1, 1, 64, 64),
        Shape(1, 1, 1, 1, 0, 64, 64),
        Shape(2, 2, 2, 0, 20, 64, 64),
        Shape(1, 24, 1, 1, 70, 64, 64),  # more rows than a tile has
        Shape(1, 3, 1, 11, 530, 7, 5),
        Shape(1, 2, 2, 1, 1100, 128, 128),  # five splits
        Shape(3, 2, 1, 1, 700, 256, 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_shapes(shape: Shape, dtype: torch.dtype) -> None:
    check(80, make_inputs(shape, dtype), Causal(), body=DECODE)


@pytest.mark.parametrize("order", ORDERS)
def test_layouts(order: str) -> None:
    for dtype in (FP16, FP32):
        check(80, make_inputs(Shape(2, 2, 1, 2, 300, 32, 32), dtype, order), body=DECODE)


@pytest.mark.parametrize("schedule", range(4))
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_any_schedule(schedule: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(Shape(1, 2, 1, 2, 600, 64, 64), dtype)
    check(80, inputs, Causal(), schedule, DECODE)
    twice = [simulated(80, inputs, Causal(), s, DECODE) for s in (schedule, 9)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


def test_gradients_follow() -> None:
    """A learned query over many keys: forward here, backward by the tiled kernels."""
    check_gradients(make_inputs(Shape(2, 2, 1, 1, 300, 64, 64), BF16), MASKS["keep"], body=DECODE)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", ["keep", "per head"])
def test_dead_keys_are_never_read(name: str, dtype: torch.dtype) -> None:
    """NaN in keys and values that no query of their head keeps reaches nothing."""
    q, k, v = make_inputs(Shape(2, 4, 1, 3, 300, 64, 64), dtype)
    dead = torch.zeros(2, 1, 300, dtype=torch.bool)
    mask: Any = KeyPadding(KEEP)
    if name == "keep":
        dead[:, 0] = ~KEEP
    else:
        mask = Band(torch.tensor([5, 290, 200, 40]), torch.tensor([0, -270, -180, 2]))
        dead[..., 32:90] = True  # between the bands of two heads
        assert not mask.materialize(3, 300)[..., 32:90].any()
    got = simulated(80, (q, poisoned(k, dead), poisoned(v, dead)), mask, body=DECODE)
    for a, b in zip(got, simulated(80, (q, k, v), mask, body=DECODE), strict=True):
        assert torch.equal(a, b)


# ---- caches ----


def cached(
    kind: str, k: Tensor, v: Tensor, lengths: Tensor
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """The caches that hold keys and values [B, Hk, S, D], and what says where: NaN and absurd numbers
    wherever nothing is in use.
    """
    batch, _, capacity, _ = k.shape
    unused = torch.arange(capacity) >= lengths[:, None]
    size = 20
    if kind == "contiguous":
        dead = unused[:, None]
        return (poisoned(k, dead).detach(), poisoned(v, dead).detach()), {}
    if kind == "beam":
        order = torch.rand(batch, capacity, generator=DRAW).argsort(0)  # a permutation of the rows by column
        at = order[:, None, :, None]
        caches = [torch.full_like(x, torch.nan).scatter_(0, at.expand_as(x), x) for x in (k, v)]
        return (caches[0], caches[1]), {"beam": order.int().masked_fill(unused, 2147480000)}
    pages = capacity // size
    table = torch.randperm(batch * pages + 3, generator=DRAW)[: batch * pages].view(batch, pages)
    caches = [torch.full((batch * pages + 3, x.shape[1], size, x.shape[3]), torch.nan) for x in (k, v)]
    caches = [cache.to(k.dtype) for cache in caches]
    for cache, x in zip(caches, (k, v), strict=True):
        cache[table] = x.unflatten(2, (pages, size)).transpose(1, 2)
    idle = torch.arange(pages) * size >= lengths[:, None]
    return (caches[0], caches[1]), {"page_table": table.int().masked_fill(idle, 2147480000)}


CACHES = pairwise(
    {
        "kind": ["contiguous", "pages", "beam"],
        "mask": [None, Causal(), Window(100, 0), Band(torch.tensor([3, 9, 500, 70]), None)],
        "options": [
            {},
            {"sink": torch.tensor([0.5, -1.0, 0.0, 2.0])},
            {"position": ALiBi(torch.tensor([0.5, 0.2, 0.1, 0.05]))},
        ],
        "seqlen_q": [1, 3, 8],
        "dims": [(64, 64), (16, 8), (128, 128), (256, 256)],
        "dtype": [BF16, FP16, FP32],
    }
)


@pytest.mark.parametrize("case", CACHES, ids=lambda c: "-".join(map(str, c.values()))[:90])
def test_caches(case: dict[str, Any]) -> None:
    lengths = torch.tensor([600, 3, 0, 257])
    inputs = make_inputs(Shape(4, 4, 2, case["seqlen_q"], 600, *case["dims"]), case["dtype"])
    q, k, v = (x.detach() for x in inputs)
    options = case["options"]
    caches, where = cached(case["kind"], k, v, lengths)
    layout = cache_layout(q, caches[0], lengths, where.get("page_table"), where.get("beam"))
    problem = Problem.of(q, *caches, case["mask"], layout=layout, **options)
    out, lse = attend(problem, DECODE, Simulated(80))
    for b, n in enumerate(lengths.tolist()):
        one = (q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        plain = plain_attention(*one, case["mask"], return_lse=True, **options)
        exact = plain_attention(*widened(one), case["mask"], return_lse=True, **options)
        for name, *values in zip(("out", "lse"), (out[b], lse[b]), plain, exact, strict=True):
            assert_no_worse_than(values[0][None], *values[1:], name=f"{name} of {n} keys")


def test_lengths_are_clamped() -> None:
    """A GPU's values are never read back: what lies beyond the cache is not there."""
    q, k, v = (x.detach() for x in make_inputs(Shape(2, 2, 2, 1, 40, 64, 64), BF16))
    layout = cache_layout(q, k, torch.tensor([40, 0]), None, None)
    clean = attend(Problem.of(q, k, v, layout=layout), DECODE, Simulated(80))
    layout.seqused_k.copy_(torch.tensor([900, -7]))
    for a, b in zip(attend(Problem.of(q, k, v, layout=layout), DECODE, Simulated(80)), clean, strict=True):
        assert torch.equal(a, b)


def test_what_is_not_served_is_named() -> None:
    with pytest.raises(RuntimeError, match="decode does not serve tensors other than fp32, bf16 or fp16"):
        simulated(80, make_inputs(Shape(1, 1, 1, 4, 4, 16, 16), torch.float64), body=DECODE)
