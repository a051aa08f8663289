"""The constructor's arguments beyond torch's: their checks, and the parameters they add or resize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..checks import is_int
from ..masks import Band, Window
from ..position import Position
from ..problem import ACTIVATIONS
from ..scores import Additive, GATv2
from ._held import Held

_EPS = 1e-6  # of the query and key norms
_DEFAULTS = {"activation": "softmax", "score": "dot"}


def check_heads(num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> None:
    """The sizes that torch's constructor does not have."""
    for name, value in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        if value is not None and not is_int(value):
            raise TypeError(f"{name}: expected an int or None, got {type(value).__name__}")
        if value is not None and value <= 0:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if num_kv_heads is not None and num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: expected a divisor of the {num_heads} heads, got {num_kv_heads}")


def resize(module: Any, num_kv_heads: int | None, head_dim: int | None, factory: dict[str, Any]) -> None:
    """Projections for other numbers of heads: (H + 2 Hk) D rows in q, k, v order; H D inputs of out_proj."""
    heads, heads_k = module.num_heads, num_kv_heads or module.num_heads
    module.num_kv_heads = num_kv_heads
    module.head_dim = head_dim or module.embed_dim // heads
    wide, narrow = heads * module.head_dim, heads_k * module.head_dim

    def empty(*size: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(size, **factory))

    if module.in_proj_weight is not None:
        module.in_proj_weight = empty(wide + 2 * narrow, module.embed_dim)
    else:
        module.q_proj_weight = empty(wide, module.embed_dim)
        module.k_proj_weight = empty(narrow, module.kdim)
        module.v_proj_weight = empty(narrow, module.vdim)
    with_bias = module.in_proj_bias is not None
    if with_bias:
        module.in_proj_bias = empty(wide + 2 * narrow)
    if module.bias_k is not None:
        module.bias_k, module.bias_v = empty(1, 1, narrow), empty(1, 1, narrow)
    module.out_proj = NonDynamicallyQuantizableLinear(wide, module.embed_dim, bias=with_bias, **factory)


def add(module: Any, extras: dict[str, Any], factory: dict[str, Any]) -> bool:
    """Give `module` the arguments that are not the default; whether there are any."""
    found = {
        n: x
        for n, x in extras.items()
        if not (x is None or x is False or isinstance(x, str) and x == _DEFAULTS.get(n))
    }
    for name, value in found.items():
        if name == "window":
            set_window(module, value)
        elif name == "activation":
            set_activation(module, value)
        elif name == "score":
            set_score(module, value, factory)
        elif name == "qk_norm":
            if value is not True:
                raise TypeError(f"qk_norm: expected a bool, got {type(value).__name__}")
            set_norms(module, factory)
        else:
            module.position_term = _submodule("position", value, (Position,))
    return bool(found)


def set_window(module: Any, window: Any) -> None:
    """Bounds that are tensors [H] become buffers outside the state_dict."""
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window: expected a pair (left, right), got {window!r}")
    made = Window(*window)
    if made.num_heads not in (None, module.num_heads):
        raise ValueError(f"window: expected bounds for {module.num_heads} heads, got {made.num_heads}")
    module.window = tuple(window)
    if made.num_heads is None:
        module._window = made
        return
    for name, bound in zip(("window_left", "window_right"), (made.left, made.right), strict=True):
        if isinstance(bound, Tensor):
            module.register_buffer(name, bound, persistent=False)


def get_window(module: Any) -> Band | None:
    """The band of the module's window."""
    if module.window is None or module._window is not None:
        return module._window
    return Band(
        *(
            module._buffers.get(f"window_{n}", x)
            for n, x in zip(("left", "right"), module.window, strict=True)
        )
    )


def refuse_extra_key(name: str, *modules: Any) -> None:
    """For what runs a module in pieces: add_bias_kv and add_zero_attn put keys beside those of the input."""
    if any(module.bias_k is not None or module.add_zero_attn for module in modules):
        raise ValueError(f"{name}: add_bias_kv and add_zero_attn do not run in pieces")


def set_activation(module: Any, activation: Any) -> None:
    if not isinstance(activation, str):
        raise TypeError(f"activation: expected a string, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {list(ACTIVATIONS)}, got {activation!r}")
    if module.add_zero_attn and activation != "softmax":
        raise ValueError(f"add_zero_attn: belongs to the softmax activation, got {activation!r}")
    module.activation = activation


def set_score(module: Any, score: Any, factory: dict[str, Any]) -> None:
    """ "additive" makes its weight [H, D] here; a score object brings its own."""
    if isinstance(score, str) and score == "additive":
        score = Additive(nn.Parameter(torch.empty(module.num_heads, module.head_dim, **factory)))
        module.score = "additive"
    elif isinstance(score, str):
        raise ValueError(f'score: expected "dot", "additive", a score or a callable, got {score!r}')
    else:
        module.score = type(score).__name__
    module.score_term = _submodule("score", score, (Additive, GATv2))


def _submodule(name: str, value: Any, kinds: tuple[type, ...]) -> Any:
    if isinstance(value, kinds):
        return Held(value)
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return value
    raise TypeError(
        f"{name}: expected {' or '.join(k.__name__ for k in kinds)} or a callable, got {type(value).__name__}"
    )


def set_norms(module: Any, factory: dict[str, Any]) -> None:
    """RMS norms of every head's queries and keys, each with a weight [D] (after 2302.05442)."""
    module.qk_norm = True
    module.q_norm = nn.RMSNorm(module.head_dim, eps=_EPS, **factory)
    module.k_norm = nn.RMSNorm(module.head_dim, eps=_EPS, **factory)


def terms(module: Any, seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
    """activation, score and position as `saccade.attention` takes them, where they are not the default."""
    found: dict[str, Any] = {}
    if module.add_zero_attn:
        found["activation"] = "softmax1"
    elif module.activation != "softmax":
        found["activation"] = module.activation
    if module.score != "dot":
        found["score"] = module.score_term()
    position = getattr(module, "position_term", None) if module._has_extras else None
    if position is not None:
        found["position"] = position() if isinstance(position, Held) else position(seqlen_q, seqlen_k)
    return found
