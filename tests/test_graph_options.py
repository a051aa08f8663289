"""What joins attention on a graph - dropout, biases, masks, scores, features of edges - on every set of
instructions, whose vectors hold other numbers of heads and features.
"""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade import Causal, GATv2, Graph, KeyPadding, ops
from torch import Tensor

pytestmark = pytest.mark.skipif(not ops.LOADED, reason="the operator library is not built")
NODES, EDGES = 70, 331


def eighths(*shape: int) -> Tensor:
    """Multiples of 1/8: sums of them are exact, and none is moved across the kink of leaky_relu."""
    return torch.randint(-16, 17, shape) / 8


def graph() -> Graph:
    """Edges in an order of their own; rows of no edge to dozens."""
    crowded = torch.arange(EDGES) % 2 == 0
    targets = torch.where(crowded, torch.randint(9, (EDGES,)), torch.randint(NODES - 8, (EDGES,)))
    return Graph.from_edge_index(torch.stack([torch.randint(NODES, (EDGES,)), targets]), NODES)


DTYPES = {torch.float32: 1.0, torch.float64: 1e-8, torch.bfloat16: 2e3}  # and how much more a bound allows


def check(
    leaves: dict[str, Tensor],
    mask: Any,
    bound: float = 2e-5,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """The output and every gradient against the reference in fp64. (How much rounding is too much, other
    tests ask.)
    """
    found = []
    for backend, wide in (("cpu", False), ("reference", True)):
        x = {name: t.to(dtype, copy=True).to(torch.float64 if wide else dtype) for name, t in leaves.items()}
        x = {name: t.requires_grad_() for name, t in x.items()}
        given = dict(options)
        if "edge_bias" in x:
            given["edge_bias"] = x["edge_bias"]
        if "e" in x and "w" not in x:
            given["edge_attr"] = (x["e"], x["W"])
        if "w" in x:
            given["score"] = GATv2(x["w"], 0.2, (x["e"], x["W"]) if "e" in x else None)
        out = saccade.attention(x["q"], x["k"], x["v"], mask, backend=backend, **given)
        found.append([out, *torch.autograd.grad(out.double().sin().sum(), list(x.values()))])
    for name, got, exact in zip(["out", *leaves], *found, strict=True):
        error = (got.double() - exact).abs().max().item()
        assert error <= bound * DTYPES[dtype] * max(1.0, exact.abs().max().item()), f"{name}: {error}"


def nodes(heads: int, dim: int) -> dict[str, Tensor]:
    """q, k, v [2, heads, NODES, dim], the heads of a node side by side."""
    return {name: torch.randn(2, NODES, heads, dim).transpose(1, 2) for name in "qkv"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 3, 4, 8, 24])
def test_dropout(vector_isa: str, heads: int, dtype: torch.dtype) -> None:
    check(nodes(heads, 16), graph(), dtype=dtype, dropout_p=0.4, seed=(1 << 40) + 7)


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("of", ["each head", "all heads"])
def test_edge_bias(vector_isa: str, heads: int, of: str) -> None:
    bias = torch.randn(heads, EDGES) if of == "each head" else torch.randn(EDGES)
    bias[..., ::7] = -torch.inf
    check(nodes(heads, 16) | {"edge_bias": bias}, graph(), dropout_p=0.2, seed=3)


@pytest.mark.parametrize("dim", [5, 16, 48])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "relu"])
def test_masks_hide_what_stands_in_keys(vector_isa: str, dim: int, activation: str) -> None:
    x = nodes(4, dim)
    lengths = torch.tensor([NODES - 20, NODES - 1])
    for b, n in enumerate(lengths.tolist()):
        x["k"][b, :, n:] = torch.nan
        x["v"][b, :, n:] = torch.nan
    check(x, graph() & KeyPadding(lengths) & Causal(), activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [1, 3, 16, 33])
@pytest.mark.parametrize("dim", [1, 16, 20])
def test_gatv2(vector_isa: str, dim: int, features: int, dtype: torch.dtype) -> None:
    x = {name: eighths(2, 3, NODES, dim) for name in "qkv"}
    x |= {"w": eighths(3, dim), "e": eighths(EDGES, features), "W": eighths(3, dim, features) / 4}
    check(x, graph(), 2e-4, dtype)
    check({name: x[name] for name in "qkvw"}, graph(), 2e-4, dtype)


