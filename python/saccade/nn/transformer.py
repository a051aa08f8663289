"""`TransformerEncoder`, `TransformerDecoder` and `Transformer`: torch's stacks over this package's layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..maskbase import plainly, unwatched
from ..masks import Causal
from . import _extras, _nested
from ._blocks import AnyMask, Rows, as_floats, check_dtypes, check_extras
from ._causal import is_causal_mask
from ._held import Held
from ._kept import Kept
from .attention import MultiheadAttention
from .transformer_layers import (
    Activation,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    has_own_block,
)

Windows = Sequence[tuple[Any, Any] | None] | None


def _set_windows(layers: nn.ModuleList, windows: Windows) -> None:
    """One window for the self-attention of each layer."""
    if windows is None:
        return
    if len(windows) != len(layers):
        raise ValueError(f"windows: expected one for each of {len(layers)} layers, got {len(windows)}")
    for layer, window in zip(layers, windows, strict=True):
        attention: Any = getattr(layer, "self_attn", None)
        if window is None:
            continue
        if not isinstance(attention, MultiheadAttention):
            raise TypeError(f"windows: expected saccade's layers, got {type(layer).__name__}")
        if attention.compat != "safe":
            raise ValueError('windows: compat="torch" knows none')
        attention._window = None
        _extras.set_window(attention, window)
        attention._has_extras, attention._qkv_same_embed_dim = True, False


def _detect(mask: AnyMask, is_causal: bool | None, x: Tensor, first: bool) -> bool:
    """torch's hint for the layers: asked for, or not denied and the mask is the causal one of this length."""
    if is_causal is not None or not isinstance(mask, Tensor):
        return is_causal is True
    if not x.is_nested and mask.shape[-1] != x.shape[1 if first and x.dim() == 3 else 0]:
        return False
    return is_causal_mask(mask)


class TransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder`. Where torch's would leave out padding (in eval, by nested tensors), this
    one leaves it out too, with the same rows at padded positions: zeros, normed by `norm`.

    Args:
        encoder_layer, num_layers, norm, enable_nested_tensor, mask_check: torch's, without its warning that a
            layer cannot be run on nested tensors.
        windows: per layer (left, right), or None for what `encoder_layer` has.
        packed: with a bool src_key_padding_mask, run on the valid tokens alone, so that padding costs
            nothing in training either. Rows of the output at padded positions are then zeros; otherwise they
            hold ordinary values, as torch's do in training. Valid rows are the same.
    """

    packed: bool = False

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
        *,
        windows: Windows = None,
        packed: bool = False,
    ) -> None:
        layer: Any = encoder_layer
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "enable_nested_tensor is True")
            super().__init__(layer, num_layers, norm, enable_nested_tensor, mask_check)
        _set_windows(self.layers, windows)
        if packed:
            self.packed = True

    def forward(
        self,
        src: Tensor,
        mask: AnyMask = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """torch's forward; shapes as in the layer. `mask` may be a saccade.Mask too."""
        padding = src_key_padding_mask
        check_dtypes(src_key_padding_mask=padding, mask=mask)
        first_layer: Any = self.layers[0]
        first = first_layer.self_attn.batch_first
        is_causal = _detect(mask, is_causal, src, first)
        if self.packed and padding is not None and padding.dtype == torch.bool and not src.is_nested:
            if self._can_pack(src, mask, padding, is_causal):
                return self._run_packed(src, padding, first, mask is not None, None)
            out = self._run(src, mask, padding, is_causal)
            hidden = padding if src.dim() == 2 or first else padding.t()
            return out.masked_fill(hidden[..., None], 0.0)
        if padding is not None and self._torch_leaves_out(src, mask, padding):
            hidden = src.new_zeros(src.shape[-1])
            hidden = hidden if self.norm is None else self.norm(hidden)
            return self._run_packed(src, padding, first, is_causal, hidden)
        if src.is_nested and all(isinstance(x, TransformerEncoderLayer) for x in self.layers):
            rows = Rows(src)  # taken apart once for all layers
            return rows.close(rows.flat(self._run(rows.nested(rows.values), mask, padding, is_causal)))
        return self._run(src, mask, padding, is_causal)

    def _run(self, x: Tensor, mask: AnyMask, padding: Tensor | None, is_causal: bool) -> Tensor:
        for layer in self.layers:
            p, m = padding, mask
            if not isinstance(layer, TransformerEncoderLayer):
                p, m = as_floats(padding, mask, x.dtype, "mask")
            x = layer(x, src_mask=m, is_causal=is_causal, src_key_padding_mask=p)
        return x if self.norm is None else self.norm(x)

    def _can_pack(self, src: Tensor, mask: AnyMask, padding: Tensor, is_causal: bool) -> bool:
        """Whether the valid tokens alone give the same."""
        if src.dim() != 3 or not unwatched(padding) or not all(map(has_own_block, self.layers)):
            return False
        attentions: list[Any] = [layer.self_attn for layer in self.layers]
        if any(type(x) is not MultiheadAttention for x in attentions):
            return False
        if mask is not None and not _says_causal(mask, is_causal):
            return False  # it speaks of places in the padded sequence
        if mask is None and is_causal:
            return False
        if padding.shape != (src.shape[:2] if attentions[0].batch_first else src.shape[1::-1]):
            return False  # torch's error
        # Windows and positions count tokens, so a gap between valid ones must keep its width.
        return not any(x._has_extras for x in attentions) or not bool(_has_gap(~padding))

    def _torch_leaves_out(self, src: Tensor, mask: AnyMask, padding: Tensor) -> bool:
        """Whether torch's encoder would turn this call into nested tensors, and here it can be packed."""
        first: Any = self.layers[0]
        if first.training or mask is not None or padding.dtype != torch.bool or not self.use_nested_tensor:
            return False
        if src.is_nested or torch.is_autocast_enabled() or not torch.backends.mha.get_fastpath_enabled():
            return False
        if torch.is_grad_enabled() and any(x.requires_grad for x in (src, *first.parameters())):
            return False
        if not self._can_pack(src, mask, padding, False):
            return False
        return not self.mask_check or not bool((padding[:, :-1] & ~padding[:, 1:]).any())  # valid ones first

    def _run_packed(
        self, src: Tensor, padding: Tensor, first: bool, is_causal: bool, hidden: Tensor | None
    ) -> Tensor:
        """The layers on valid rows alone. `hidden` [E]: what stands at padded ones, else zeros."""
        x = src if first else src.transpose(0, 1)
        ends, at, longest = _valid_rows(padding)
        values = x.flatten(0, 1).index_select(0, at)
        rows = torch.nested.nested_tensor_from_jagged(values, ends, max_seqlen=longest)
        out = self._run(rows, Causal() if is_causal else None, None, False)
        return _in_place(out, at, padding, first, hidden)

    def extra_repr(self) -> str:
        return "packed=True" if self.packed else ""


# By padding. A jagged tensor knows its sizes by the identity of its offsets: what computes a call again, such
# as a checkpoint, must find the same ones.
_valid = Kept()


def _valid_rows(padding: Tensor) -> tuple[Tensor, Tensor, int]:
    """Where each sequence's valid rows begin when only those are kept [N + 1], which they are among all, and
    the longest.
    """

    def find() -> tuple[Tensor, Tensor, int]:
        with plainly(padding):
            keep = ~padding
            lengths = keep.sum(1)
            longest = int(lengths.max()) if len(lengths) else 0
            return F.pad(lengths.cumsum(0), (1, 0)), keep.flatten().nonzero().squeeze(1), longest

    return _valid.of(padding, None, find)


def _in_place(rows: Tensor, at: Tensor, padding: Tensor, first: bool, hidden: Tensor | None = None) -> Tensor:
    """The nested valid rows at their places `at` in the padded batch, elsewhere `hidden` [E], or zeros."""
    values = _nested.pack(rows).values
    hidden = values.new_zeros(values.shape[-1]) if hidden is None else hidden
    out = hidden.expand(padding.numel(), -1).index_copy(0, at, values)
    out = out.view(*padding.shape, -1)
    return out if first else out.transpose(0, 1)


def _says_causal(mask: AnyMask, is_causal: bool) -> bool:
    """Whether a mask is the causal one and no other."""
    if isinstance(mask, Tensor):
        return is_causal and is_causal_mask(mask)
    args, causal = None if mask is None else mask.static, Causal().static
    return args is not None and causal is not None and args.is_band_alone and args.band == causal.band


def layer_outputs(encoder: nn.TransformerEncoder, src: Tensor, **masks: Any) -> list[Tensor]:
    """What `encoder(src, **masks)` computes, and before it what each of its layers puts out, the first first:
    memories for a decoder that reads several encoder layers (2005.08081). `encoder.norm` is in the last one.
    Rows of padding that the encoder left out are zeros.
    """
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: found.append(out)) for layer in encoder.layers
    ]
    try:
        last = encoder(src, **masks)
    finally:
        for hook in hooks:
            hook.remove()
    padding = masks.get("src_key_padding_mask")
    if not src.is_nested and padding is not None and any(x.is_nested for x in found):
        first_layer: Any = encoder.layers[0]
        first, at = first_layer.self_attn.batch_first, _valid_rows(padding)[1]
        found = [_in_place(x, at, padding, first) if x.is_nested else x for x in found]
    return [*found[:-1], last]


def _has_gap(keep: Tensor) -> Tensor:
    """Whether the True of any row [N, S] come in more than one run."""
    starts = keep.clone()
    starts[:, 1:] &= ~keep[:, :-1]
    return (starts.sum(1) > 1).any()


class TransformerDecoder(nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder`; `windows` is as in the encoder, for self-attention.

    `forward` takes one memory, or a sequence of one per layer (attention to any encoder layers: 2005.08081).
    To decode step by step, see `DecoderState`.
    """

    def __init__(
        self,
        decoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        *,
        windows: Windows = None,
    ) -> None:
        layer: Any = decoder_layer
        super().__init__(layer, num_layers, norm)
        _set_windows(self.layers, windows)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | Sequence[Tensor],
        tgt_mask: AnyMask = None,
        memory_mask: AnyMask = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """torch's forward; shapes as in the layer. `tgt_mask` and `memory_mask` may be a saccade.Mask too."""
        first_layer: Any = self.layers[0]
        causal = _detect(tgt_mask, tgt_is_causal, tgt, first_layer.self_attn.batch_first)
        memories = [memory] * len(self.layers) if isinstance(memory, Tensor) else list(memory)
        if len(memories) != len(self.layers):
            raise ValueError(
                f"memory: expected one for each of {len(self.layers)} layers, got {len(memories)}"
            )
        x = tgt
        for layer, seen in zip(self.layers, memories, strict=True):
            x = layer(
                x,
                seen,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=causal,
                memory_is_causal=memory_is_causal,
            )
        return x if self.norm is None else self.norm(x)


