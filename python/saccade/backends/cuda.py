"""The CUDA C++ kernels, through the operators of `torch.ops.saccade`. What they refuse is said here for users
and once more in csrc/cuda/refuse.cu; a test compares the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops, ops_triton
from ..autograd import attend
from ..autograd_weights import ReferenceWeights, attention_weights
from ..bodies import is_decode, is_gather, needs_tiles, tracked
from ..maskbase import UNBOUNDED, MaskArgs
from ..problem import DOT, NORMALISED, Problem

NAME = "cuda"
_OLDEST = 80
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the last by the bodies decode and gather alone
_HEAD_DIM = 256
_ROWS = 1 << 30
# Not yet measured: the rows of one tile of the decode kernel, and keys enough for it.
_DECODE_ROWS = 16
_DECODE_KEYS = 256
_TILE_EDGES = 640  # of 4096 pairs, as Triton's


def missing() -> list[str]:
    """Why this machine cannot run the backend at all."""
    if not ops.LOADED:
        return [ops.WHY_NOT]
    if not ops.CUDA_ARCHS:
        return ["the operator library was built without CUDA (no nvcc at build time)"]
    return [] if torch.cuda.is_available() else ["no CUDA device"]


def unsupported(problem: Problem) -> list[str]:
    """Reasons against this problem; none in the plain case."""
    found, device = missing(), problem.q.device
    if device.type != "cuda":
        found.append(f"device {device}, not cuda")
    elif not found and (why := against_gpu(torch.cuda.get_device_capability(device))):
        found.append(f"{torch.cuda.get_device_name(device)} is {why}")
    return found + beyond(problem)


def against_gpu(capability: tuple[int, int]) -> str:
    """The reason against a GPU, or nothing: too old, or reached by no architecture that was compiled for."""
    sm = 10 * capability[0] + capability[1]
    if sm < _OLDEST:
        return f"sm_{sm}; the kernels need sm_80 or later (Ampere)"
    # 80 also stands for every later GPU, by the PTX that goes with it; 90a for that one alone.
    if any(arch == f"{sm}a" or (arch.isdigit() and int(arch) <= sm) for arch in ops.CUDA_ARCHS):
        return ""
    return f"sm_{sm}; the kernels were compiled for {', '.join(ops.CUDA_ARCHS)} alone"


def body(problem: Problem) -> int:
    """Which body runs the problem: every graph is the gather kernels'."""
    if problem.spec.args.graph is not None:
        return ops.GATHER
    return ops.DECODE if is_decode(problem, _DECODE_ROWS, _DECODE_KEYS) else ops.TILED


def beyond(problem: Problem) -> list[str]:
    """What the kernels lack for a problem, on any GPU."""
    spec, bias = problem.spec, problem.bias
    args, rel_bias = spec.args, problem.rel_bias
    trains = torch.is_grad_enabled() and rel_bias is not None and rel_bias.requires_grad
    # Lengths that torch.compile leaves open must stay so.
    endless = not torch.compiler.is_compiling() and max(spec.seqlen_q, spec.seqlen_k) >= _ROWS
    by_query = rel_bias is not None and rel_bias.dim() > 2
    trains = trains and not by_query
    position = type(problem.position).__name__
    cached, chosen = spec.layout.seqused_k is not None, body(problem)
    single = chosen != ops.TILED
    dtypes = "bfloat16, float16 nor float32" if single else "bfloat16 nor float16"
    # The gradients of decode are the tiled kernels'.
    single_trains = problem.q.dtype == torch.float32 and chosen == ops.DECODE and not cached
    single_trains = single_trains and tracked(problem)
    found = (
        (problem.q.dtype not in _DTYPES[: 2 + single], f"{problem.q.dtype}, neither {dtypes}"),
        (max(spec.head_dim, spec.head_dim_v) > _HEAD_DIM, f"head_dim above {_HEAD_DIM}"),
        (spec.score != DOT, "scores other than the dot product"),
        (spec.activation not in NORMALISED, "activations other than softmax"),
        (problem.position is not None, f"position {position} is not in its kernels"),
        (by_query, "a relative bias of each query (position Shaw)"),
        (len(args.chunks) > 2, "several masks of chunks"),
        (needs_tiles(problem), "a bias, a relative position or an extra key beside a graph"),
        (problem.edge_attr is not None, "edge_attr"),
        (problem.extra_k is not None, "extra_k and extra_v"),
        (cached and tracked(problem), "gradients through a key cache"),
        (single_trains, "float32 gradients of its decode kernel"),
        (bias is not None and bias.dtype == torch.float64, "a float64 bias"),
        (trains, "the gradient of a relative bias"),
        (endless, "sequences of 2^30 rows and more"),
    )
    return [text for applies, text in found if applies]


def serves_unasked(problem: Problem) -> bool:
    """Graphs dense enough for tiles, and so for matrix instructions, are Triton's unless this backend is
    named.
    """
    return problem.spec.args.graph is None or not ops_triton.FOUND or is_gather(problem, _TILE_EDGES)


def takes_hopper(problem: Problem) -> bool:
    """Whether Hopper's own forward kernel takes a problem that is not `beyond` the sm_80 ones."""
    spec = problem.spec
    plain = problem.bias is None and problem.rel_bias is None and not spec.dropout_p and spec.scale > 0
    if not plain or spec.args.keep is not None or spec.args.q_ids is not None:
        return False
    if spec.args.chunks and _chunks_leave_gaps(spec.args):
        return False
    batch = 1 if spec.layout.is_varlen else spec.batch
    sizes = ((spec.seqlen_q, spec.heads), *((spec.seqlen_k, spec.heads_k),) * 2)
    tensors = (problem.q, problem.k, problem.v)
    return all(_tma_reads(x, (batch, heads, rows)) for x, (rows, heads) in zip(tensors, sizes, strict=True))


def _chunks_leave_gaps(args: MaskArgs) -> bool:
    """Beside chunks, a band that may leave a query's own position out, so that keys between others have no
    query.
    """
    end, start = args.band[:2], args.band[2:]
    return args.head_bounds is not None or min(end) < 0 or min(start) < UNBOUNDED


def _tma_reads(x: Tensor, sizes: tuple[int, int, int]) -> bool:
    """Aligned to 16 bytes, and expanded nowhere."""
    packed = x.dim() == 3
    strides = (0, x.stride(1), x.stride(0)) if packed else x.stride()[:3]
    if x.stride(-1) != 1 or x.data_ptr() % 16 or any(stride % 8 for stride in strides):
        return False
    return all(stride or size <= 1 for stride, size in zip(strides, sizes, strict=True))


def kernel(problem: Problem) -> str:
    """The name of the forward kernel that would run."""
    if (chosen := body(problem)) != ops.TILED:
        return "decode" if chosen == ops.DECODE else "gather"
    is_hopper = torch.cuda.get_device_capability(problem.q.device) == (9, 0) and "90a" in ops.CUDA_ARCHS
    return f"tiled sm_{90 if is_hopper and takes_hopper(problem) else 80}"


def run_with_weights(problem: Problem, average: bool) -> tuple[Tensor, Tensor]:
    """(out, weights) of a checked, dense problem: the weights by Triton's kernel or, without it, PyTorch."""
    out, lse = run(problem)
    return out, attention_weights(problem, lse, average, ops_triton if ops_triton.FOUND else ReferenceWeights)


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked problem."""
    chosen, graph = body(problem), problem.spec.args.graph
    if graph is not None and torch.is_grad_enabled():
        graph.columns()  # for the backward pass; built inside the Function, torch.compile would refuse it
    return attend(problem, chosen)
