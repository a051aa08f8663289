"""The compiled C++ kernels, through the operators of `torch.ops.saccade`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..autograd import attend
from ..autograd_weights import attend_and_weigh
from ..bodies import is_decode, is_gather, known, needs_gather, needs_tiles, tracked
from ..problem import DOT, Problem, Spec

NAME = "cpu"
_DECODE_QUERIES = 8  # of each head: with 16 tiled is ahead. No more than kNarrow (csrc/cpu/operands.h)
_DECODE_BLOCK = 64  # query rows of its work items
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
    spec = problem.spec
    rows = _DECODE_QUERIES * (spec.heads // max(1, spec.heads_k))
    return ops.DECODE if is_decode(problem, rows, 0) and _decodes(spec) else ops.TILED


def _decodes(spec: Spec) -> bool:
    """Whether the decode body has what a call asks for. The tiled one reads caches too."""
    alike = spec.score == DOT and not spec.dropout_p and spec.args.head_bounds is None
    return alike and spec.heads > 0 and known(spec.seqlen_q <= _DECODE_BLOCK)


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
