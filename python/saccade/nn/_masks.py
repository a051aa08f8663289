"""torch's masks (True hides, floats are added) as a Mask and a bias."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import Causal, KeyPadding, Mask
from ..transforms import around
from ._bands import as_band

# The hint of torch's modules is that of F.scaled_dot_product_attention: aligned with the first key.
_HINT = Causal(align="start")


def resolve_masks(
    masks: tuple[Tensor | None, Tensor | None], is_causal: bool, sizes: tuple[int, int], dtype: torch.dtype
) -> tuple[Mask | None, Tensor | None]:
    """(mask, bias) of (key_padding_mask [N, S], attn_mask [L, S] or [N * H, L, S]); `sizes` is (N, H).

    Padding stays [N, S]; a bias keeps the size 1 where it is the same for all. An attn_mask that is a band
    becomes one.
    """
    key_padding_mask, attn_mask = masks
    mask: Mask | None = _HINT if is_causal else None
    bias = None
    if attn_mask is not None and (band := as_band(attn_mask)) is not None:
        mask = band if mask is None else mask & band
    elif attn_mask is not None:
        added = _as_bias(attn_mask, dtype)
        bias = added[None, None] if added.dim() == 2 else added.view(*sizes, *added.shape[1:])
    if key_padding_mask is not None:
        # A transform sees the tensors of a call, not those inside a mask.
        if key_padding_mask.dtype == torch.bool and not around():
            padding = KeyPadding(keep=~key_padding_mask)
            return padding if mask is None else mask & padding, bias
        added = _as_bias(key_padding_mask, dtype)[:, None, None]
        bias = added if bias is None else bias + added
    return mask, bias


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def join(*masks: Mask | None) -> Mask | None:
    """The masks that are there, joined with `&`."""
    found = None
    for mask in masks:
        if mask is not None:
            found = mask if found is None else found & mask
    return found
