"""The operator library: loading it, what its operators return (fakes), and their arguments from a `Spec`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layout import memory_order
from .problem import DOT, NORMALISED, SOFTMAX1, Spec, accumulator

TILED, DECODE, GATHER = 0, 1, 2
_NAMED = os.environ.get("SACCADE_OPS_LIBRARY")
PATH = _NAMED or str(Path(__file__).with_name("libsaccade_ops.so"))
_OPS = torch.ops.saccade
# What the backward operators give, in their order: the argument, and its bit in `needs`.
GRADIENTS = {
    name: 1 << bit
    for bit, name in enumerate(("q", "k", "v", "bias", "rel_bias", "weight", "extra_k", "extra_v"))
}
EDGE_GRADIENTS = {
    "q": 1, "k": 2, "v": 4, "weight": 32, "edge_bias": 256, "edge_q": 512, "edge_x": 1024
}  # fmt: skip
_NO_GRAPH = (None, None, None)


# The arguments of the operators as they are passed below: a library of other sources has others.
_OPTIONS = (
    "Tensor? seed, Tensor? head_bounds, Tensor? lengths, Tensor? keep, Tensor? q_ids, Tensor? k_ids, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? page_table, Tensor? beam, "
    "Tensor? tile_ptr, Tensor? tile_col, Tensor? tile_bits, SymInt[] band, SymInt[]? chunks, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, int score, int activation, float scale, float softcap, "
    "float slope, float dropout_p"
)
_TERMS = "Tensor? bias, Tensor? rel_bias, Tensor? weight"
_CALL = (
    f"Tensor q, Tensor k, Tensor v, {_TERMS}, Tensor? sink, Tensor? extra_k, Tensor? extra_v, {_OPTIONS}, "
    "int body"
)
_GRAPH = "Tensor indptr, Tensor indices, Tensor? edge_ids, Tensor? edge_bias, Tensor? edge_q, Tensor? edge_x"
_EXPECTED = {
    "forward": f"{_CALL}, int[] out_order",
    "forward_weights": f"{_CALL}, int[] out_order, bool average",
    "backward": f"Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_CALL}, int needs, bool deterministic",
    "weights": f"Tensor lse, Tensor q, Tensor k, {_TERMS}, Tensor? extra_k, {_OPTIONS}, bool average",
    "gather_forward": f"{_CALL}, {_GRAPH}, int[] out_order",
    "gather_backward": "Tensor dout, Tensor? dlse, Tensor? dout_edge, Tensor out, Tensor lse, "
    f"Tensor out_edge, {_CALL}, {_GRAPH}, Tensor t_indptr, Tensor t_rows, Tensor t_edges, int needs",
    "row_map": "Tensor x, Tensor w, Tensor? base, int[] out_order",
    "row_outer": "Tensor y, Tensor x",
    "cpu_isa": "str name",
    "cuda_archs": "",
}


def _load() -> tuple[bool, str]:
    """Whether the library serves this file, and if not, why."""
    build = "build it with: pip install -v --no-build-isolation [-e] ."
    if not Path(PATH).is_file():
        return False, f"the operator library is missing: no file {PATH}; {build}"
    try:
        torch.ops.load_library(PATH)
    except (OSError, RuntimeError) as error:
        return False, f"the operator library does not load: {PATH}: {error.__cause__ or error}; {build}"
    if wrong := [name for name in _EXPECTED if not _is_expected(name)]:
        others = f"the operator library does not match this Python code: {PATH}: {', '.join(wrong)}"
        return False, f"{others}; {build}"
    return True, ""


def _is_expected(name: str) -> bool:
    try:
        schema = getattr(torch.ops.saccade, name).default._schema
    except AttributeError:  # no such operator
        return False
    return str(schema).startswith(f"saccade::{name}({_EXPECTED[name]}) -> ")


def places(name: str) -> dict[str, int]:
    """Argument name -> position, of `saccade::name`."""
    schema = getattr(torch.ops.saccade, name).default._schema
    return {argument.name: n for n, argument in enumerate(schema.arguments)}


def bare(name: str, *args: Any) -> Any:
    """Operator `name` itself, past its kernel for autograd, which costs 9 us."""
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(_OPS, name).default(*args)


def invoke(name: str, *args: Any) -> Any:
    """`bare`, or what the compiler can trace."""
    if torch.compiler.is_compiling():
        return getattr(_OPS, name).default(*args)
    return bare(name, *args)


LOADED, WHY_NOT = _load()
if not LOADED and (_NAMED or Path(PATH).exists()):  # named or built, and of no use
    warnings.warn(f"saccade: {WHY_NOT}", UserWarning, stacklevel=2)


def _cuda_archs() -> tuple[str, ...]:
    """What the CUDA kernels were compiled for: "80", "90a"; nothing where the build had no nvcc."""
    return tuple(torch.ops.saccade.cuda_archs().split()) if LOADED else ()


CUDA_ARCHS = _cuda_archs()


def call_arguments(spec: Spec, seed: Tensor | None, body: int) -> tuple[Any, ...]:
    """The arguments from `seed` to `body`: everything but the differentiable tensors. No chunks are None:
    torch's AOTInductor loses an empty list.
    """
    args, at = spec.args, spec.layout
    tiles = _NO_GRAPH if args.graph is None or body == GATHER else args.graph.tiles()
    lengths = (0, 0) if at.is_dense else (spec.seqlen_q, spec.seqlen_k)
    return (
        seed, args.head_bounds, args.lengths, args.keep, args.q_ids, args.k_ids,
        at.cu_seqlens_q, at.cu_seqlens_k, at.seqused_k, at.page_table, at.beam, *tiles,
        args.band, args.chunks or None, *lengths, spec.score, spec.activation, spec.scale, spec.softcap,
        spec.slope, spec.dropout_p, body,
    )  # fmt: skip


# What the operators return, from every argument of a schema, of which a few are read by their places. A fake
# is no more than this; kernels written in Python fill what it gives.


def _laid_out(like: Tensor, sizes: tuple[int, ...], order: list[int]) -> Tensor:
    """A dense tensor whose dimensions lie in memory as `order` lists them, the outermost first."""
    return like.new_empty([sizes[d] for d in order]).permute([order.index(d) for d in range(len(sizes))])


def _as_memory_of(like: Tensor) -> Tensor:
    """A dense tensor of its sizes whose dimensions lie in memory in the order of its strides."""
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda d: -strides[d])
    return _laid_out(like, tuple(like.shape), order)


def forward_results(args: tuple[Any, ...], at: dict[str, int]) -> tuple[Tensor, Tensor]:
    """(out, lse) of forward."""
    q, v = args[0], args[2]
    out = _laid_out(q, (*q.shape[:-1], v.shape[-1]), list(args[at["out_order"]]))
    packed = args[at["cu_seqlens_q"]] is not None
    shape = (q.shape[1], q.shape[0]) if packed else q.shape[:-1]
    has_lse = args[at["activation"]] in NORMALISED
    return out, q.new_empty(shape if has_lse else (0,), dtype=torch.float64)


def backward_results(args: tuple[Any, ...], at: dict[str, int]) -> tuple[Tensor, ...]:
    """The gradients of backward."""
    q, needs = args[at["q"]], args[at["needs"]]
    found = []
    for name, bit in GRADIENTS.items():
        like, dtype = args[at[name]], q.dtype if name in ("q", "k", "v") else accumulator(q.dtype)
        if like is None or not needs & bit:
            found.append(q.new_empty(0, dtype=dtype))
            continue
        shape = like.shape
        if name in ("q", "k", "v"):
            found.append(_as_memory_of(like))
            continue
        if name == "bias":
            shape = [1 if stride == 0 else n for n, stride in zip(shape, like.stride(), strict=True)]
        found.append(q.new_empty(shape, dtype=dtype))
    return tuple(found)


def weights_result(args: tuple[Any, ...], at: dict[str, int]) -> Tensor:
    """The weights of weights."""
    q, k = args[at["q"]], args[at["k"]]
    extra, softmax1 = args[at["extra_k"]] is not None, args[at["activation"]] == SOFTMAX1
    head = q.shape[:1] if args[at["average"]] else q.shape[:2]
    # As numbers: torch 2.11 cannot add a bool to a length that is left open.
    return q.new_empty((*head, q.shape[2], k.shape[2] + int(extra) + int(softmax1)))


def gather_results(args: tuple[Any, ...], at: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, sum p e) of gather_forward."""
    q, features = args[at["q"]], args[at["edge_x"]]
    alone = features is None or args[at["score"]] != DOT  # an additive score's features join no sum
    shape = (0,) if alone else (*q.shape[:-1], features.shape[1])
    return *forward_results(args, at), q.new_empty(shape)


