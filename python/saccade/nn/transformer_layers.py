"""`TransformerEncoderLayer` and `TransformerDecoderLayer`: torch's, on this package's attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..masks import Mask
from . import _nested
from ._causal import is_causal_mask
from ._masks import _HINT, join
from .attention import MultiheadAttention

F: Any = functional  # _canonical_mask is private to torch and not in its stubs
AnyMask = Tensor | Mask | None
Activation = str | Callable[[Tensor], Tensor]

_EXTRAS = {
    "window": None, "num_kv_heads": None, "head_dim": None, "score": "dot", "attention_activation": "softmax",
    "qk_norm": False, "position": None, "compat": "safe",
}  # fmt: skip
_OF_ONE_SEQUENCE = ("window", "position")  # what relates places of one sequence: not for cross-attention


def check_extras(extras: dict[str, Any]) -> dict[str, Any]:
    """Arguments of MultiheadAttention, those that are not the default."""
    for name in extras:
        if name not in _EXTRAS:
            raise TypeError(f"{name}: unexpected argument; beyond torch's there are {', '.join(_EXTRAS)}")
    return {
        "activation" if name == "attention_activation" else name: x
        for name, x in extras.items()
        if not (x is None or x is False or isinstance(x, str) and x == _EXTRAS[name])
    }


def _ours(made: Any, num_heads: int, extras: dict[str, Any], factory: dict[str, Any]) -> MultiheadAttention:
    """torch's freshly made attention as ours: the same object, unless it is to be another."""
    if not extras:
        made.__class__ = MultiheadAttention  # what it lacks are class attributes, at torch's meaning
        return made
    options = (made.dropout, made.in_proj_bias is not None)
    first = made.batch_first
    return MultiheadAttention(made.embed_dim, num_heads, *options, batch_first=first, **factory, **extras)


def check_dtypes(**masks: Any) -> None:
    for name, mask in masks.items():
        if isinstance(mask, Tensor) and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported")


def as_floats(key_padding_mask: Tensor | None, attn_mask: AnyMask, dtype: torch.dtype, name: str) -> Any:
    """Both masks as torch hands them to its layers and blocks: added floats."""
    if isinstance(attn_mask, Mask):
        raise TypeError(f"{name}: a saccade.Mask is for saccade's own layers, here there is another's")
    padding = F._canonical_mask(
        key_padding_mask, "src_key_padding_mask", F._none_or_dtype(attn_mask), name, dtype
    )
    return padding, F._canonical_mask(attn_mask, name, None, "", dtype, check_other=False)


def split_mask(attn_mask: AnyMask, mask: Mask | None) -> tuple[Tensor | None, dict[str, Mask]]:
    """The tensor, and what else must hold as a keyword: none where there is nothing, for overridden blocks."""
    if isinstance(attn_mask, Mask):
        attn_mask, mask = None, join(attn_mask, mask)
    return attn_mask, {} if mask is None else {"mask": mask}


def _attend(
    attention: Any,
    inputs: tuple[Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None],
    is_causal: bool,
    mask: Mask | None,
) -> Tensor:
    """Attention of (query, memory); `masks` is (key_padding_mask, attn_mask)."""
    query, memory = inputs
    padding, attn_mask = masks
    if is_causal and attn_mask is not None and _only_causal(attention, inputs, attn_mask):
        attn_mask, is_causal, mask = None, False, join(_HINT, mask)
    options: dict[str, Any] = {} if mask is None else {"mask": mask}
    out, _ = attention(
        query, memory, memory,
        attn_mask=attn_mask, key_padding_mask=padding, is_causal=is_causal, need_weights=False, **options,
    )  # fmt: skip
    return out


def _only_causal(attention: Any, inputs: tuple[Tensor, Tensor], attn_mask: Tensor) -> bool:
    """Whether the hint says all that the mask says, so that the mask need not be read."""
    if type(attention) is not MultiheadAttention or attention.compat != "safe":
        return False
    if any(x.is_nested for x in inputs):
        return False
    lengths = tuple(x.shape[1 if x.dim() == 3 and attention.batch_first else 0] for x in inputs)
    return attn_mask.shape == lengths and is_causal_mask(attn_mask, may_wait=False)


