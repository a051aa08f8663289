"""The compiled C++ kernels, through the operators of `torch.ops.saccade`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..autograd import attend
from ..autograd_weights import attend_and_weigh
from ..bodies import beyond_decode, is_gather, known, needs_gather, needs_tiles, tracked
from ..problem import Problem

NAME = "cpu"
# Queries of a head up to which decode is ahead, over any number of keys; in bf16, whose products have
# instructions of their own, fewer. No more than kNarrow in csrc/cpu/operands.h, or the backward pass would
# form other logits; a cache has none, and both bodies are as fast at twice as many.
_DECODE_QUERIES, _DECODE_QUERIES_BF16 = 8, 4
_TILE_EDGES = 640  # of 4096 pairs: where gather and tiled crossed (fp32, D 64, forward and backward, AVX-512)


def missing() -> list[str]:
    """Why this machine cannot run the backend at all."""
    return [] if ops.LOADED else [ops.WHY_NOT]


def unsupported(problem: Problem) -> list[str]:
    """Reasons against this problem; none in the plain case."""
    spec = problem.spec
    found = missing()
    if problem.q.device.type != "cpu":
        found.append(f"device {problem.q.device}, not cpu")
    if problem.position is not None:
        found.append(f"position {type(problem.position).__name__} is not in its kernels")
    if needs_gather(problem) and needs_tiles(problem):
        found.append("edge terms and repeated edges do not go with bias, position or an extra key")
    layout = spec.layout
    if layout.seqused_k is not None and tracked(problem):
        found.append("gradients through a key cache")
    return found


def body(problem: Problem) -> int:
    """Which body runs the problem."""
    if is_gather(problem, _TILE_EDGES):
        return ops.GATHER
    return ops.DECODE if _decodes(problem) else ops.TILED


def _decodes(problem: Problem) -> bool:
    """Whether a call is of few queries and asks for what decode has. The tiled body reads caches too."""
    spec = problem.spec
    few = _DECODE_QUERIES_BF16 if problem.q.dtype == torch.bfloat16 else _DECODE_QUERIES
    few *= 1 if spec.layout.seqused_k is None else 2
    rows = problem.k.stride(-1) == 1 and problem.v.stride(-1) == 1
    alike = rows and spec.args.head_bounds is None and not beyond_decode(problem)
    return alike and spec.heads > 0 and known(spec.seqlen_q <= few)


def kernel(problem: Problem) -> str:
    """The name of the body that would run."""
    return ("tiled", "decode", "gather")[body(problem)]


def run_with_weights(problem: Problem, average: bool) -> tuple[Tensor, Tensor]:
    """(out, weights) of a checked, dense problem."""
    return attend_and_weigh(problem, _ready_body(problem), average)


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked problem."""
    return attend(problem, _ready_body(problem))


def _ready_body(problem: Problem) -> int:
    chosen, graph = body(problem), problem.spec.args.graph
    if chosen == ops.GATHER and graph is not None and torch.is_grad_enabled():
        graph.columns()  # for the backward pass; built inside the Function, torch.compile would refuse it
    return chosen