def gather_gradients(args: tuple[Any, ...], at: dict[str, int]) -> tuple[Tensor, ...]:
    """The gradients of gather_backward."""
    q, needs = args[at["q"]], args[at["needs"]]
    wide = accumulator(q.dtype)
    found = []
    for name, bit in EDGE_GRADIENTS.items():
        like = args[at[name]]
        if like is None or not needs & bit:
            found.append(q.new_empty(0, dtype=wide))
        elif name in ("q", "k", "v", "edge_q"):
            rows_dense = like.stride(-1) == 1 or like.shape[-1] == 1  # others are copied, and lie as the copy
            found.append(_as_memory_of(like) if rows_dense else like.new_empty(like.shape))
        else:
            found.append(like.new_empty(like.shape, dtype=wide))
    return tuple(found)


if LOADED:
    _FORWARD, _BACKWARD, _WEIGHTS = map(places, ("forward", "backward", "weights"))
    _FORWARD_WEIGHTS = places("forward_weights")
    _GATHER, _GATHER_BACKWARD = map(places, ("gather_forward", "gather_backward"))

    @torch.library.register_fake("saccade::forward")
    def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
        return forward_results(args, _FORWARD)

    @torch.library.register_fake("saccade::backward")
    def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
        return backward_results(args, _BACKWARD)

    @torch.library.register_fake("saccade::gather_forward")
    def _gather_forward_fake(*args: Any) -> tuple[Tensor, ...]:
        return gather_results(args, _GATHER)

    @torch.library.register_fake("saccade::gather_backward")
    def _gather_backward_fake(*args: Any) -> tuple[Tensor, ...]:
        return gather_gradients(args, _GATHER_BACKWARD)

    @torch.library.register_fake("saccade::row_map")
    def _row_map_fake(x: Tensor, w: Tensor, base: Tensor | None, out_order: list[int]) -> Tensor:
        return _laid_out(x, (*x.shape[:-1], w.shape[1]), list(out_order))

    @torch.library.register_fake("saccade::row_outer")
    def _row_outer_fake(y: Tensor, x: Tensor) -> Tensor:
        return x.new_empty((x.shape[1], y.shape[-1], x.shape[-1]), dtype=accumulator(x.dtype))

    @torch.library.register_fake("saccade::weights")
    def _weights_fake(*args: Any) -> Tensor:
        return weights_result(args, _WEIGHTS)

    @torch.library.register_fake("saccade::forward_weights")
    def _forward_weights_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        named = {**dict(zip(_FORWARD_WEIGHTS, args, strict=True)), "lse": None}
        return *_forward_fake(*args[:-1]), _weights_fake(*(named[name] for name in _WEIGHTS))


