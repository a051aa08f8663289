"""The checks of what joins the scores: bias, sink, positions, score weights, edge terms, the extra key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .position import DistanceBias, Position, QueryRelative, RoPE, Shaw
from .problem import DOT, Problem, Spec, accumulator, autocast


def resolve_terms(problem: Problem, terms: Any) -> Problem:
    """`problem` with the terms in the form every backend takes."""
    spec, q = problem.spec, problem.q
    wide = accumulator(q.dtype)
    found: dict[str, Any] = {}
    if terms.bias is not None:
        found["bias"] = _bias(terms.bias, problem)
    if terms.sink is not None:
        _float("sink", terms.sink, q)
        _shape("sink", terms.sink, (spec.heads,))
        found["sink"] = terms.sink.to(wide)
    if spec.score != DOT:
        weight = terms.score.weight
        _float("score's weight", weight, q)
        _shape("score's weight", weight, (spec.heads, spec.head_dim)[2 - weight.dim() :])
        found["weight"] = weight.to(wide).expand(spec.heads, spec.head_dim)
    if terms.position is not None:
        found.update(_position(terms.position, problem))
    if terms.extra_k is not None or terms.extra_v is not None:
        found.update(_extra(terms.extra_k, terms.extra_v, problem))
    edge_attr = terms.edge_attr
    if spec.score != DOT:
        if edge_attr is not None:
            raise ValueError("edge_attr: needs the dot score; others bring theirs: GATv2(w, edge_attr=...)")
        edge_attr = terms.score.edge_attr
    found.update(_edges(terms.edge_bias, edge_attr, problem))
    return replace(problem, **found)


def _float(name: str, value: Any, q: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise ValueError(f"{name}: expected a float dtype, got {value.dtype}")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {value.device}")


def _shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def _bias(bias: Any, problem: Problem) -> Tensor:
    spec = problem.spec
    if isinstance(bias, Tensor) and bias.dtype == torch.bool:
        raise ValueError(
            "bias: expected a float dtype, got torch.bool; a boolean mask is a Graph.from_dense(mask)"
        )
    _float("bias", bias, problem.q)
    if not spec.layout.is_dense:
        raise ValueError(
            "bias: serves dense calls only; packed sequences and caches take position= and masks"
        )
    full = (spec.batch, spec.heads, spec.seqlen_q, spec.seqlen_k)
    padded = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if bias.dim() > 4 or any(n != 1 and n != want for n, want in zip(padded, full, strict=True)):
        raise ValueError(f"bias: expected a shape that broadcasts to {list(full)}, got {list(bias.shape)}")
    return bias[(None,) * (4 - bias.dim())]


def _position(term: Any, problem: Problem) -> dict[str, Any]:
    spec, q = problem.spec, problem.q
    if not isinstance(term, Position):
        raise TypeError(
            f"position: expected ALiBi, T5, Shaw, TransformerXL or RoPE, got {type(term).__name__}"
        )
    for tensor in term.tensors():
        _float(f"position ({type(term).__name__})", tensor, q)
    if isinstance(term, DistanceBias):
        return {"rel_bias": term.table(spec.heads, spec.seqlen_q, spec.seqlen_k, accumulator(q.dtype))}
    if isinstance(term, RoPE):
        q_at, k_at = token_positions(spec, q, problem.k)
        return {"q": term.rotate(q, q_at), "k": problem.k if k_at is None else term.rotate(problem.k, k_at)}
    if spec.score != DOT:
        raise ValueError(f"position: {type(term).__name__} needs the dot score")
    if isinstance(term, Shaw):
        term.check(spec.heads, spec.head_dim)
        # Lengths that torch.compile leaves open must stay so.
        longest = None if torch.compiler.is_compiling() else max(spec.seqlen_q, spec.seqlen_k)
        return {"rel_bias": term.products(q, spec.scale, longest, accumulator(q.dtype))}
    assert isinstance(term, QueryRelative)
    term.check(spec.heads, spec.head_dim, spec.seqlen_q, spec.seqlen_k)
    return {"position": term}


def token_positions(spec: Spec, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """Positions that broadcast to q's and k's shapes up to the head dimension; None for a cache, turned when
    filled.
    """
    layout = spec.layout
    if layout.is_varlen:
        assert layout.cu_seqlens_q is not None and layout.cu_seqlens_k is not None
        q_seq, q_at = _packed_positions(layout.cu_seqlens_q, q.shape[0])
        _, k_at = _packed_positions(layout.cu_seqlens_k, k.shape[0])
        shift = layout.cu_seqlens_k.diff() - layout.cu_seqlens_q.diff()
        return (q_at + shift[q_seq])[:, None], k_at[:, None]
    steps = torch.arange(spec.seqlen_q, device=q.device)
    if layout.seqused_k is not None:
        return (layout.seqused_k[:, None] - spec.seqlen_q + steps)[:, None], None
    return steps + (spec.seqlen_k - spec.seqlen_q), torch.arange(spec.seqlen_k, device=q.device)


def _packed_positions(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    rows = torch.arange(total, device=cu_seqlens.device)
    sequence = (torch.searchsorted(cu_seqlens, rows, right=True) - 1).clamp_(
        0, max(cu_seqlens.shape[0] - 2, 0)
    )
    return sequence, rows - cu_seqlens[sequence]


def _extra(extra_k: Any, extra_v: Any, problem: Problem) -> dict[str, Any]:
    spec, q = problem.spec, problem.q
    found = {}
    for name, value, width in (("extra_k", extra_k, spec.head_dim), ("extra_v", extra_v, spec.head_dim_v)):
        _float(name, value, q)
        value = autocast(value)
        _shape(name, value, (spec.heads, width))
        if value.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {value.dtype}")
        found[name] = value
    return found


def _edges(edge_bias: Any, edge_attr: Any, problem: Problem) -> dict[str, Any]:
    spec, q = problem.spec, problem.q
    if edge_bias is None and edge_attr is None:
        return {}
    graph = spec.args.graph
    if graph is None:
        raise ValueError(f"{'edge_attr' if edge_bias is None else 'edge_bias'}: needs a Graph in the mask")
    found: dict[str, Any] = {}
    if edge_bias is not None:
        _float("edge_bias", edge_bias, q)
        if tuple(edge_bias.shape) not in ((graph.num_edges,), (spec.heads, graph.num_edges)):
            shapes = f"[{graph.num_edges}] or [{spec.heads}, {graph.num_edges}]"
            raise ValueError(f"edge_bias: expected shape {shapes}, got {list(edge_bias.shape)}")
        edge_bias = edge_bias.to(accumulator(q.dtype))
        found["edge_bias"] = edge_bias if edge_bias.dim() == 2 else edge_bias[None]
    if edge_attr is not None:
        if not isinstance(edge_attr, tuple | list) or len(edge_attr) != 2:
            raise TypeError(f"edge_attr: expected a pair (e, W), got {type(edge_attr).__name__}")
        features, weight = edge_attr
        _float("edge_attr's e", features, q)
        _float("edge_attr's W", weight, q)
        if spec.score == DOT and spec.head_dim_v != spec.head_dim:
            raise ValueError(f"edge_attr: needs Dv == D, got {spec.head_dim_v} and {spec.head_dim}")
        if features.dim() != 2 or features.shape[0] != graph.num_edges:
            raise ValueError(
                f"edge_attr's e: expected shape [{graph.num_edges}, De], got {list(features.shape)}"
            )
        _shape("edge_attr's W", weight, (spec.heads, spec.head_dim, features.shape[1]))
        found["edge_attr"] = (features, weight)
    return found
