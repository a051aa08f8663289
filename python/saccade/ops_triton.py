"""The operators of the Triton kernels, `torch.ops.saccade.triton_*`: the same contracts as those of `ops`,
for CUDA tensors, and for CPU tensors under Triton's interpreter.

They are opaque to torch.compile, which never looks at Triton: its interpreter could not run on fake tensors.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from . import ops
from .kernels.config import ITEM
from .layout import memory_order
from .ops import (
    DECODE,
    GATHER,
    TILED,
    backward_results,
    forward_results,
    gather_gradients,
    gather_results,
    weights_result,
)
from .problem import Spec

FOUND = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # as Triton reads it when a kernel is declared

_MASK = (
    "Tensor? seed, Tensor? head_bounds, Tensor? lengths, Tensor? keep, Tensor? q_ids, Tensor? k_ids, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? page_table, Tensor? beam, "
    "Tensor[] tiles, SymInt[] band, SymInt[] chunks, SymInt max_seqlen_q, SymInt max_seqlen_k, int score, "
    "int activation, float scale, float softcap, float slope, float dropout_p, int body"
)
_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? rel_bias, Tensor? weight, Tensor? sink, "
    f"Tensor? extra_k, Tensor? extra_v, {_MASK}"
)
_EIGHT = ", ".join(["Tensor"] * 8)
_LIBRARY = torch.library.Library("saccade", "FRAGMENT")
_LIBRARY.define(f"triton_forward({_CALL}, int[] out_order) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"triton_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_CALL}, int needs) -> ({_EIGHT})"
)
_LIBRARY.define(f"triton_weights(Tensor lse, {_CALL}, bool average) -> Tensor")
_EDGES = (
    "Tensor[] work, Tensor keys, Tensor? edge_ids, Tensor? edge_bias, Tensor? edge_q, Tensor? edge_x, "
    "SymInt num_edges"
)
_LIBRARY.define(f"triton_gather_forward({_CALL}, {_EDGES}, int[] out_order) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "triton_gather_backward(Tensor dout, Tensor? dlse, Tensor? dout_edge, Tensor out, Tensor lse, "
    f"Tensor out_edge, {_CALL}, {_EDGES}, Tensor[] key_work, Tensor key_rows, Tensor key_ids, Tensor rows, "
    f"int needs) -> ({', '.join(['Tensor'] * 7)})"
)
_FORWARD, _BACKWARD, _WEIGHTS = map(ops.places, ("triton_forward", "triton_backward", "triton_weights"))
_GATHER, _GATHER_BACKWARD = map(ops.places, ("triton_gather_forward", "triton_gather_backward"))
_DEVICES = ("CPU", "CUDA")
_TILES = _FORWARD["tiles"] - _FORWARD["seed"]


@torch.library.register_fake("saccade::triton_forward")
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return forward_results(args, _FORWARD)


@torch.library.register_fake("saccade::triton_backward")
def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return backward_results(args, _BACKWARD)


@torch.library.register_fake("saccade::triton_weights")
def _weights_fake(*args: Any) -> Tensor:
    return weights_result(args, _WEIGHTS)


@torch.library.register_fake("saccade::triton_gather_forward")
def _gather_forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return gather_results(args, _GATHER)


@torch.library.register_fake("saccade::triton_gather_backward")
def _gather_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return gather_gradients(args, _GATHER_BACKWARD)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    from .kernels import decode, launch
    from .kernels.call import Call

    out, lse = forward_results(args, _FORWARD)
    call = Call(*args[: _FORWARD["out_order"]])
    (decode if call.body == DECODE else launch).forward(call, out, lse)
    return out, lse


def _backward(*args: Any) -> tuple[Tensor, ...]:
    from .kernels import launch
    from .kernels.call import Call

    grads = backward_results(args, _BACKWARD)
    dout, dlse, out, lse = args[:4]
    launch.backward(Call(*args[4:-1]), dout, dlse, out, lse, grads, args[-1])
    return grads


def _weights(*args: Any) -> Tensor:
    from .kernels import weights as kernel
    from .kernels.call import Call

    found = weights_result(args, _WEIGHTS)
    kernel.weights(Call(*args[1:-1]), args[0], found, args[-1])
    return found


def _gather_call(args: tuple[Any, ...], at: dict[str, int]) -> Any:
    from .kernels.launch_gather import GatherCall

    first, last = at["q"], at["num_edges"] + 1
    return GatherCall.of(args[first : at["work"]], args[at["work"] : last])


def _gather_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels import launch_gather

    out, lse, mixed = gather_results(args, _GATHER)
    launch_gather.forward(_gather_call(args, _GATHER), out, lse, mixed)
    return out, lse, mixed


def _gather_backward(*args: Any) -> tuple[Tensor, ...]:
    from .kernels import launch_gather

    at = _GATHER_BACKWARD
    grads = gather_gradients(args, at)
    launch_gather.backward(_gather_call(args, at), args[:5], args[at["key_work"] : at["needs"]], grads)
    return grads


for _name, _kernel in (
    ("triton_forward", _forward),
    ("triton_backward", _backward),
    ("triton_weights", _weights),
    ("triton_gather_forward", _gather_forward),
    ("triton_gather_backward", _gather_backward),
):
    for _device in _DEVICES:
        _LIBRARY.impl(_name, _kernel, _device)


def call_arguments(spec: Spec, seed: Tensor | None, body: int) -> tuple[Any, ...]:
    """As `ops.call_arguments`, with a graph's tiles and the chunks as lists."""
    *plain, _ = ops.call_arguments(spec, seed, GATHER)  # that body has no tiles: their three places are empty
    args = spec.args
    tiles = [] if args.graph is None or body == GATHER else args.graph.tile_lists(args.is_graph_alone)
    return (*plain[:_TILES], tiles, args.band, args.chunks, *plain[_TILES + 5 :], body)


