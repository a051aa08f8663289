"""Where torch.nn.MultiheadAttention contradicts itself: what compat="safe" and "torch" do in each case."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade.nn import MultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = pytest.mark.parametrize("need_weights", [True, False])
MODES = pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])


def triple(*args: Any, **kwargs: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention, MultiheadAttention]:
    """torch's module, the safe one and the compatible one, with the same random parameters in fp64."""
    kwargs = {"dtype": torch.float64, "batch_first": True, **kwargs}
    theirs = nn.MultiheadAttention(*args, **kwargs)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    safe, compatible = (
        MultiheadAttention(*args, **kwargs),
        MultiheadAttention(*args, **kwargs, compat="torch"),
    )
    for module in (safe, compatible):
        module.load_state_dict(theirs.state_dict())
    return theirs, safe, compatible


def call(module: nn.Module, inputs: Any, mode: str, **options: Any) -> tuple[Tensor, Tensor | None]:
    module.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        return module(*inputs, **options)


def assert_identical(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a is None and b is None) or (
            torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        )


def triangle(n: int, m: int | None = None) -> Tensor:
    return torch.ones(n, m or n, dtype=torch.bool).triu(1)


@WEIGHTS
@MODES
@pytest.mark.parametrize("kind", ["padding", "bool2d", "float3d", "both"])
def test_rows_without_keys(kind: str, mode: str, need_weights: bool) -> None:
    """Q1: torch gives NaN or out_proj.bias, by path."""
    theirs, safe, compatible = triple(8, 2)
    x = torch.randn(2, 4, 8).double().requires_grad_()
    options: dict[str, Any] = {"need_weights": need_weights}
    empty = torch.zeros(2, 4, dtype=torch.bool)
    if kind == "padding":
        options["key_padding_mask"] = torch.tensor([[False] * 4, [True] * 4])
        empty[1] = True
    elif kind == "bool2d":
        options["attn_mask"] = torch.zeros(4, 4, dtype=torch.bool)
        options["attn_mask"][2] = True
        empty[:, 2] = True
    elif kind == "float3d":
        options["attn_mask"] = torch.randn(4, 4, 4).double()
        options["attn_mask"][2:, 1] = -torch.inf
        empty[1, 1] = True
    else:
        options["attn_mask"] = triangle(4)
        options["key_padding_mask"] = torch.tensor([[False] * 4, [True, True, False, False]])
        empty[1, :2] = True
    out, weights = call(safe, (x, x, x), mode, **options)
    assert torch.equal(out[empty], safe.out_proj.bias.expand_as(out[empty]))
    expected, expected_weights = call(theirs, (x, x, x), mode, **options)
    torch.testing.assert_close(out[~empty], expected[~empty])
    if weights is not None and expected_weights is not None:
        assert not weights[empty].any()
        torch.testing.assert_close(weights[~empty], expected_weights[~empty])
    assert_identical(call(compatible, (x, x, x), mode, **options), (expected, expected_weights))
    if mode == "train":
        grads = torch.autograd.grad(out.square().sum(), [x, *safe.parameters()])
        assert all(g.isfinite().all() for g in grads)


@WEIGHTS
@pytest.mark.parametrize("value", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_large_finite_numbers_mask_nothing(value: float, need_weights: bool) -> None:
    """A row of -1e9 or finfo.min is a row of equal numbers, not an empty one."""
    theirs, safe, _ = triple(8, 2, dtype=torch.float32)
    x = torch.randn(2, 4, 8)
    mask = torch.full((4, 4), value)
    got, weights = safe(x, x, x, attn_mask=mask, need_weights=need_weights)
    expected, expected_weights = theirs(x, x, x, attn_mask=mask)
    torch.testing.assert_close(
        got, expected, rtol=1e-3, atol=1e-3
    )  # torch rounds q k^T to the mask's last digit
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-3, atol=1e-3)


@WEIGHTS
@MODES
def test_hint_and_mask(mode: str, need_weights: bool) -> None:
    """Q2: torch believes the hint, or the mask, by path. The safe form has both hold."""
    theirs, safe, compatible = triple(8, 2)
    x = torch.randn(2, 5, 8).double()
    mask = torch.rand(5, 5) < 0.5
    mask[:, 0] = False
    options = {"need_weights": need_weights, "is_causal": True}
    got = call(safe, (x, x, x), mode, attn_mask=mask, **options)
    both = call(theirs, (x, x, x), mode, attn_mask=mask | triangle(5), need_weights=need_weights)
    torch.testing.assert_close([t for t in got if t is not None], [t for t in both if t is not None])
    with_torch = call(theirs, (x, x, x), mode, attn_mask=mask, **options)
    assert_identical(call(compatible, (x, x, x), mode, attn_mask=mask, **options), with_torch)
    right = call(safe, (x, x, x), mode, attn_mask=triangle(5), **options)
    wanted = call(theirs, (x, x, x), mode, attn_mask=triangle(5), need_weights=need_weights)
    torch.testing.assert_close(right[0], wanted[0])