class Transformer(nn.Transformer):
    """`torch.nn.Transformer` of this package's encoder and decoder.

    Args:
        d_model, ..., dtype: torch's.
        encoder_windows, decoder_windows: per layer (left, right) or None, for self-attention.
        packed: `TransformerEncoder`'s.
        others: `TransformerEncoderLayer`'s, for the layers of both.

    forward is torch's; src_mask, tgt_mask and memory_mask may be a saccade.Mask each.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        encoder_windows: Windows = None,
        decoder_windows: Windows = None,
        packed: bool = False,
        **extras: Any,
    ) -> None:
        check_extras(extras)
        if custom_encoder is not None and (encoder_windows is not None or packed):
            raise ValueError("encoder_windows, packed: not for a custom_encoder; give them to it")
        if custom_decoder is not None and decoder_windows is not None:
            raise ValueError("decoder_windows: not for a custom_decoder; give them to it")
        layer = (dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        # Made in torch's order, so that its generator is left where torch leaves it.
        encoder, decoder = custom_encoder, custom_decoder
        if encoder is None:
            one = TransformerEncoderLayer(d_model, nhead, *layer, device, dtype, **extras)
            norm = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)
            encoder = TransformerEncoder(
                one, num_encoder_layers, norm, windows=encoder_windows, packed=packed
            )
        if decoder is None:
            other = TransformerDecoderLayer(d_model, nhead, *layer, device, dtype, **extras)
            norm = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)
            decoder = TransformerDecoder(other, num_decoder_layers, norm, windows=decoder_windows)
        super().__init__(
            d_model, nhead, custom_encoder=encoder, custom_decoder=decoder, batch_first=batch_first
        )

    def _reset_parameters(self) -> None:
        """torch's initial values, but for what the caller gave with a position or a score."""
        given = {id(p) for held in self.modules() if isinstance(held, Held) for p in held.parameters()}
        for p in self.parameters():
            if p.dim() > 1 and id(p) not in given:
                nn.init.xavier_uniform_(p)