def forward(
    spec: Spec, tensors: tuple[Tensor | None, ...], seed: Tensor | None, body: int
) -> tuple[Tensor, Tensor]:
    """`ops.forward` by the Triton kernels."""
    q, k, v, bias, *rest = ops.taken_tensors(tensors)
    assert q is not None
    order = spec.layout.out_order or memory_order(q)
    call = call_arguments(spec, seed, body)
    return ops.invoke("triton_forward", q, k, v, ops.expanded_bias(spec, bias), *rest, *call, order)


def backward(
    spec: Spec,
    grads: tuple[Tensor | None, ...],
    tensors: tuple[Tensor | None, ...],
    seed: Tensor | None,
    body_and_needs: tuple[int, int],
) -> tuple[Tensor, ...]:
    """`ops.backward` by the Triton kernels."""
    body, needs = body_and_needs
    call = call_arguments(spec, seed, body)
    taken = ops.backward_tensors(spec, tensors)
    return ops.invoke("triton_backward", *grads, *taken, *call, needs)


def weights(
    spec: Spec, lse: Tensor, tensors: tuple[Tensor | None, ...], seed: Tensor | None, average: bool
) -> Tensor:
    """`ops.weights` by the Triton kernels."""
    q, k, v, bias, *rest = ops.taken_tensors(tensors)
    call = call_arguments(spec, seed, TILED)
    return ops.invoke("triton_weights", lse, q, k, v, ops.expanded_bias(spec, bias), *rest, *call, average)


def gather_forward(
    spec: Spec,
    tensors: tuple[Tensor | None, ...],
    edge_terms: tuple[Tensor | None, ...],
    seed: Tensor | None,
    order: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.gather_forward` by the Triton kernels."""
    call = call_arguments(spec, seed, GATHER)
    edges = _edges(spec, edge_terms)
    return ops.invoke("triton_gather_forward", *tensors, *call, *edges, order)


def gather_backward(
    spec: Spec,
    heads: tuple[Tensor | None, ...],
    tensors: tuple[Tensor | None, ...],
    edge_terms: tuple[Tensor | None, ...],
    seed: Tensor | None,
    needs: int,
) -> tuple[Tensor, ...]:
    """`ops.gather_backward` by the Triton kernels."""
    graph = spec.args.graph
    assert graph is not None
    call = call_arguments(spec, seed, GATHER)
    by_key = (graph.work(ITEM, True), graph.columns()[1], graph.column_ids(), graph.rows.int())
    return ops.invoke(
        "triton_gather_backward", *heads, *tensors, *call, *_edges(spec, edge_terms), *by_key, needs
    )


def _edges(spec: Spec, edge_terms: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    graph = spec.args.graph
    assert graph is not None
    return graph.work(ITEM, False), graph.indices, graph.edge_ids, *edge_terms, graph.num_edges
