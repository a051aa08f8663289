"""The Triton kernels, through the operators `torch.ops.saccade.triton_*`."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from .. import ops, ops_triton
from ..autograd import attend
from ..autograd_weights import attention_weights
from ..bodies import is_decode, is_gather, needs_gather, needs_tiles, tracked
from ..problem import Problem

NAME = "triton"
_OLDEST = (8, 0)
_LEAST_VERSION = (3, 6)
# Measured on a CPU, not yet on a GPU.
_TILE_EDGES = 640  # of 4096 pairs
# Not yet measured: the rows of the least tile of the decode body, and keys enough for it.
_DECODE_ROWS = 16
_DECODE_KEYS = 256


def missing() -> list[str]:
    """Why this machine cannot run the backend at all."""
    if not ops_triton.FOUND:
        return ["triton is not installed (pip install triton)"]
    if not ops_triton.INTERPRETED and not torch.cuda.is_available():
        return ["no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests)"]
    if torch.compiler.is_compiling():  # which uses triton itself, and should not trace its import
        return []
    return list(_against_version())


@cache
def _against_version() -> tuple[str, ...]:
    """The reason against the triton that is installed: `import saccade` does not load it."""
    try:
        version = import_module("triton").__version__
    except Exception as error:  # of any kind, from what it loads
        return (f"triton cannot be imported ({type(error).__name__}: {error})",)
    old = tuple(map(int, version.split(".")[:2])) < _LEAST_VERSION
    return (f"triton {version} is older than {'.'.join(map(str, _LEAST_VERSION))}",) if old else ()


def unsupported(problem: Problem) -> list[str]:
    """Reasons against this problem; none in the plain case."""
    return reasons_against(problem.q.device) + _beyond(problem)


def reasons_against(device: torch.device) -> list[str]:
    """Why tensors there are not served."""
    found = missing()
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            name = torch.cuda.get_device_name(device)
            found.append(
                f"{name} is sm_{capability[0]}{capability[1]}; the kernels need sm_80 or later (Ampere)"
            )
    elif device.type != "cpu" or not ops_triton.INTERPRETED:
        found.append(f"device {device}, not cuda")
    return found


def _beyond(problem: Problem) -> list[str]:
    found = []
    if problem.position is not None:
        found.append(f"position {type(problem.position).__name__} is not in its kernels")
    if needs_gather(problem) and needs_tiles(problem):
        found.append("edge terms and repeated edges do not go with bias, position or an extra key")
    cached = problem.spec.layout.seqused_k is not None
    if cached and tracked(problem):
        found.append("gradients through a key cache")
    return found


def is_interpreted() -> bool:
    """Do the kernels run in Triton's interpreter, for tests, and on no GPU?"""
    return ops_triton.INTERPRETED


def body(problem: Problem) -> int:
    """Which body runs the problem."""
    if is_gather(problem, _TILE_EDGES):
        return ops.GATHER
    return ops.DECODE if is_decode(problem, _DECODE_ROWS, _DECODE_KEYS) else ops.TILED


def kernel(problem: Problem) -> str:
    """The name of the body that would run."""
    return ("tiled", "decode", "gather")[body(problem)]


def run_with_weights(problem: Problem, average: bool) -> tuple[Tensor, Tensor]:
    """(out, weights) of a checked, dense problem."""
    out, lse = run(problem)
    return out, attention_weights(problem, lse, average, ops_triton)


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked problem."""
    return attend(problem, _ready_body(problem), ops_triton)


def _ready_body(problem: Problem) -> int:
    """The body, the forms of a graph that it needs built: inside a Function compile would see that."""
    chosen, graph = body(problem), problem.spec.args.graph
    if chosen == ops.GATHER and graph is not None and torch.is_grad_enabled():
        graph.work(ops_triton.ITEM, True)
        graph.column_ids()
    return chosen
