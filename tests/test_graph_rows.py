"""Rows of graphs whose heads lie side by side in whole vectors, as layers hold them, on every set of
instructions: their products have a kernel for each number of heads and of vectors.
"""

from __future__ import annotations

import pytest
import saccade
import torch
from saccade import Graph, ops
from torch import Tensor

pytestmark = pytest.mark.skipif(not ops.LOADED, reason="the operator library is not built")
NODES, EDGES = 90, 403  # no multiple of the edges that are taken together


def joined(heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """[2, heads, NODES, dim], a node's heads side by side."""
    return torch.randn(2, NODES, heads, dim).to(dtype).transpose(1, 2).requires_grad_()


def graph() -> Graph:
    """Rows of no edge to dozens: half of the edges have ten targets."""
    targets = torch.where(
        torch.arange(EDGES) % 2 == 0, torch.randint(10, (EDGES,)), torch.randint(80, (EDGES,))
    )
    return Graph.from_edge_index(torch.stack([torch.randint(NODES, (EDGES,)), targets]), NODES)


def check(inputs: list[Tensor], mask: Graph, bound: float) -> None:
    """Of q, k, v and perhaps edge features and their weight: the output and every gradient against the
    reference in fp64. (How much rounding is too much, other tests ask.)
    """
    found = []
    for backend, dtype in (("cpu", None), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        edge_attr = (leaves[3], leaves[4]) if len(leaves) > 3 else None
        out = saccade.attention(*leaves[:3], mask, backend=backend, edge_attr=edge_attr)
        found.append([out, *torch.autograd.grad(out.double().sin().sum(), leaves)])
    for place, (got, exact) in enumerate(zip(*found, strict=True)):
        error = (got.double() - exact).abs().max().item()
        assert error <= bound * max(1.0, exact.abs().max().item()), f"{place}: {error}"


@pytest.mark.parametrize("dim", [4, 8, 16, 32, 64, 128, 144])
@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 32])
def test_heads_side_by_side(vector_isa: str, heads: int, dim: int) -> None:
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 0.1)):
        check([joined(heads, dim, dtype) for _ in range(3)], graph(), bound)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("features", [8, 16, 32])
def test_features_of_whole_vectors(vector_isa: str, heads: int, features: int) -> None:
    """The last edges of an item, fewer than are taken together, leave the others' features alone."""
    terms = [torch.randn(EDGES, features), torch.randn(heads, 16, features)]
    check([*(joined(heads, 16, torch.float32) for _ in range(3)), *terms], graph(), 1e-4)
