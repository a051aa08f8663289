"""What torch.nn.MultiheadAttention refuses, with its types and texts; its own checkers where it has them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..masks import Mask

F: Any = functional  # the checkers are private to torch and not in its stubs

_NEED_MASK = (
    "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
    "`generate_square_subsequent_mask` to create this mask."
)


def check_masks(key_padding_mask: Any, attn_mask: Any, frames: int) -> None:
    """The dtypes of the masks; `frames`: how far above this call the user's line stands."""
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if isinstance(mask, Mask):
            raise TypeError(f"{name}: expected a tensor; a saccade mask is given as mask=")
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported")
    if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. "
            "Use same type for both instead.",
            stacklevel=frames + 1,
        )


def check_inputs(
    module: Any, inputs: tuple[Tensor, Tensor, Tensor], masks: Any, is_causal: bool, frames: int = 4
) -> bool:
    """Whether the inputs are batched. `masks` is (key_padding_mask, attn_mask). `frames`: how far above this
    call the user's line stands; nn.Module puts two between a call and its forward.
    """
    query, key, value = inputs
    key_padding_mask, attn_mask = masks
    check_masks(key_padding_mask, attn_mask, frames + 1)
    batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, module.num_heads)
    if is_causal and attn_mask is None:
        raise RuntimeError(_NEED_MASK)
    if query.shape[-1] != module.embed_dim:
        raise AssertionError(
            f"was expecting embedding dimension of {module.embed_dim}, but got {query.shape[-1]}"
        )
    if key is not value:
        _check_values(module, key, value, batched)
    return batched


def _seq_first(module: Any, x: Tensor, batched: bool) -> torch.Size:
    """The shape that torch would name: it checks after its own transpositions."""
    if not batched:
        return x.unsqueeze(1).shape
    return x.transpose(0, 1).shape if module.batch_first else x.shape


def _check_values(module: Any, key: Tensor, value: Tensor, batched: bool) -> None:
    packed = module.in_proj_weight is not None
    if (key.shape != value.shape) if packed else (key.shape[:-1] != value.shape[:-1]):
        k, v = (_seq_first(module, x, batched) for x in (key, value))
        if packed:
            raise AssertionError(f"key shape {k} does not match value shape {v}")
        raise AssertionError(f"key's sequence and batch dims {k[:2]} do not match value's {v[:2]}")


def check_sizes(module: Any, sizes: tuple[int, int, int], key: Tensor, masks: Any) -> None:
    """The batch of the keys and the shapes of the masks. `sizes` is (N, L, S); `key` ends in Hk, D."""
    batch, tgt_len, src_len = sizes
    key_padding_mask, attn_mask = masks
    if attn_mask is not None:
        dim = attn_mask.dim()
        lead = () if dim == 2 else (batch * module.num_heads,)
        if attn_mask.shape != (*lead, tgt_len, src_len):
            expected = (*lead, tgt_len, src_len)
            raise RuntimeError(
                f"The shape of the {dim}D attn_mask is {attn_mask.shape}, but should be {expected}."
            )
    if key.numel() != batch * src_len * key.shape[-2] * key.shape[-1]:
        shape = [src_len, batch * key.shape[-2], key.shape[-1]]
        raise RuntimeError(f"shape '{shape}' is invalid for input of size {key.numel()}")
    if key_padding_mask is not None and key_padding_mask.shape != (batch, src_len):
        appended = (module.bias_k is not None) + bool(module.add_zero_attn)
        F._check_key_padding_mask(F.pad(key_padding_mask, (0, appended)), src_len + appended, batch)
