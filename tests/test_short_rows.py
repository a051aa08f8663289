"""Rows of few keys on the CPU: where a tile holds them whole, delta comes from its own numbers and not from
the rounded output."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade import Causal, Graph, Segments
from saccade.testing import Shape, derivatives, make_inputs, plain_attention, widened
from torch import Tensor

pytestmark = pytest.mark.skipif("cpu" not in saccade.backends(), reason="needs the operator library")


def gradients(inputs: Any, run: Any = saccade.attention, **options: Any) -> list[Tensor]:
    return derivatives(run(*inputs, **options), list(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("queries", [1, 8, 9, 40, 70])
def test_one_key_has_no_gradient_but_of_its_value(queries: int, dtype: torch.dtype, isa: str) -> None:
    """The weight is 1 whatever the query: in a causal call that is the first row."""
    inputs = make_inputs(Shape(2, 4, 2, queries, queries, 48, 24), dtype)
    # lse is a double: of fp32 logits it leaves a weight of exactly 1, of fp64 it rounds. And where sums and
    # products are rounded one by one, a logit is not twice the same.
    exact = dtype != torch.float64 and isa not in ("portable", "emulated_bf16")
    allowed = 0.0 if exact else 32 * torch.finfo(dtype).eps
    dq, dk, _ = gradients(inputs, mask=Causal(), backend="cpu")
    assert dq[:, :, 0].abs().max() <= allowed
    if queries == 1:
        assert dk.abs().max() <= allowed
    dropped, _, _ = gradients(inputs, mask=Causal(), dropout_p=0.5, seed=1, backend="cpu")
    assert dropped[:, :, 0].abs().max() <= allowed


def test_one_key_of_a_graph_in_tiles() -> None:
    """An edge of each node to itself, and a dense neighbourhood that makes tiles worth their while."""
    edges = torch.ones(64, 64).tril_()
    inputs = make_inputs(Shape(1, 2, 2, 64, 64, 32, 32))
    graph = Graph.from_dense(edges.bool())
    assert saccade.explain(*inputs, graph).kernel == "tiled"
    dq, _, _ = gradients(inputs, mask=graph, backend="cpu")
    assert (dq[:, :, 0] == 0).all()


@pytest.mark.parametrize(("dtype", "allowed"), [
    (torch.float32, 1.2), (torch.bfloat16, 0.44), (torch.float16, 0.33),
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"sink": True}])
def test_gradients_of_short_rows(dtype: torch.dtype, allowed: float, options: dict[str, Any]) -> None:
    """The error of dq and dk of rows of four keys, beside plain PyTorch's in the same dtype (root mean
    square). From the rounded output it was 1.35, 0.5 and 0.39 of it.
    """
    if "sink" in options:
        options = {"sink": torch.randn(4)}
    shares = []
    for seed in range(8):
        inputs = make_inputs(Shape(4, 4, 4, 12, 12, 32, 32), dtype, seed=seed)
        ids = torch.arange(12).div(4, rounding_mode="floor").expand(4, -1).contiguous()
        mask = Segments(ids)
        got = gradients(inputs, mask=mask, backend="cpu", **options)
        plain = gradients(inputs, plain_attention, mask=mask, **options)
        exact = gradients(widened(inputs), mask=mask, backend="reference", **widened(options))
        errors = [
            torch.stack([(x.double() - y).square().mean() for x, y in zip(found, exact, strict=True)])
            for found in (got, plain)
        ]
        shares.append((errors[0] / errors[1]).sqrt())
    assert (torch.stack(shares).mean(0)[:2] < allowed).all(), shares


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_the_reference_has_it(value: float, isa: str) -> None:
    q, k, v = (x.detach() for x in make_inputs(Shape(1, 4, 2, 20, 20, 16, 16)))
    v[0, 0, 12] = value
    found = []
    for backend in ("cpu", "reference"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = saccade.attention(*inputs, Causal(), backend=backend)
        found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    assert not found[0][1][0, 0].isfinite().any()
    for got, want in zip(*found, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())


@pytest.mark.parametrize("queries", [1, 2, 9, 70])
def test_nan_in_a_key_that_is_kept(queries: int, backend: str) -> None:
    """Output, lse and every gradient are NaN where the reference has it, and nowhere else."""
    q, k, v = (x.detach() for x in make_inputs(Shape(1, 2, 2, queries, 20, 16, 16)))
    k[0, 0, 2] = torch.nan
    found = []
    for name in (backend, "reference"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = saccade.attention(*inputs, return_lse=True, backend=name)
        found.append([out, lse, *torch.autograd.grad(out.sum(), inputs)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
    assert not found[0][1][0, 0].isfinite().any()


@pytest.mark.parametrize("queries", [2, 9, 70])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_row_without_keys_has_no_gradient_whatever_others_see(queries: int, backend: str) -> None:
    q, k, v = (x.detach() for x in make_inputs(Shape(1, 2, 2, queries, 300, 16, 16)))
    k[0, 0, 7] = torch.nan
    own = torch.ones(1, queries, dtype=torch.int64)
    own[0, 0] = 5
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = saccade.attention(*inputs, Segments(own, torch.ones(1, 300, dtype=torch.int64)), backend=backend)
    dq, _, _ = torch.autograd.grad(out.sum(), inputs)
    assert (out[:, :, 0] == 0).all() and (dq[:, :, 0] == 0).all()
    assert dq[0, 1].isfinite().all() and not dq[0, 0, 1:].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e-46, -1e-46, 0.0])
def test_a_scale_too_small_for_the_dtype(scale: float, dtype: torch.dtype, backend: str) -> None:
    """Every key weighs the same."""
    q, k, v = (x.detach() for x in make_inputs(Shape(1, 2, 2, 3, 20, 16, 16), dtype))
    out, lse = saccade.attention(q, k, v, scale=scale, return_lse=True, backend=backend)
    torch.testing.assert_close(out, v.mean(-2, keepdim=True).expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 20).log())
