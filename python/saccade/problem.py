"""Every check of shapes, dtypes and devices, once; what comes out is the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypedDict

import torch
from torch import Tensor

from . import position as positions
from .checks import finite, probability
from .dropout import as_seed
from .graph import Graph
from .masks import NO_MASK, Band, Causal, Dims, Mask, MaskArgs, Window
from .scores import Additive, GATv2

_NO_EDGES = (None, None)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = {"softmax": 0, "relu": 1, "sigmoid": 2, "softmax1": 3}
RELU, SOFTMAX1 = 1, 3
NORMALISED = (0, SOFTMAX1)
DOT, ADDITIVE = 0, 1
_CAUSAL = Causal()
_WIDE = {torch.float64: torch.float64}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over `dtype`: fp32, and fp64 for fp64."""
    return _WIDE.get(dtype, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How sequences lie in memory. Dense: nothing is set."""

    cu_seqlens_q: Tensor | None = None  # [B + 1] int64: packed sequences
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None  # [B] int64: a cache of which so many keys are in use
    page_table: Tensor | None = None  # [B, pages] int32: the cache is [num_pages, Hk, page_size, D]
    beam: Tensor | None = None  # [B, S] int32: key j of row b lies in cache row beam[b, j]
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    out_order: tuple[int, ...] | None = None  # the output's dimensions in memory, outermost first; None: as q

    @property
    def is_varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def is_dense(self) -> bool:
        return self.cu_seqlens_q is None and self.seqused_k is None


DENSE = Layout()


# Not frozen, which would make a small call 2 us slower; nothing changes one.
@dataclass(slots=True, eq=False)
class Spec:
    """A call without its differentiable tensors."""

    batch: int
    heads: int
    heads_k: int
    seqlen_q: int  # of the longest sequence where there are several
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    mask: Mask | None  # the definition, for the reference
    args: MaskArgs  # the same in the form of the operators
    score: int
    activation: int
    scale: float
    softcap: float  # 0: none
    slope: float
    dropout_p: float
    seed: Tensor | None
    layout: Layout
    deterministic: bool | None


@dataclass(slots=True, eq=False)
class Problem:
    """A checked call: q, k, v with a batch dimension (packed ones [total, H, D]), terms in the accumulator's
    dtype.
    """

    spec: Spec
    q: Tensor
    k: Tensor
    v: Tensor
    batched: bool
    bias: Tensor | None = None  # broadcasts to [B, H, Sq, Sk], 4-D, own dtype
    # By distance: [H, max_q + max_k - 1]. By query and clipped distance, R = 2c + 1: [B, H, Sq, R], packed
    # [H, total, R].
    rel_bias: Tensor | None = None
    weight: Tensor | None = None  # [H, D]
    sink: Tensor | None = None  # [H]
    extra_k: Tensor | None = None  # [H, D] dtype of q: one more key per head, seen by every query
    extra_v: Tensor | None = None  # [H, Dv]
    edge_bias: Tensor | None = None  # [1 or H, E] in the order in which the edges were given
    edge_attr: tuple[Tensor, Tensor] | None = None  # e [E, De], W [H, D, De]; an additive score's own, too
    position: positions.QueryRelative | None = None

    @staticmethod
    def of(  # noqa: PLR0913  the arguments of the public functions
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask | None = None,
        *,
        causal: bool = False,
        window: tuple[Any, Any] | None = None,
        bias: Tensor | None = None,
        edge_bias: Tensor | None = None,
        edge_attr: tuple[Tensor, Tensor] | None = None,
        position: positions.Position | None = None,
        scale: float | None = None,
        score: str | Additive | GATv2 = "dot",
        activation: str = "softmax",
        sink: Tensor | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
        seed: int | Tensor | None = None,
        return_lse: bool = False,
        deterministic: bool | None = None,
        extra_k: Tensor | None = None,
        extra_v: Tensor | None = None,
        layout: Layout = DENSE,
    ) -> Problem:
        """Check the arguments of `saccade.attention` and its kin. Raises TypeError or ValueError naming the
        argument.
        """
        q, k, v, batched = _check_tensors(q, k, v, layout)
        batch, heads, heads_k, seqlen_q, seqlen_k = _dims(q, k, v, layout)
        head_dim, head_dim_v = q.shape[-1], v.shape[-1]
        if causal is not False or window is not None or mask is not None:
            mask = join_mask(mask, causal, window)
        args = NO_MASK
        if mask is not None:
            if not layout.is_dense and any(isinstance(part, Graph) for part in mask.parts):
                raise ValueError("mask: a Graph serves dense calls only; pack graphs with Graph.batch")
            args = mask.static or mask.resolve(
                Dims(batch, heads, seqlen_q, seqlen_k, q.device, ragged=not layout.is_dense)
            )
        act = _activation(activation, return_lse, sink)
        code, slope = (DOT, 0.0) if score == "dot" else _score(score)
        dropout_p = 0.0 if dropout_p == 0.0 else probability("dropout_p", dropout_p)
        if seed is not None or dropout_p:
            seed = as_seed(seed, q.device)
        if not isinstance(deterministic, bool | None):
            raise TypeError(f"deterministic: expected a bool or None, got {type(deterministic).__name__}")
        spec = Spec(
            batch,
            heads,
            heads_k,
            seqlen_q,
            seqlen_k,
            head_dim,
            head_dim_v,
            mask,
            args,
            code,
            act,
            (head_dim**-0.5 if code == DOT else 1.0) if scale is None else _scale(scale, q.dtype),
            0.0 if softcap is None else _positive("softcap", softcap),
            slope,
            dropout_p,
            seed if dropout_p else None,
            layout,
            deterministic,
        )
        plain = (
            bias is None
            and sink is None
            and position is None
            and code == DOT
            and extra_k is None
            and extra_v is None
        )
        if plain and edge_bias is None and edge_attr is None:
            return Problem(spec, q, k, v, batched)
        return _with_terms(
            Problem(spec, q, k, v, batched),
            _Terms(bias, edge_bias, edge_attr, position, score, sink, extra_k, extra_v),
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The differentiable tensors the operators take, in their order."""
        return (
            self.q, self.k, self.v, self.bias, self.rel_bias, self.weight, self.sink,
            self.extra_k, self.extra_v, self.edge_bias, *(self.edge_attr or _NO_EDGES),
        )  # fmt: skip

    @property
    def has_edge_terms(self) -> bool:
        return self.edge_bias is not None or self.edge_attr is not None


@dataclass(slots=True)
class _Terms:
    bias: Any
    edge_bias: Any
    edge_attr: Any
    position: Any
    score: Any
    sink: Any
    extra_k: Any
    extra_v: Any


class Options(TypedDict, total=False):
    """What the public functions take besides tensors, mask, return_lse and backend; see `attention`."""

    causal: bool
    window: tuple[Any, Any] | None
    bias: Tensor | None
    edge_bias: Tensor | None
    edge_attr: tuple[Tensor, Tensor] | None
    position: positions.Position | None
    scale: float | None
    score: str | Additive | GATv2
    activation: str
    sink: Tensor | None
    softcap: float | None
    dropout_p: float
    seed: int | Tensor | None
    deterministic: bool | None


_OPTIONS = frozenset(Options.__annotations__)
_SMALLEST = torch.finfo(torch.float32).tiny


def check_options(function: str, options: Any) -> None:
    """TypeError for keywords that `function` does not have, as Python words it."""
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def join_mask(mask: Any, causal: Any, window: Any) -> Mask | None:
    """The mask with its sugar joined to it."""
    if mask is not None and not isinstance(mask, Mask):
        hint = (
            " (a dense boolean is Graph.from_dense(mask), a float one is bias=)"
            if isinstance(mask, Tensor)
            else ""
        )
        raise TypeError(f"mask: expected a saccade.Mask, got {type(mask).__name__}{hint}")
    if isinstance(causal, Tensor | Mask | str):
        raise TypeError(f"causal: expected a bool, got {type(causal).__name__}")
    if causal:
        mask = _CAUSAL if mask is None else mask & _CAUSAL
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2:
            raise TypeError(f"window: expected a pair (left, right), got {window!r}")
        plain = all(x is None or type(x) is int for x in window) and not torch.compiler.is_compiling()
        band = _window(*window) if plain else Window(*window)
        mask = band if mask is None else mask & band
    return mask


@lru_cache(maxsize=256, typed=True)
def _window(left: int | None, right: int | None) -> Band:
    return Window(left, right)


def _check_tensors(q: Any, k: Any, v: Any, layout: Layout) -> tuple[Tensor, Tensor, Tensor, bool]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.is_nested or x.layout is not torch.strided:
            raise TypeError(f"{name}: expected a {_wanted(x)}")
    if is_autocast(q.device.type):
        q, k, v = (autocast(x) for x in (q, k, v))
    dtype, device, ndim = q.dtype, q.device, q.dim()
    if dtype not in DTYPES:
        raise ValueError(f"q: expected dtype float64, float32, bfloat16 or float16, got {dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != dtype:
            raise ValueError(f"{name}: expected the dtype of q, {dtype}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name}: expected the device of q, {device}, got {x.device}")
    if ndim not in ((3,) if layout.is_varlen else (3, 4)):
        shapes = "[total, H, D]" if layout.is_varlen else "[B, H, Sq, D] or [H, Sq, D]"
        raise ValueError(f"q: expected shape {shapes}, got {list(q.shape)}")
    _check_ndim(k, v, ndim)
    if ndim == 4 or layout.is_varlen:
        return q, k, v, True
    return q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), False


def _wanted(x: Any) -> str:
    if not isinstance(x, Tensor):
        return f"tensor, got {type(x).__name__}"
    if x.is_nested:
        return "dense tensor, got a nested one (saccade.nn and attention_varlen take packed sequences)"
    return f"dense tensor, got {x.layout}"


def _check_ndim(k: Tensor, v: Tensor, ndim: int) -> None:
    for name, x in (("k", k), ("v", v)):
        if x.dim() != ndim:
            raise ValueError(f"{name}: expected {ndim} dimensions as in q, got shape {list(x.shape)}")


def is_autocast(kind: str) -> bool:
    """Whether autocast is on for this type of device; torch raises where it knows none."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(x: Tensor) -> Tensor:
    """Cast as torch casts the arguments of its scaled_dot_product_attention; fp64 stays."""
    kind = x.device.type
    if x.dtype == torch.float64 or not x.is_floating_point() or not is_autocast(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _dims(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[int, int, int, int, int]:
    qs, ks = q.shape, k.shape
    if layout.is_varlen:
        assert layout.cu_seqlens_q is not None
        batch, seqlen_q, seqlen_k = layout.cu_seqlens_q.shape[0] - 1, layout.max_seqlen_q, layout.max_seqlen_k
    else:
        batch, seqlen_q, seqlen_k = qs[0], qs[2], layout.max_seqlen_k or ks[2]
        if ks[0] != batch and layout.page_table is None and layout.beam is None:
            raise ValueError(f"k: expected batch {batch} as in q, got shape {list(ks)}")
    heads, heads_k = qs[1], ks[1]
    if heads_k != heads and (heads_k == 0 or heads % heads_k):
        raise ValueError(f"k: expected a number of heads that divides the {heads} of q, got {heads_k}")
    if ks[-1] != qs[-1] or qs[-1] < 1:
        raise ValueError(f"k: expected the head dimension of q (at least 1), {qs[-1]}, got {ks[-1]}")
    if v.shape[:-1] != ks[:-1] or v.shape[-1] < 1:
        shape = ", ".join(map(str, (*ks[:-1], "Dv")))
        raise ValueError(f"v: expected shape [{shape}] as in k, got {list(v.shape)}")
    return batch, heads, heads_k, seqlen_q, seqlen_k


def _activation(name: object, return_lse: bool, sink: object) -> int:
    code = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if code is None:
        if not isinstance(name, str):
            raise TypeError(f"activation: expected a string, got {type(name).__name__}")
        raise ValueError(f"activation: expected one of {list(ACTIVATIONS)}, got {name!r}")
    if return_lse and code not in NORMALISED:
        raise ValueError(f"return_lse: {name} weights are not normalised and have no lse")
    if sink is not None and code != 0:
        raise ValueError(f"sink: belongs to the softmax activation, got {name!r}")
    return code


def _score(score: object) -> tuple[int, float]:
    if isinstance(score, Additive | GATv2):
        return score.code, score.slope
    if isinstance(score, str):
        raise ValueError(f'score: expected "dot", Additive(weight) or GATv2(weight, slope), got {score!r}')
    raise TypeError(
        f'score: expected "dot", Additive(weight) or GATv2(weight, slope), got {type(score).__name__}'
    )


def _scale(value: Any, dtype: torch.dtype) -> float:
    """0 where the arithmetic of `dtype` has no such small number."""
    number = finite("scale", value)
    return number if dtype == torch.float64 or abs(number) >= _SMALLEST else 0.0


def _positive(name: str, value: Any) -> float:
    number = finite(name, value)
    if number < _SMALLEST:
        raise ValueError(f"{name}: expected a positive number that fp32 holds, or None, got {value}")
    return number


def _with_terms(problem: Problem, terms: _Terms) -> Problem:
    from .terms import resolve_terms

    return resolve_terms(problem, terms)
