"""Graphs from what users hand over, built once; features and logits of single edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..graph import Graph
from ..maskbase import untraced
from ._kept import Kept

CHUNK = 1 << 16  # edges whose logits are computed together


@dataclass(frozen=True, eq=False)
class Edges:
    """A graph and how its edges come from those of the caller: first the kept ones, then loops (n, n)."""

    graph: Graph
    given: int
    kept: Tensor | None = None  # int64: those of the caller's `given` that stay; None: all, no loops follow
    loops: int = 0

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Sources and targets [E'] of the edges by number."""
        sources, targets = self.graph.pairs()
        return sources, targets


_built = Kept()  # by edge_index, sizes and loops


def edges_of(edge_index: Any, sizes: tuple[int, int], loops: bool = False) -> Edges:
    """The edges for `sizes` = (sources, targets); with `loops` every (n, n) once, instead of those there are.

    `edge_index` is a Graph, an int tensor [2, E] (row 0 sources), or a sparse tensor [targets, sources], as
    in PyTorch Geometric. What is built is kept with the object: layers of a stack and steps of a training
    build it once, until the values change (off the CPU: as far as torch counts it). Raises TypeError for
    another object, ValueError for indices out of range, RuntimeError under torch.jit.trace.
    """
    if isinstance(edge_index, Graph):
        if (edge_index.num_keys, edge_index.num_queries) != sizes:
            got = f"{edge_index.num_keys} sources and {edge_index.num_queries} targets"
            raise ValueError(f"edge_index: {got} in the graph, {sizes[0]} and {sizes[1]} in x")
        if loops:
            traced = torch.compiler.is_compiling()
            found = edge_index._once("edges with loops", lambda: _ready(_with_loops(edge_index), traced))
            return found if traced else _ready(found, edge_index.is_prepared)
        return Edges(edge_index, edge_index.num_edges)
    if not isinstance(edge_index, Tensor):
        kind = type(edge_index).__name__
        raise TypeError(f"edge_index: expected a tensor [2, E] or a saccade.Graph, got {kind}")
    return _kept_edges(edge_index, sizes, loops, torch.compiler.is_compiling())


def _ready(edges: Edges, wanted: bool) -> Edges:
    """Where wanted with every form a compiled caller may ask for: a missing one would break its graph."""
    if wanted and not edges.graph.is_prepared:
        edges.graph.prepare()
    return edges


@untraced("a graph from the values of edge_index: with fullgraph=True pass a saccade.Graph")
def _kept_edges(edge_index: Tensor, sizes: tuple[int, int], loops: bool, traced: bool) -> Edges:
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("edge_index: a trace would hold for these edges alone; pass a saccade.Graph")
    found = _built.of(edge_index, (sizes, loops), lambda: _build(edge_index, sizes, loops))
    return _ready(found, traced)


def _build(edge_index: Tensor, sizes: tuple[int, int], loops: bool) -> Edges:
    if edge_index.layout == torch.strided:
        graph = Graph.from_edge_index(edge_index.as_subclass(Tensor), sizes)
    else:
        if tuple(edge_index.shape) != sizes[::-1]:
            raise ValueError(f"edge_index: expected shape {[*sizes[::-1]]}, got {list(edge_index.shape)}")
        graph = Graph.from_dense(edge_index)
    return _with_loops(graph) if loops else Edges(graph, graph.num_edges)


def _with_loops(graph: Graph) -> Edges:
    index = graph.edge_index
    kept = (index[0] != index[1]).nonzero().squeeze(1)
    count = min(graph.num_keys, graph.num_queries)
    loops = torch.arange(count, device=index.device).expand(2, -1)
    joined = torch.cat([index[:, kept], loops], 1)
    looped = Graph.from_edge_index(joined, (graph.num_keys, graph.num_queries))
    return Edges(looped, index.shape[1], kept, count)


def edge_features(edges: Edges, edge_attr: Tensor, fill: float | Tensor | str) -> Tensor:
    """[E', De]: the features [E] or [E, De] of the edges given, then those of the loops, made by `fill`.

    A number or tensor is the feature itself; "add", "mean", "min", "max", "mul" join the features of the kept
    edges that point to the node.
    """
    if not isinstance(edge_attr, Tensor):
        raise TypeError(f"edge_attr: expected a tensor, got {type(edge_attr).__name__}")
    if edge_attr.dim() not in (1, 2) or edge_attr.shape[0] != edges.given:
        raise ValueError(f"edge_attr: expected shape [{edges.given}, De], got {list(edge_attr.shape)}")
    e = edge_attr[:, None] if edge_attr.dim() == 1 else edge_attr
    if edges.kept is None:
        return e
    e = e[edges.kept]
    return torch.cat([e, _loop_features(edges, e, fill)])


_REDUCE = {"add": "sum", "sum": "sum", "mean": "mean", "min": "amin", "max": "amax", "mul": "prod"}


def _loop_features(edges: Edges, e: Tensor, fill: float | Tensor | str) -> Tensor:
    shape = (edges.loops, e.shape[1])
    if isinstance(fill, Tensor):
        if fill.shape not in ((), (1,), shape[1:], (1, shape[1])):
            raise ValueError(f"fill_value: expected shape [{shape[1]}], got {list(fill.shape)}")
        return fill.to(e).expand(shape)
    if isinstance(fill, int | float):
        return e.new_full(shape, fill)
    if not isinstance(fill, str):
        raise TypeError(f"fill_value: expected a number, a tensor or a string, got {type(fill).__name__}")
    if fill not in _REDUCE:
        raise ValueError(f"fill_value: expected a number, a tensor or one of {list(_REDUCE)}, got {fill!r}")
    targets = edges.pairs[1][: e.shape[0], None].expand_as(e)
    start = e.new_full((edges.graph.num_queries, e.shape[1]), float(fill == "mul"))
    return start.scatter_reduce(0, targets, e, _REDUCE[fill], include_self=False)[: edges.loops]


def edge_logits(
    logits: Callable[..., Tensor], edges: Edges, x: tuple[Tensor, Tensor], e: Tensor | None = None
) -> Tensor:
    """[E', H]: `logits` of the targets' rows x[0] [n, H, D], the sources' rows x[1] and the edges' `e`.

    A chunk of edges at a time, computed again in the backward pass: E x H x D numbers are never held.
    """
    sources, targets = edges.pairs
    chunk = max(CHUNK, *(t.shape[0] for t in x))  # the gradient of x has one term per chunk
    starts = range(0, max(sources.numel(), 1), chunk)

    def of(start: int) -> Tensor:
        end = start + chunk
        part = None if e is None else e[start:end]
        return logits(x[0][targets[start:end]], x[1][sources[start:end]], part)

    if len(starts) == 1 or not torch.is_grad_enabled():
        return torch.cat([of(start) for start in starts])
    parts = [checkpoint(of, start, use_reentrant=False, preserve_rng_state=False) for start in starts]
    return torch.cat(parts)
