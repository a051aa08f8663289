"""Which kernel body a problem is for: what each lacks, and the rules between them. The backends share the
rules; each has its own measured numbers.
"""

from __future__ import annotations

import torch

from .problem import DOT, Problem


def needs_gather(problem: Problem) -> bool:
    """Terms of single edges, and repeated edges, are beyond the tiles' bits."""
    graph = problem.spec.args.graph
    return graph is not None and (graph.has_repeats or problem.has_edge_terms)


def needs_tiles(problem: Problem) -> bool:
    """What the gather kernels lack."""
    spec = problem.spec
    terms = (problem.bias, problem.rel_bias, problem.extra_k)
    return spec.args.graph is not None and any(t is not None for t in terms)


def is_gather(problem: Problem, tile_edges: int) -> bool:
    """Edges one by one, or 64 x 64 tiles with a bit per pair? Tiles win where they hold `tile_edges` edges on
    average.
    """
    graph = problem.spec.args.graph
    if graph is None or needs_tiles(problem):
        return False
    return needs_gather(problem) or graph.indices.numel() < tile_edges * graph.num_tiles


def is_decode(problem: Problem, rows: int, keys: int) -> bool:
    """Few queries over many keys are split over the keys: at most `rows` query rows for each key head, at
    least `keys` keys, nothing that decode lacks, and every cache.
    """
    spec = problem.spec
    if spec.layout.seqused_k is not None:
        return True
    few = known(spec.seqlen_q * spec.heads <= rows * spec.heads_k) and known(spec.seqlen_k >= keys)
    return few and problem.rel_bias is None and not beyond_decode(problem)


def beyond_decode(problem: Problem) -> bool:
    """Whether a call asks for what no decode body has: another score, what is counted per pair (dropout, a
    graph), one more key, packed sequences.
    """
    spec = problem.spec
    other = spec.score != DOT or bool(spec.dropout_p) or spec.args.graph is not None
    return other or problem.extra_k is not None or spec.layout.is_varlen


def tracked(problem: Problem) -> bool:
    """Whether autograd will follow the call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in problem.tensors)


def known(condition: bool) -> bool:
    """A traced graph must not depend on lengths that it leaves open."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(condition)
