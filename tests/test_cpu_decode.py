"""The CPU's decode body: few queries, whatever the keys, masks, options and layouts."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade import Causal, Chunks, KeyPadding, Mask, Segments, Window
from saccade.problem import Problem
from saccade.testing import Shape, check_attention, make_inputs, pairwise, plain_attention
from torch import Tensor

pytestmark = pytest.mark.skipif("cpu" not in saccade.backends(), reason="needs the operator library")

AXES: dict[str, list[Any]] = {
    "queries": [1, 2, 3, 4, 7, 8],
    "heads": [(4, 4), (6, 2), (5, 1), (1, 1)],
    "keys": [1, 2, 15, 16, 129, 1100],
    "dims": [(1, 1), (16, 16), (20, 7), (64, 64), (128, 33), (32, 144)],
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "mask": ["none", "causal", "window", "one side", "padding", "keep", "segments", "chunks"],
    "option": ["none", "bias", "row bias", "hiding bias", "softcap", "sink", "softmax1", "relu", "sigmoid",
               "negative scale", "alibi", "t5", "shaw"],
    "order": ["bhsd", "bshd"],
}  # fmt: skip
CASES = pairwise(AXES)


def shape_of(case: dict[str, Any]) -> Shape:
    """The yardstick compares two largest errors: few numbers would make that a matter of luck."""
    batch = 8 if case["keys"] > 1000 else 16 if case["keys"] > 100 else 64
    return Shape(batch, *case["heads"], case["queries"], case["keys"], *case["dims"])


def mask_of(name: str, shape: Shape) -> Mask | None:
    batch, keys = shape.batch, shape.seqlen_k
    keep, lengths = torch.rand(batch, keys) < 0.5, torch.randint(0, keys + 1, (batch,))
    ids = torch.arange(keys).mul(3).div(max(keys, 3), rounding_mode="floor").expand(batch, -1).contiguous()
    return {
        "none": None, "causal": Causal(), "window": Window(5, 1), "one side": Window(700, 0),
        "padding": KeyPadding(lengths), "keep": KeyPadding(keep=keep),
        "segments": Segments(torch.randint(0, 3, (batch, shape.seqlen_q)), ids),
        "chunks": Chunks(6, 1, align="end"),
    }[name]  # fmt: skip


def options_of(name: str, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    full = (shape.heads, shape.seqlen_q, shape.seqlen_k)
    hiding = torch.randn(shape.batch, *full, dtype=wide)
    hiding[torch.rand(hiding.shape) < 0.3] = -torch.inf
    return {
        "none": {}, "bias": {"bias": torch.randn(full, dtype=dtype).requires_grad_()},
        "row bias": {"bias": torch.randn(shape.batch, 1, 1, shape.seqlen_k, dtype=wide)},
        "hiding bias": {"bias": hiding}, "softcap": {"softcap": 1.5},
        "sink": {"sink": torch.randn(shape.heads, dtype=wide).requires_grad_(), "return_lse": True},
        "softmax1": {"activation": "softmax1", "return_lse": True}, "relu": {"activation": "relu"},
        "sigmoid": {"activation": "sigmoid"}, "negative scale": {"scale": -0.3},
        "alibi": {"position": saccade.ALiBi(torch.rand(shape.heads, dtype=wide))},
        "t5": {"position": saccade.T5(torch.randn(8, shape.heads, dtype=wide).requires_grad_())},
        "shaw": {"position": saccade.Shaw(torch.randn(5, shape.head_dim, dtype=dtype).requires_grad_())},
    }[name]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(x) for x in c.values()).replace(" ", ""))
def test_few_queries(case: dict[str, Any], isa: str) -> None:
    shape = shape_of(case)
    inputs = make_inputs(shape, case["dtype"], case["order"])
    mask, options = mask_of(case["mask"], shape), options_of(case["option"], shape, case["dtype"])
    kernel = saccade.explain(*inputs, mask, **options).kernel
    assert kernel == ("tiled" if case["dtype"] == torch.bfloat16 and shape.seqlen_q > 4 else "decode")
    check_attention(inputs, mask, "cpu", **options)


@pytest.mark.parametrize("option", ["none", "bias", "row bias", "softcap", "negative scale", "alibi", "shaw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_logits_are_those_of_the_tiled_kernels(
    option: str, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: lse of one key is its logit. The backward pass subtracts lse from logits of its own."""
    from saccade.backends import cpu

    found = []
    for dim in (1, 16, 20, 32, 64, 128, 144):
        shape = Shape(4, 6, 2, 8, 1, dim, 4)
        inputs = [x.detach() for x in make_inputs(shape, dtype)]
        problem = Problem.of(*inputs, **options_of(option, shape, dtype))
        lse = []
        for queries in (8, 0):
            monkeypatch.setattr(cpu, "_DECODE_QUERIES", queries)
            assert cpu.kernel(problem) == ("decode" if queries else "tiled")
            lse.append(cpu.run(problem)[1])
        found.append(torch.equal(*lse))
    assert all(found), found


