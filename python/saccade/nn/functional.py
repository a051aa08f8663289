"""`multi_head_attention_forward`: torch's function with the kernels of this package."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function

from ..masks import Mask
from . import _checks
from ._core import attend_heads
from ._projections import project
from .attention import MultiheadAttention

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    mask: Mask | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward` through `saccade.attention`: torch's arguments, in
    torch's order, and results, in the safe form of `MultiheadAttention`.

    Shapes: query (L, N, E) or (L, E), key and value alike with S; in_proj_weight (3 E, E), or with
    use_separate_proj_weight q_proj_weight (E, E), k_proj_weight (E, kdim), v_proj_weight (E, vdim);
    in_proj_bias (3 E,); bias_k, bias_v (1, 1, E) or (E,), one more key of every head; static_k, static_v
    (N * H, S, E / H), used in place of the projected ones; masks as `MultiheadAttention` takes them.
    `mask`: a saccade.Mask that must hold too.

    Returns the output, like query, and with `need_weights` the weights after dropout: (N, L, S'), or
    (N, H, L, S') unless averaged, without N where query has none. Tensors with a __torch_function__ of their
    own go to torch's function.

    Raises torch's errors.
    """
    tensors = (
        query,
        key,
        value,
        in_proj_weight,
        in_proj_bias,
        bias_k,
        bias_v,
        out_proj_weight,
        out_proj_bias,
    )
    if mask is None and has_torch_function(tensors):
        return F.multi_head_attention_forward(
            query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
            add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training, key_padding_mask,
            need_weights, attn_mask, use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight,
            static_k, static_v, average_attn_weights, is_causal,
        )  # fmt: skip
    module = SimpleNamespace(
        embed_dim=embed_dim_to_check,
        num_heads=num_heads,
        num_kv_heads=None,
        head_dim=embed_dim_to_check // num_heads,
        batch_first=False,
        in_proj_weight=None if use_separate_proj_weight else in_proj_weight,
        in_proj_bias=in_proj_bias,
        q_proj_weight=q_proj_weight,
        k_proj_weight=k_proj_weight,
        v_proj_weight=v_proj_weight,
        bias_k=bias_k,
        bias_v=bias_v,
        add_zero_attn=add_zero_attn,
        dropout=dropout_p,
        training=training,
        out_proj=SimpleNamespace(weight=out_proj_weight, bias=out_proj_bias),
        **_DEFAULTS,
    )
    batched = _checks.check_inputs(
        module, (query, key, value), (key_padding_mask, attn_mask), is_causal, frames=2
    )
    _check_parameters(module, use_separate_proj_weight, static_k, static_v)
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    q, k, v = project(module, query, key, value)  # [L, N, H, D]
    static = (("static_k", static_k), ("static_v", static_v))
    fixed_k, fixed_v = (_fixed(n, x, query.shape[1], module) for n, x in static)
    qkv = (q, k if fixed_k is None else fixed_k, v if fixed_v is None else fixed_v)
    flags = (need_weights, average_attn_weights)
    out, weights = attend_heads(module, qkv, (key_padding_mask, attn_mask), flags, is_causal, mask, False)
    if batched:
        return out, weights
    return out.squeeze(1), None if weights is None else weights.squeeze(0)


# What a module without further arguments has.
_DEFAULTS: dict[str, Any] = {
    n: getattr(MultiheadAttention, n)
    for n in ("window", "_window", "activation", "score", "qk_norm", "_has_extras")
}


def _check_parameters(module: Any, separate: bool, static_k: Tensor | None, static_v: Tensor | None) -> None:
    if module.head_dim * module.num_heads != module.embed_dim:
        raise AssertionError(f"embed_dim {module.embed_dim} not divisible by num_heads {module.num_heads}")
    for name in _SEPARATE if separate else ("in_proj_weight",):
        if getattr(module, name) is None:
            raise AssertionError(f"use_separate_proj_weight is {separate} but {name} is None")
    for name, other in (("bias_k", "bias_v"), ("bias_v", "bias_k")):
        if getattr(module, name) is not None and getattr(module, other) is None:
            raise AssertionError(f"{name} is set but {other} is None")
    if module.bias_k is not None:
        for name, x in (("key", static_k), ("value", static_v)):
            if x is not None:
                raise AssertionError(f"bias cannot be added to static {name}.")


def _fixed(name: str, x: Tensor | None, batch: int, module: Any) -> Tensor | None:
    """(N * H, S, D) as [S, N, H, D]."""
    if x is None:
        return None
    heads, dim = module.num_heads, module.head_dim
    for axis, size in ((0, batch * heads), (2, dim)):
        if x.size(axis) != size:
            raise AssertionError(f"expecting {name}.size({axis}) of {size}, but got {x.size(axis)}")
    return x.unflatten(0, (batch, heads)).permute(2, 0, 1, 3)
