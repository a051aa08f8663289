"""Logits so large that a double cannot hold the ln of a row's sum, and NaN in queries that keep no key."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade import ops
from saccade.testing import Shape, assert_no_worse_than, make_inputs
from torch import Tensor

pytestmark = pytest.mark.skipif(not ops.LOADED, reason="the operator library is not built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
EMPTY = [3, 69]  # the queries that keep nothing, one in each block of 64


def plain(q: Tensor, k: Tensor, bias: Tensor, v: Tensor, sink: Tensor | None) -> Tensor:
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    if sink is None:
        return logits.softmax(-1) @ v
    column = sink.view(-1, 1, 1).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1] @ v


@DTYPES
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("height", [1e6, 1e12, 1e15, 1e25, -1e25])
@pytest.mark.parametrize("where", ["bias", "score"])
def test_gradients_of_tied_logits_stay_normalised(
    dtype: torch.dtype, with_sink: bool, height: float, where: str
) -> None:
    q, k, v = (x.detach() for x in make_inputs(Shape(1, 2, 2, 70, 150, 8, 8), dtype))
    bias = torch.full((70, 150), height if where == "bias" else 0.0, dtype=dtype)
    if where == "bias" and height < 0:
        pytest.skip("a bias below -1e11 is taken as -1e11")
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0], k[..., 0] = 1.0, height * 8**0.5 if where == "score" else 0.0
    sink = torch.full((2,), 0.5, dtype=dtype) if with_sink else None
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def gradient(run: Any, dtype: torch.dtype) -> Tensor:
        leaf = v.detach().to(dtype).requires_grad_()
        parts = [None if x is None else x.to(dtype) for x in (q, k, bias, sink)]
        return torch.autograd.grad(run(*parts, leaf), leaf, dout.to(dtype))[0]

    def ours(q: Tensor, k: Tensor, bias: Tensor, sink: Tensor | None, v: Tensor) -> Tensor:
        return saccade.attention(q, k, v, bias=bias if where == "bias" else None, sink=sink, backend="cpu")

    def theirs(q: Tensor, k: Tensor, bias: Tensor, sink: Tensor | None, v: Tensor) -> Tensor:
        return plain(q, k, bias, v, sink)

    got, want = gradient(ours, dtype), gradient(theirs, dtype)
    if dtype == torch.float64:  # theirs is the yardstick itself
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    else:
        assert_no_worse_than(got, want, gradient(theirs, torch.float64), 3.0)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("height", [1e12, 1e20])
def test_weights_of_tied_logits_stay_normalised(height: float, average: bool) -> None:
    module = saccade.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 70, 8)
    _, weights = module(x, x, x, attn_mask=torch.full((70, 70), height), average_attn_weights=average)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def masks() -> dict[str, dict[str, Any]]:
    ids = torch.zeros(1, 70, dtype=torch.int64)
    ids[:, EMPTY] = 1
    dense = torch.ones(70, 70, dtype=torch.bool)
    dense[EMPTY] = False
    hidden = torch.zeros(70, 70).masked_fill(~dense, -torch.inf)
    segments = saccade.Segments(ids, torch.zeros(1, 70, dtype=torch.int64))
    return {
        "segments": {"mask": segments},
        "sink": {"mask": segments, "sink": torch.zeros(2)},
        "softcap": {"mask": segments, "softcap": 2.0},
        "graph": {"mask": saccade.Graph.from_dense(dense)},
        "bias": {"bias": hidden},
    }


@DTYPES
@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid", "softmax1"])
@pytest.mark.parametrize("name", list(masks()))
def test_what_stands_in_a_query_without_keys_reaches_nothing(
    dtype: torch.dtype, activation: str, name: str
) -> None:
    options = masks()[name]
    if "sink" in options and activation != "softmax":
        pytest.skip("the sink belongs to softmax")
    inputs = [x.detach().clone() for x in make_inputs(Shape(1, 2, 2, 70, 70, 8, 8), dtype)]
    clean = [x.clone().requires_grad_() for x in inputs]
    inputs[0][:, :, EMPTY] = torch.tensor([torch.nan, torch.inf], dtype=dtype)[:, None]
    found = []
    for tensors in (clean, [x.requires_grad_() for x in inputs]):
        out = saccade.attention(*tensors, **options, activation=activation, backend="cpu")
        found.append([out, *torch.autograd.grad(out.sum(), tensors)])
    for want, got in zip(*found, strict=True):
        assert torch.equal(got, want)


@DTYPES
def test_nan_in_a_query_that_keeps_keys_is_seen(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().clone() for x in make_inputs(Shape(1, 1, 1, 70, 70, 8, 8), dtype))
    q[:, :, 3] = torch.nan
    out = saccade.attention(q, k.requires_grad_(), v, backend="cpu")
    assert out[:, :, 3].isnan().all()
    assert torch.autograd.grad(out.sum(), k)[0].isnan().all()