def test_results_do_not_depend_on_threads() -> None:
    q, k, v = make_inputs(Shape(1, 8, 2, 3, 5000, 64, 64))
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(saccade.attention(q, k, v, causal=True, return_lse=True, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for got in found[1:] for x, y in zip(got, found[0], strict=True))


@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize("hide", ["keep", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_no_query_keeps_is_not_touched(queries: int, hide: str, value: float, isa: str) -> None:
    q, k, v = (x.detach() for x in make_inputs(Shape(1, 4, 2, queries, 600, 16, 16)))
    dead = torch.rand(600) < 0.3
    bad_k, bad_v = (torch.where(dead[:, None], value, x) for x in (k, v))
    options: dict[str, Any] = {"mask": KeyPadding(keep=~dead[None])}
    if hide == "bias":
        options = {"bias": torch.zeros(600).masked_fill(dead, -torch.inf).expand(1, 4, queries, 600)}
    got = saccade.attention(q, bad_k, bad_v, **options, backend="cpu")
    assert torch.equal(got, saccade.attention(q, k, v, **options, backend="cpu"))
    assert got.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bias_hides_a_key_from_one_head_of_a_group(value: float, isa: str) -> None:
    """Another head that shares the key sees it, and what stands in its value."""
    q, k, v = (x.detach() for x in make_inputs(Shape(2, 6, 2, 2, 40, 16, 16)))
    bias = torch.zeros(2, 6, 2, 40)
    bias[:, 1, :, 5] = -torch.inf
    clean = saccade.attention(q, k, v, bias=bias, backend="cpu")
    v[:, 0, 5] = value
    got, want = (saccade.attention(q, k, v, bias=bias, backend=name) for name in ("cpu", "reference"))
    assert torch.equal(got.isfinite(), want.isfinite())
    assert torch.equal(got[:, 1], clean[:, 1]) and not got[:, 0].isfinite().all()


def test_one_key_is_the_answer(isa: str) -> None:
    q, k, v = (x.detach() for x in make_inputs(Shape(2, 4, 2, 3, 1, 24, 40), torch.bfloat16))
    out, lse = saccade.attention(q, k, v, return_lse=True, backend="cpu")
    assert torch.equal(out, v.repeat_interleave(2, 1).expand_as(out))
    logits = (q.double() * k.double().repeat_interleave(2, 1)).sum(-1) * 24**-0.5
    assert torch.allclose(lse.double(), logits, atol=1e-6)


def test_a_query_that_keeps_no_key_gives_zero(isa: str) -> None:
    q, k, v = make_inputs(Shape(2, 4, 2, 2, 1100, 16, 16))
    lengths = torch.tensor([0, 1100])
    out, lse = saccade.attention(q, k, v, KeyPadding(lengths), return_lse=True, backend="cpu")
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    alone = saccade.attention(*(x[1:] for x in (q, k, v)), return_lse=True, backend="cpu")
    assert all(torch.allclose(a[1:], b, rtol=1e-5) for a, b in zip((out, lse), alone, strict=True))


def test_logits_far_apart(isa: str) -> None:
    """One key takes all the weight, in every run of the keys in turn; a large logit does not overflow."""
    q, k, v = (x.detach() for x in make_inputs(Shape(1, 2, 1, 1, 1600, 32, 32)))
    for at in (3, 700, 1100, 1599):
        far = k.clone()
        far[0, 0, at] = 3e3 * q[0, 0, 0]
        got = saccade.attention(q[:, :1], far, v, backend="cpu")
        assert torch.allclose(got[0, 0, 0], v[0, 0, at])


@pytest.mark.parametrize("shape", [(2, 32, 16, 2, 1300), (1, 6, 1, 8, 2000)], ids=["long runs", "many runs"])
def test_runs_are_joined(shape: tuple[int, ...], isa: str) -> None:
    """The keys are split where batch and key heads leave threads idle: here in two and in four."""
    inputs = [x.detach() for x in make_inputs(Shape(*shape, 24, 24), torch.float64)]
    for mask in (None, Window(900, 0), KeyPadding(torch.randint(0, shape[-1], shape[:1]))):
        got = saccade.attention(*inputs, mask, return_lse=True, backend="cpu")
        want = saccade.attention(*inputs, mask, return_lse=True, backend="reference")
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("queries", [3, 16])  # of 6 heads that share a key head: 18 rows, and 96
@pytest.mark.parametrize("lengths", [(1, 40), (1100, 600)])
def test_caches_on_pages(lengths: tuple[int, int], queries: int, isa: str) -> None:
    size, width = 16, 48
    table = torch.randperm(2 * 75).reshape(2, 75).to(torch.int32)
    pages: list[Tensor] = [torch.randn(150, 1, size, width) for _ in range(2)]
    q, used = torch.randn(2, 6, queries, width), torch.tensor(lengths)
    got = saccade.attention_decode(q, *pages, used, table, softcap=5.0, backend="cpu")
    for b, n in enumerate(lengths):
        k, v = (x[table[b].long()].transpose(0, 1).flatten(1, 2)[None, :, :n] for x in pages)
        want = plain_attention(q[b : b + 1], k, v, softcap=5.0)
        assert torch.allclose(got[b : b + 1], want, atol=1e-5)


def test_a_cache_costs_and_gives_what_is_in_use(isa: str) -> None:
    """The same bits whatever the capacity: the keys in use say how they are split."""
    q, k, v = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 3000, 32), torch.randn(1, 2, 3000, 32)
    found = []
    for capacity in (3000, 40000):
        cache = [torch.full((1, 2, capacity, 32), torch.nan) for _ in range(2)]
        cache[0][:, :, :3000], cache[1][:, :, :3000] = k, v
        found.append(saccade.attention_decode(q, *cache, torch.tensor([3000]), backend="cpu"))
    assert torch.equal(*found) and found[0].isfinite().all()
