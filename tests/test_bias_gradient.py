"""The gradient of a bias, in the main pass and alone: every broadcast shape, masks with holes, threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import saccade
import torch
from saccade import Causal, Graph, KeyPadding, Window, ops
from saccade.testing import Shape, check_attention, make_inputs
from torch import Tensor

pytestmark = pytest.mark.skipif(not ops.LOADED, reason="the operator library is not built")

# Eight key heads and keys enough for two runs each: items of the main pass may walk all sequences.
SHAPE = Shape(2, 8, 8, 70, 600, 16, 16)
GROUPED = Shape(2, 8, 4, 130, 520, 16, 16)
MASKS: dict[str, Any] = {
    "full": None,
    "causal": Causal(),
    "window": Window(40, 3),
    "padded": Window(300, 90) & KeyPadding(torch.tensor([520, 130])),
    "graph": Graph.from_dense(torch.rand(70, 600, generator=torch.Generator().manual_seed(0)) < 0.3),
}
DIMS = [(0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (2, 3), (1, 2), (0, 3), (3,)]


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _bias(shape: Shape, dims: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    sizes = (shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k)
    torch.manual_seed(1)
    bias = torch.randn([n if d in dims else 1 for d, n in enumerate(sizes)])
    bias.masked_fill_(torch.rand_like(bias) < 0.2, -torch.inf)
    return bias.to(dtype).requires_grad_()


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_shape(name: str, dims: tuple[int, ...]) -> None:
    check_attention(make_inputs(SHAPE), MASKS[name], "cpu", bias=_bias(SHAPE, dims))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dims", DIMS[:3], ids=str)
def test_grouped_heads(dims: tuple[int, ...], dtype: torch.dtype) -> None:
    options = {"bias": _bias(GROUPED, dims, dtype), "dropout_p": 0.2, "seed": 5, "softcap": 4.0}
    check_attention(make_inputs(GROUPED, dtype), MASKS["padded"], "cpu", **options)


@pytest.mark.parametrize("dims", DIMS[:3], ids=str)
def test_alone(dims: tuple[int, ...]) -> None:
    """Without other gradients it has a pass of its own, which gives the same."""
    q, k, v = make_inputs(SHAPE)
    bias = _bias(SHAPE, dims)
    cotangent = torch.randn(2, 8, 70, 16)
    out = saccade.attention(q, k, v, MASKS["window"], bias=bias, backend="cpu")
    joint = torch.autograd.grad(out, (q, bias), cotangent)[1]
    out = saccade.attention(q.detach(), k.detach(), v.detach(), MASKS["window"], bias=bias, backend="cpu")
    (alone,) = torch.autograd.grad(out, bias, cotangent)
    torch.testing.assert_close(alone, joint)


def test_threads_change_no_bit() -> None:
    q, k, v = make_inputs(SHAPE)
    bias, before, found = _bias(SHAPE, (1, 2, 3)), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            out = saccade.attention(q, k, v, bias=bias, backend="cpu")
            found.append(torch.autograd.grad(out.square().sum(), (q, k, v, bias)))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_no_sequences() -> None:
    q, k, v = (x.detach()[:0].requires_grad_() for x in make_inputs(SHAPE))
    for dims in ((1, 2, 3), (3,)):
        bias = _bias(SHAPE, dims)
        out = saccade.attention(q, k, v, bias=bias, backend="cpu")
        for grad in torch.autograd.grad(out.sum(), (q, bias)):
            assert not grad.any()


def test_a_bias_without_elements_gets_a_gradient_of_its_shape() -> None:
    q, k, v = (x.detach()[:0].requires_grad_() for x in make_inputs(SHAPE))
    bias = torch.zeros(1, 1, 1, SHAPE.seqlen_k).expand(0, 1, SHAPE.seqlen_q, -1).detach().requires_grad_()
    out = saccade.attention(q, k, v, bias=bias, backend="cpu")
    assert torch.autograd.grad(out.sum(), bias)[0].shape == bias.shape