@pytest.mark.parametrize("groups", [1, 2])
def test_gatv2_hides_what_masks_hide(vector_isa: str, groups: int) -> None:
    """NaN in the features of hidden edges and in keys without others; key heads of their own or shared."""
    x = {name: eighths(2, h, NODES, 24) for name, h in (("q", 4), ("k", 4 // groups), ("v", 4 // groups))}
    x |= {"w": eighths(4, 24), "e": eighths(EDGES, 9), "W": eighths(4, 24, 9) / 4}
    mask = graph()
    sources, targets = mask.edge_index
    x["e"][sources > targets] = torch.nan
    unseen = torch.ones(NODES, dtype=torch.bool)
    unseen[sources[sources <= targets]] = False
    assert unseen[sources].any()
    x["k"][:, :, unseen] = x["v"][:, :, unseen] = torch.nan
    check(x, mask & Causal(), 2e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [3, 16, 33])
def test_features_beside_keys(vector_isa: str, features: int, dtype: torch.dtype) -> None:
    x = nodes(3, 16) | {"e": torch.randn(EDGES, features), "W": torch.randn(3, 16, features) / 4}
    mask = graph()
    sources, targets = mask.edge_index
    x["e"][sources > targets] = torch.nan
    check(x, mask & Causal(), 1e-4, dtype)
    check(x | {"e": torch.randn(EDGES, features)}, mask, 1e-4, dtype, dropout_p=0.3, seed=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_gradients_of_rows_of_one_edge_are_exactly_0(vector_isa: str, heads: int, dtype: torch.dtype) -> None:
    x = [t.to(dtype).requires_grad_() for t in nodes(heads, 20).values()]
    one = Graph.from_edge_index(torch.stack([torch.randint(NODES, (NODES,)), torch.arange(NODES)]), NODES)
    out = saccade.attention(*x, one, backend="cpu", dropout_p=0.3, seed=1)
    dq, dk, dv = torch.autograd.grad(out, x, torch.randn_like(out))
    assert not dq.any() and not dk.any() and dv.any()


def test_gradients_of_small_rows_do_not_keep_the_outputs_rounding(vector_isa: str) -> None:
    """In bf16 their error stays below plain PyTorch's, whose weights and products are rounded."""
    mask = Graph.from_edge_index(torch.tensor([[0, 1, 3, 5, 4, 6], [2, 2, 2, 1, 0, 0]]), 7)
    inputs = [torch.randn(40, 1, 7, 16).bfloat16() for _ in range(4)]

    def gradients(backend: str, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs[:3])
        if backend == "cpu":
            out = saccade.attention(q, k, v, mask, backend="cpu")
        else:
            keep = mask.materialize()
            logits = (q @ k.transpose(-1, -2) / 4).masked_fill(~keep, -torch.inf)
            out = logits.softmax(-1).nan_to_num() @ v
        return [g.double() for g in torch.autograd.grad(out, (q, k), inputs[3].to(dtype))]

    exact = gradients("plain", torch.float64)
    for name, ours, plain, right in zip(
        "qk", gradients("cpu", torch.bfloat16), gradients("plain", torch.bfloat16), exact, strict=True
    ):
        assert (ours - right).abs().mean() < 0.7 * (plain - right).abs().mean(), name


@pytest.mark.parametrize("slope", [0.2, -3.0, 1e6])
def test_no_slope_costs_the_others_digits(vector_isa: str, slope: float) -> None:
    """Where q + k > 0 everywhere, leaky_relu's slope below 0 takes no part."""
    x = {name: (eighths(1, 2, NODES, 16).abs() + 0.125) for name in "qk"}
    x |= {"v": torch.randn(1, 2, NODES, 16), "w": torch.randn(2, 16) / 4}
    x = {name: t.requires_grad_() for name, t in x.items()}
    mask, found = graph(), []
    for of in (0.2, slope):
        out = saccade.attention(x["q"], x["k"], x["v"], mask, score=GATv2(x["w"], of), backend="cpu")
        found.append([out, *torch.autograd.grad(out.sin().sum(), list(x.values()))])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    "sizes", [(2, 1, 348, 9, 26), (1, 1, 93, 9, 15), (1, 1, 5, 33, 40), (1, 4, 2000, 32, 16)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_repeat_for_any_number_of_threads(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, n, dim, features = sizes
    mask = Graph.from_edge_index(torch.randint(n, (2, 3 * n)), n)
    x = [torch.randn(batch, heads, n, dim) for _ in "qkv"]
    x += [torch.randn(3 * n, features), torch.randn(heads, dim, features)]
    x = [t.to(dtype).requires_grad_() for t in x]
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = saccade.attention(*x[:3], mask, edge_attr=(x[3], x[4]), backend="cpu")
            found.append([out, *torch.autograd.grad(out.sin().sum(), x)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("dims", [(1, 1), (16, 3), (5, 33), (40, 7)])
def test_maps_of_rows(vector_isa: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """saccade::row_map and row_outer, and what the compiler is told of them."""
    dim_x, dim_y = dims
    x = torch.randn(2, 701, 3, dim_x).to(dtype).transpose(1, 2)
    y, w = torch.randn(2, 3, 701, dim_y).to(dtype), torch.randn(3, dim_x, dim_y).to(dtype).transpose(1, 2)
    y[:, :, ::5] = 0
    x[0, 1, 5] = torch.nan
    base = torch.randn(2, 3, 701, dim_y).to(dtype)
    got = torch.ops.saccade.row_map(x, w, base, [0, 2, 1, 3])
    exact = base.double() + x.double() @ w.double().transpose(-1, -2)
    assert got.transpose(1, 2).is_contiguous() and got.dtype == dtype
    torch.testing.assert_close(
        got.double(), exact, atol=1e-4 * DTYPES.get(dtype, 1e3), rtol=0.02, equal_nan=True
    )
    dw = torch.ops.saccade.row_outer(y, x)
    cleaned = x.double().nan_to_num()
    exact = torch.einsum("bhnc,bhnd->hcd", y.double(), cleaned)
    torch.testing.assert_close(dw.double(), exact, atol=1e-4 * min(1.0, DTYPES.get(dtype, 1.0)), rtol=1e-5)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.saccade.row_map.default, (x, w, base, [0, 2, 1, 3]), test_utils=tests)
    torch.library.opcheck(torch.ops.saccade.row_outer.default, (y, x), test_utils=tests)
