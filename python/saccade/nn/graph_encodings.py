"""Where a node stands in its graph: features for graph Transformers. Compute them once per graph, before
`Graph.batch`.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from ..checks import int_at_least
from ..graph import Graph
from ._edges import edges_of

_DENSE = 2048  # nodes up to which all eigenvectors are computed
_COLUMNS = 256  # columns of a power of the walk held at a time


def laplacian_encoding(edge_index: Tensor | Graph, num_nodes: int, k: int) -> Tensor:
    """[N, k] float32: the eigenvectors of the symmetric normalised Laplacian I - D^-1/2 A D^-1/2 with the
    smallest eigenvalues, without the very first (Dwivedi and Bresson, 2012.09699).

    Edges count in both directions, repeated ones once, loops not. An eigenvector's sign is arbitrary: here
    the first of its entries of largest size (to one part in a million, so that rounding decides nothing where
    a symmetric graph has several) is positive; flip signs at random in training (`x * signs`, signs [k] of
    +-1). Missing columns (k > N - 1) are zero. Above 2048 nodes scipy's Lanczos is used where it is
    installed.
    """
    num_nodes, k = int_at_least("num_nodes", num_nodes, 0), int_at_least("k", k, 1)
    rows, keys = _undirected(edge_index, num_nodes)
    found = torch.zeros(num_nodes, k, dtype=torch.float64, device="cpu")
    wanted = min(k, num_nodes - 1)
    if wanted > 0:
        degree = torch.bincount(rows, minlength=num_nodes).double()
        scale = torch.where(degree > 0, degree, 1.0).rsqrt()
        weights = -(scale[rows] * scale[keys])
        found[:, :wanted] = _smallest(rows, keys, weights, num_nodes, wanted + 1)[:, 1:]
    return _signed(found).float().to(edge_index.device)


def _signed(columns: Tensor) -> Tensor:
    """Each column or its negative: the first of its entries of largest size is positive."""
    if not len(columns):
        return columns
    size = columns.abs()
    first = (size >= size.amax(0) * (1 - 1e-6)).byte().argmax(0, keepdim=True)
    return torch.where(columns.gather(0, first) < 0, -columns, columns)


def _smallest(rows: Tensor, keys: Tensor, weights: Tensor, num_nodes: int, count: int) -> Tensor:
    """Eigenvectors [N, count] of I + the matrix of `weights`, by rising eigenvalue."""
    if num_nodes > _DENSE and count < num_nodes - 1 and importlib.util.find_spec("scipy") is not None:
        sparse, solver = (importlib.import_module(f"scipy.sparse{n}") for n in ("", ".linalg"))
        matrix = sparse.coo_matrix((weights.numpy(), (rows.numpy(), keys.numpy())), (num_nodes, num_nodes))
        # The smallest of I + W are the largest of -W; a fixed start makes the result repeatable.
        start = torch.linspace(1, 2, num_nodes, dtype=torch.float64, device="cpu").numpy()
        values, vectors = solver.eigsh(-matrix.tocsr(), count, which="LA", v0=start)
        return torch.from_numpy(vectors)[:, torch.from_numpy(values).argsort(descending=True)]
    dense = torch.eye(num_nodes, dtype=torch.float64, device="cpu")
    dense[rows, keys] += weights
    return torch.linalg.eigh(dense)[1][:, :count]


def random_walk_encoding(edge_index: Tensor | Graph, num_nodes: int, k: int) -> Tensor:
    """[N, k] float32: the probability that a random walk from a node is back after 1, 2, ... k steps (Dwivedi
    et al., 2110.07875).

    A walk goes along the edges from source to target, repeated ones more often, and ends at a node that none
    leaves. Exact, in k * E * N operations, a block of columns at a time.
    """
    num_nodes, k = int_at_least("num_nodes", num_nodes, 0), int_at_least("k", k, 1)
    sources, targets = (x.cpu() for x in edges_of(edge_index, (num_nodes, num_nodes)).pairs)
    degree = torch.bincount(sources, minlength=num_nodes).clamp(min=1).double()
    walk = torch.sparse_coo_tensor(
        torch.stack([targets, sources]),
        1.0 / degree[sources],
        (num_nodes, num_nodes),
        device="cpu",
        check_invariants=False,
    ).coalesce()
    found = torch.zeros(num_nodes, k, dtype=torch.float64, device="cpu")
    for first in range(0, num_nodes, _COLUMNS):
        nodes = torch.arange(first, min(first + _COLUMNS, num_nodes), device="cpu")
        state = torch.zeros(num_nodes, nodes.numel(), dtype=torch.float64, device="cpu")
        state[nodes, nodes - first] = 1.0
        for step in range(k):
            state = walk @ state
            found[nodes, step] = state[nodes, nodes - first]
    return found.float().to(edge_index.device)


def _undirected(edge_index: Tensor | Graph, num_nodes: int) -> tuple[Tensor, Tensor]:
    sources, targets = (x.cpu() for x in edges_of(edge_index, (num_nodes, num_nodes)).pairs)
    pairs = torch.cat([sources * num_nodes + targets, targets * num_nodes + sources])
    pairs = torch.unique(pairs[torch.cat([sources, targets]) != torch.cat([targets, sources])])
    return (pairs // num_nodes, pairs % num_nodes) if num_nodes else (pairs, pairs)
