"""What the Transformer's layers and stacks share: their extra arguments, masks, attention and rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..masks import Mask
from . import _nested
from ._causal import is_causal_mask
from ._masks import _HINT, join
from .attention import MultiheadAttention

F: Any = functional  # _canonical_mask is private to torch and not in its stubs
AnyMask = Tensor | Mask | None

_EXTRAS = {
    "window": None, "num_kv_heads": None, "head_dim": None, "score": "dot", "attention_activation": "softmax",
    "qk_norm": False, "position": None, "compat": "safe",
}  # fmt: skip


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


def own_attention(
    made: Any, num_heads: int, extras: dict[str, Any], factory: dict[str, Any]
) -> MultiheadAttention:
    """torch's freshly made attention as ours: the same object, unless it is to be another."""
    if not extras:
        made.__class__ = MultiheadAttention  # what it lacks are class attributes, at torch's meaning
        return made
    base = {"dropout": made.dropout, "bias": made.in_proj_bias is not None, "batch_first": made.batch_first}
    return MultiheadAttention(made.embed_dim, num_heads, **base, **factory, **extras)


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


def split_mask(
    attn_mask: AnyMask, mask: Mask | None, is_causal: bool
) -> tuple[Tensor | None, bool, dict[str, Any]]:
    """The tensor, torch's hint where it goes with one, and what else must hold as a keyword, if anything:
    overridden blocks may not know it.
    """
    if isinstance(attn_mask, Mask):
        attn_mask, mask = None, join(attn_mask, mask)
        if is_causal:
            is_causal, mask = False, join(_HINT, mask)
    return attn_mask, is_causal, {} if mask is None else {"mask": mask}


def attend(
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