@WEIGHTS
@pytest.mark.parametrize("padded", [False, True])
def test_hint_aligns_with_the_first_key(need_weights: bool, padded: bool) -> None:
    """The hint means F.scaled_dot_product_attention's is_causal where L != S, whatever else is given."""
    theirs, safe, _ = triple(8, 2)
    query, key = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    options: dict[str, Any] = {"need_weights": need_weights}
    if padded:
        options["key_padding_mask"] = torch.tensor([[False] * 5, [False, True, False, False, False]])
    none = torch.zeros(3, 5, dtype=torch.bool)
    got = safe(query, key, key, attn_mask=none, is_causal=True, **options)[0]
    torch.testing.assert_close(got, theirs(query, key, key, attn_mask=triangle(3, 5), **options)[0])


@WEIGHTS
@pytest.mark.parametrize(
    "kwargs",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}],
    ids=str,
)
def test_hint_and_appended_columns(kwargs: dict[str, Any], need_weights: bool) -> None:
    """Q3: torch hides the appended columns where it believes the hint; here they are always visible."""
    theirs, safe, compatible = triple(8, 2, **kwargs)
    x = torch.randn(2, 5, 8).double()
    options = {"attn_mask": triangle(5), "need_weights": need_weights}
    got = safe(x, x, x, is_causal=True, **options)
    explicit = theirs(x, x, x, **options)
    torch.testing.assert_close([t for t in got if t is not None], [t for t in explicit if t is not None])
    assert_identical(
        compatible(x, x, x, is_causal=True, **options), theirs(x, x, x, is_causal=True, **options)
    )
    if not need_weights:
        assert not torch.allclose(got[0], theirs(x, x, x, is_causal=True, **options)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_padded_queries_and_nested_inputs() -> None:
    """Q4: padded queries have ordinary values on every path; compat="torch" takes nested tensors as torch."""
    theirs, safe, compatible = triple(8, 2)
    x, padding = torch.randn(2, 4, 8).double(), torch.tensor([[False] * 4, [False, False, True, True]])
    values = [
        call(safe, (x, x, x), mode, key_padding_mask=padding)[0] for mode in ("train", "eval", "no_grad")
    ]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    torch.testing.assert_close(values[0], theirs.train()(x, x, x, key_padding_mask=padding)[0])
    nested = torch.nested.nested_tensor([x[0], x[1, :2]])
    with pytest.raises(AssertionError, match="outside of its fast path"):
        compatible.train()(nested, nested, nested)
    out = safe.train()(nested, nested, nested, need_weights=False)[0]
    torch.testing.assert_close(out.unbind()[1], values[0][1, :2])


def test_scaled_dot_product_attention_applies_mask_and_hint() -> None:
    """Q5: torch's kernels disagree on attn_mask beside is_causal; both hold here, from the first key on."""
    q, k, v = (torch.randn(2, 3, n, 8).double() for n in (4, 6, 6))
    mask = torch.rand(4, 6) < 0.6
    mask[:, 0] = True
    got = saccade.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, mask & ~triangle(4, 6)))
    bias = torch.randn(4, 6).double()
    expected = F.scaled_dot_product_attention(q, k, v, bias.masked_fill(triangle(4, 6), -torch.inf))
    torch.testing.assert_close(saccade.scaled_dot_product_attention(q, k, v, bias, is_causal=True), expected)
    mask[1] = False
    assert not saccade.scaled_dot_product_attention(q, k, v, mask)[:, :, 1].any()


@WEIGHTS
@MODES
def test_compatible_without_masks(mode: str, need_weights: bool) -> None:
    theirs, _, compatible = triple(8, 2, add_bias_kv=True)
    x = torch.randn(2, 5, 8).double()
    got, expected = (call(m, (x, x, x), mode, need_weights=need_weights) for m in (compatible, theirs))
    torch.testing.assert_close([t for t in got if t is not None], [t for t in expected if t is not None])


def test_compat_argument() -> None:
    with pytest.raises(ValueError, match="compat"):
        MultiheadAttention(8, 2, compat="exact")
    with pytest.raises(ValueError, match="compat"):
        MultiheadAttention(8, 2, compat="torch", window=(1, 1))
    assert "compat=torch" in repr(MultiheadAttention(8, 2, compat="torch"))


def test_hidden_values_do_not_leak() -> None:
    """A NaN in a key that nobody sees reaches nothing; torch's sum makes it NaN."""
    theirs, safe, _ = triple(8, 2)
    x = torch.randn(2, 4, 8).double()
    padding = torch.tensor([[False] * 4, [False, False, False, True]])
    key = x.clone()
    key[1, 3] = torch.nan
    got = safe(x, key, key, key_padding_mask=padding)
    torch.testing.assert_close(got, theirs(x, x, x, key_padding_mask=padding))
