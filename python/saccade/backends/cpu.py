"""The compiled C++ kernels, through the operators of `torch.ops.saccade`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..autograd import attend
from ..problem import DOT, Problem

NAME = "cpu"
_DECODE_ROWS = 8
_DECODE_KEYS = 256
_TILE_EDGES = 640  # of 4096 pairs: where gather and tiled crossed (fp32, D 64, forward and backward, AVX-512)


def missing() -> list[str]:
    """Why this machine cannot run the backend at all."""
    return [] if ops.LOADED else [f"the operator library is missing ({ops.WHY_NOT})"]


def unsupported(problem: Problem) -> list[str]:
    """Reasons against this problem; none in the plain case."""
    spec = problem.spec
    found = missing()
    if problem.q.device.type != "cpu":
        found.append(f"device {problem.q.device}, not cpu")
    if problem.position is not None:
        found.append(f"position {type(problem.position).__name__} is not in its kernels")
    if _needs_gather(problem) and _needs_tiles(problem):
        found.append("edge terms and repeated edges do not go with bias, position or an extra key")
    layout = spec.layout
    if layout.seqused_k is not None and any(t is not None and t.requires_grad for t in problem.tensors):
        found.append("gradients through a key cache")
    return found


def _needs_gather(problem: Problem) -> bool:
    """Terms of single edges, and repeated edges, are beyond the tiles' bits."""
    graph = problem.spec.args.graph
    return graph is not None and (graph.has_repeats or problem.has_edge_terms)


def _needs_tiles(problem: Problem) -> bool:
    """What the gather kernel lacks."""
    spec = problem.spec
    terms = (problem.bias, problem.rel_bias, problem.extra_k)
    return spec.args.graph is not None and any(t is not None for t in terms)


def is_gather(problem: Problem) -> bool:
    """Edges one by one, or 64 x 64 tiles with a bit per pair? Measured rule: tiles win where they are full
    enough.
    """
    graph = problem.spec.args.graph
    if graph is None or _needs_tiles(problem):
        return False
    return _needs_gather(problem) or graph.indices.numel() < _TILE_EDGES * graph.num_tiles


def is_decode(problem: Problem) -> bool:
    """Few queries over many keys are split over the keys. Measured rule: at most 8 query rows for each key
    head, at least 256 keys, the dot score, nothing that is counted per pair (dropout, a graph) and no
    gradient to a bias.
    """
    spec = problem.spec
    if spec.layout.seqused_k is not None:
        return True
    return (
        _known(spec.seqlen_q * spec.heads <= _DECODE_ROWS * spec.heads_k)
        and _known(spec.seqlen_k >= _DECODE_KEYS)
        and spec.score == DOT
        and not spec.dropout_p
        and spec.args.graph is None
        and problem.extra_k is None
        and problem.rel_bias is None
        and not spec.layout.is_varlen
    )


def _known(condition: bool) -> bool:
    """A traced graph must not depend on lengths that it leaves open."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(condition)


def body(problem: Problem) -> int:
    """Which body runs the problem."""
    if is_gather(problem):
        return ops.GATHER
    return ops.DECODE if is_decode(problem) else ops.TILED


def kernel(problem: Problem) -> str:
    """The name of the body that would run."""
    return ("tiled", "decode", "gather")[body(problem)]


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked problem."""
    chosen, graph = body(problem), problem.spec.args.graph
    if chosen == ops.GATHER and graph is not None and torch.is_grad_enabled():
        graph.columns()  # for the backward pass; built inside the Function, torch.compile would refuse it
    return attend(problem, chosen)
