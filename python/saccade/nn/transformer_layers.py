"""`TransformerEncoderLayer` and `TransformerDecoderLayer`: torch's, on this package's attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..masks import Mask
from ._blocks import AnyMask, Rows, as_floats, attend, check_dtypes, check_extras, own_attention, split_mask

Activation = str | Callable[[Tensor], Tensor]
_OF_ONE_SEQUENCE = ("window", "position")  # what relates places of one sequence: not for cross-attention


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
        self.self_attn = own_attention(self.self_attn, nhead, found, {"device": device, "dtype": dtype})

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
        attn_mask, is_causal, also = split_mask(src_mask, mask, is_causal)
        check_dtypes(src_key_padding_mask=src_key_padding_mask, src_mask=attn_mask)
        padding = src_key_padding_mask
        if not has_own_block(self):
            padding, attn_mask = as_floats(padding, attn_mask, src.dtype, "src_mask")
        rows = Rows(src)

        def attended(x: Tensor) -> Tensor:
            return rows.flat(self._sa_block(rows.nested(x), attn_mask, padding, is_causal=is_causal, **also))

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
        return self.dropout1(attend(self.self_attn, (x, x), (key_padding_mask, attn_mask), is_causal, mask))


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
        self.self_attn = own_attention(self.self_attn, nhead, found, factory)
        self.multihead_attn = own_attention(self.multihead_attn, nhead, cross, factory)

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
        """torch's forward. `tgt_mask`, `memory_mask` may be a saccade.Mask too; `mask` is one more for tgt.

        Shapes: tgt (T, N, E) and memory (S, N, E), or batch_first, or unbatched, or both nested; tgt_mask
        (T, T), memory_mask (T, S), each also with N * nhead before; padding (N, T) and (N, S). Output like
        tgt.
        """
        attn_mask, tgt_is_causal, also = split_mask(tgt_mask, mask, tgt_is_causal)
        cross_mask, memory_is_causal, cross_also = split_mask(memory_mask, None, memory_is_causal)
        rows = Rows(tgt)

        def attended(x: Tensor) -> Tensor:
            masks = (attn_mask, tgt_key_padding_mask)
            return rows.flat(self._sa_block(rows.nested(x), *masks, tgt_is_causal, **also))

        def crossed(x: Tensor) -> Tensor:
            masks = (cross_mask, memory_key_padding_mask)
            return rows.flat(self._mha_block(rows.nested(x), memory, *masks, memory_is_causal, **cross_also))

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
        return self.dropout1(attend(self.self_attn, (x, x), (key_padding_mask, attn_mask), is_causal, mask))

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
        return self.dropout2(attend(self.multihead_attn, (x, mem), masks, is_causal, mask))