class Rows:
    """A dense tensor as it is, or the rows [total, E] of a nested one, on which all but attention works."""

    def __init__(self, x: Tensor) -> None:
        self.packed = _nested.pack(x) if x.is_nested else None
        self.values = x if self.packed is None else self.packed.values

    def nested(self, values: Tensor) -> Tensor:
        """For attention: jagged, whatever the layout outside."""
        if self.packed is None:
            return values
        ends, longest = self.packed.cu_seqlens, self.packed.longest
        return torch.nested.nested_tensor_from_jagged(values, ends, max_seqlen=longest)

    def flat(self, x: Tensor) -> Tensor:
        return x if self.packed is None else _nested.pack(x).values

    def close(self, values: Tensor) -> Tensor:
        """The result, in the layout of the input."""
        return values if self.packed is None else _nested.unpack(values, self.packed)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on `saccade.attention`: torch's arguments, parameters, state_dict,
    initial values and results, in training and in inference (torch's fused inference path is not taken).

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype: torch's.
        window, num_kv_heads, head_dim, score, qk_norm, position, compat: `saccade.nn.MultiheadAttention`'s.
        attention_activation: its `activation` ("softmax", "relu", "sigmoid", "softmax1").

    `_sa_block` and `_ff_block` may be overridden as in torch; such a `_sa_block` gets torch's float masks.
    Raises torch's errors; TypeError and ValueError naming the argument for those beyond torch's.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **extras: Any,
    ) -> None:
        found = check_extras(extras)
        heads = nhead if "head_dim" not in found else 1  # heads of their own size need not divide d_model
        base = (dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        super().__init__(d_model, heads, *base, device, dtype)
        self.self_attn = _ours(self.self_attn, nhead, found, {"device": device, "dtype": dtype})

    def forward(
        self,
        src: Tensor,
        src_mask: AnyMask = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        mask: Mask | None = None,
    ) -> Tensor:
        """torch's forward. `src_mask` may be a saccade.Mask too; `mask` is one that must hold besides it.

        Shapes: src (S, N, E), or (N, S, E) with batch_first, or (S, E), or nested (N, ragged, E) of either
        layout; src_mask (S, S) or (N * nhead, S, S); src_key_padding_mask (N, S) or (S,). Output like src.
        """
        attn_mask, also = split_mask(src_mask, mask)
        check_dtypes(src_key_padding_mask=src_key_padding_mask, src_mask=attn_mask)
        padding = src_key_padding_mask
        if not has_own_block(self):
            padding, attn_mask = as_floats(padding, attn_mask, src.dtype, "src_mask")
        rows = Rows(src)

        def attended(x: Tensor) -> Tensor:
            return rows.flat(
                self._sa_block(rows.nested(x), attn_mask, padding, is_causal=is_causal, **also)
            )

        x = rows.values
        if self.norm_first:
            x = x + attended(self.norm1(x))
            x = x + self._ff_block(self.norm2(x))
        else:
            x = self.norm1(x + attended(x))
            x = self.norm2(x + self._ff_block(x))
        return rows.close(x)

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        *,
        mask: Mask | None = None,
    ) -> Tensor:
        return self.dropout1(_attend(self.self_attn, (x, x), (key_padding_mask, attn_mask), is_causal, mask))


def has_own_block(layer: nn.Module) -> bool:
    """Whether the layer is ours with the self-attention block as it is here."""
    block: Any = getattr(layer, "_sa_block", None)
    own: Any = TransformerEncoderLayer._sa_block
    return isinstance(layer, TransformerEncoderLayer) and getattr(block, "__func__", None) is own


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on `saccade.attention`: torch's arguments, parameters, state_dict,
    initial values and results.

    Args:
        d_model, ..., dtype: torch's. The others are those of `TransformerEncoderLayer`; `window` and
            `position` are of self-attention, the rest also of the attention to the memory.

    `_sa_block`, `_mha_block` and `_ff_block` may be overridden as in torch. Errors as in the encoder layer.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **extras: Any,
    ) -> None:
        found, factory = check_extras(extras), {"device": device, "dtype": dtype}
        heads = nhead if "head_dim" not in found else 1
        base = (dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        super().__init__(d_model, heads, *base, device, dtype)
        # A score object has weights of its own: one for each attention.
        cross = {n: copy.deepcopy(x) for n, x in found.items() if n not in _OF_ONE_SEQUENCE}
        self.self_attn = _ours(self.self_attn, nhead, found, factory)
        self.multihead_attn = _ours(self.multihead_attn, nhead, cross, factory)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: AnyMask = None,
        memory_mask: AnyMask = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        mask: Mask | None = None,
    ) -> Tensor:
        """torch's forward. `tgt_mask` and `memory_mask` may be a saccade.Mask too; `mask` is one more for tgt.

        Shapes: tgt (T, N, E) and memory (S, N, E), or batch_first, or unbatched, or both nested; tgt_mask
        (T, T), memory_mask (T, S), each also with N * nhead before; padding (N, T) and (N, S). Output like
        tgt.
        """
        attn_mask, also = split_mask(tgt_mask, mask)
        cross_mask, cross_also = split_mask(memory_mask, None)
        rows = Rows(tgt)

        def attended(x: Tensor) -> Tensor:
            masks = (attn_mask, tgt_key_padding_mask)
            return rows.flat(self._sa_block(rows.nested(x), *masks, tgt_is_causal, **also))

        def crossed(x: Tensor) -> Tensor:
            masks = (cross_mask, memory_key_padding_mask)
            return rows.flat(
                self._mha_block(rows.nested(x), memory, *masks, memory_is_causal, **cross_also)
            )

        x = rows.values
        if self.norm_first:
            x = x + attended(self.norm1(x))
            x = x + crossed(self.norm2(x))
            x = x + self._ff_block(self.norm3(x))
        else:
            x = self.norm1(x + attended(x))
            x = self.norm2(x + crossed(x))
            x = self.norm3(x + self._ff_block(x))
        return rows.close(x)

    def _sa_block(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        *,
        mask: Mask | None = None,
    ) -> Tensor:
        return self.dropout1(_attend(self.self_attn, (x, x), (key_padding_mask, attn_mask), is_causal, mask))

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        *,
        mask: Mask | None = None,
    ) -> Tensor:
        masks = (key_padding_mask, attn_mask)
        return self.dropout2(_attend(self.multihead_attn, (x, mem), masks, is_causal, mask))