def forward(
    spec: Spec, tensors: tuple[Tensor | None, ...], seed: Tensor | None, body: int
) -> tuple[Tensor, Tensor]:
    """`saccade::forward` on the tensors of `Problem.tensors`: (out, lse); its lse is fp64 for every dtype."""
    q, k, v, bias, *rest = taken_tensors(tensors)
    assert q is not None
    order = spec.layout.out_order or memory_order(q)
    call = call_arguments(spec, seed, body)
    return invoke("forward", q, k, v, expanded_bias(spec, bias), *rest, *call, order)


def forward_weights(
    spec: Spec, tensors: tuple[Tensor | None, ...], seed: Tensor | None, average: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`saccade::forward_weights`: (out, lse, weights), the last two as `forward` and `weights` give them."""
    q, k, v, bias, *rest = taken_tensors(tensors)
    assert q is not None
    order = spec.layout.out_order or memory_order(q)
    call = call_arguments(spec, seed, TILED)
    return invoke("forward_weights", q, k, v, expanded_bias(spec, bias), *rest, *call, order, average)


def backward(
    spec: Spec,
    grads: tuple[Tensor | None, ...],
    tensors: tuple[Tensor | None, ...],
    seed: Tensor | None,
    body_and_needs: tuple[int, int],
) -> tuple[Tensor, ...]:
    """`saccade::backward`; `grads` is dout, dlse, out, lse."""
    body, needs = body_and_needs
    taken, call = backward_tensors(spec, tensors), call_arguments(spec, seed, body)
    return invoke("backward", *grads, *taken, *call, needs, must_repeat(spec))


def must_repeat(spec: Spec) -> bool:
    """Whether results must repeat bitwise. The CPU's always do."""
    asked = spec.deterministic
    return torch.are_deterministic_algorithms_enabled() if asked is None else asked


def backward_tensors(spec: Spec, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The nine tensors as the backward operators take them."""
    q, k, v, bias, *rest = taken_tensors(tensors)
    if bias is not None and any(n != 1 and s == 0 for n, s in zip(bias.shape, bias.stride(), strict=True)):
        # The operator sums over stride 0, and a bias that came expanded wants its whole gradient. (A bias
        # without elements is contiguous whatever its strides.)
        bias = bias.clone(memory_format=torch.contiguous_format)
    return q, k, v, expanded_bias(spec, bias), *rest


def weights(
    spec: Spec, lse: Tensor, tensors: tuple[Tensor | None, ...], seed: Tensor | None, average: bool
) -> Tensor:
    """`saccade::weights`."""
    q, k, _, bias, rel_bias, weight, _, extra_k, _ = taken_tensors(tensors)
    call = call_arguments(spec, seed, TILED)[:-1]
    return invoke("weights", lse, q, k, expanded_bias(spec, bias), rel_bias, weight, extra_k, *call, average)


def gather_forward(
    spec: Spec,
    tensors: tuple[Tensor | None, ...],
    edge_terms: tuple[Tensor | None, ...],
    seed: Tensor | None,
    order: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """`saccade::gather_forward`; `edge_terms` is edge_bias, q W (an additive score's: W) and e."""
    call = call_arguments(spec, seed, GATHER)
    return invoke("gather_forward", *tensors, *call, *_edges(spec, edge_terms), order)


def gather_backward(
    spec: Spec,
    heads: tuple[Tensor | None, ...],
    tensors: tuple[Tensor | None, ...],
    edge_terms: tuple[Tensor | None, ...],
    seed: Tensor | None,
    needs: int,
) -> tuple[Tensor, ...]:
    """`saccade::gather_backward`; `heads` is dout, dlse, that of sum p e, out, lse, sum p e."""
    assert spec.args.graph is not None
    call = call_arguments(spec, seed, GATHER)
    columns = spec.args.graph.columns()
    return invoke("gather_backward", *heads, *tensors, *call, *_edges(spec, edge_terms), *columns, needs)


def row_map(x: Tensor, w: Tensor, base: Tensor | None, order: tuple[int, ...]) -> Tensor:
    """`saccade::row_map`: (base +) w [H, Dy, Dx] times the rows of x [B, H, N, Dx], in x's dtype."""
    return invoke("row_map", x, w, base, order)


def row_outer(y: Tensor, x: Tensor) -> Tensor:
    """`saccade::row_outer`: the sums of y x^T [H, Dy, Dx] over batch and rows; a row y of zeros adds 0."""
    return invoke("row_outer", y, x)


def _edges(spec: Spec, edge_terms: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    graph = spec.args.graph
    assert graph is not None
    return graph.indptr, graph.indices, graph.edge_ids, *edge_terms


def taken_tensors(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The nine tensors of these operators. q, k, v and the bias may have any strides; the kernels index the
    small terms as plain arrays."""
    if all(x is None for x in tensors[4:9]):
        return tensors[:9]
    return (*tensors[:4], *(None if x is None else x.contiguous() for x in tensors[4:9]))


def expanded_bias(spec: Spec, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.expand(spec.batch, spec.heads, spec.seqlen_q, spec.seqlen_k)
