"""Hugging Face transformers: `attn_implementation="saccade"`.

`register()` makes the name known to transformers' AttentionInterface and AttentionMaskInterface; then
`AutoModel.from_pretrained(..., attn_implementation="saccade")` and `model.set_attn_implementation("saccade")`
work, and `saccade.accelerate(model)` does both. Masks arrive as objects (causal, window, padding, packed
sequences, chunks), not as N x N tensors; one that is none of these is laid out by transformers and added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import attend_with_weights
from ..masks import Band, Causal, KeyPadding, Mask
from ..nn._core import BATCH_FIRST, Options, attend
from ..problem import Problem
from . import _hf_masks
from ._hf_model import models_in, swap

__all__ = ["NAME", "PairMask", "attention_forward", "make_mask", "models_in", "register", "swap"]

NAME = "saccade"

# Arguments that some models pass and that change the result: refused rather than passed over.
_REFUSED = {
    "cache": "a paged cache",
    "indices": "keys chosen per query",
    "block_indices": "blocks of keys chosen per query",
    "sinks": "sinks that depend on the query",
}


def register() -> None:
    """Make `attn_implementation="saccade"` known to transformers. Calling it again does nothing.

    Raises ImportError without transformers, or with one before its AttentionMaskInterface (4.53).
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if AttentionInterface._global_mapping.get(NAME) is not None:
        return
    _hf_masks.trust()
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


class PairMask:
    """What stands for an attention mask inside a model: a saccade.Mask, and for code that treats it as a
    tensor, the boolean [B, 1, Sq, Sk] (True = keep) that transformers would have made, laid out when asked.
    """

    def __init__(self, mask: Mask, sizes: tuple[int, int, int], device: torch.device) -> None:
        self.mask, self.sizes, self.device = mask, sizes, device
        self.shape = torch.Size((sizes[0], 1, *sizes[1:]))
        self.ndim, self.dtype = 4, torch.bool

    def dense(self) -> Tensor:
        batch, q_length, kv_length = self.sizes
        pairs = self.mask.materialize(q_length, kv_length).to(self.device)
        return (pairs if pairs.dim() == 3 else pairs[None])[:, None].expand(batch, 1, q_length, kv_length)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Another device: still an object. A dtype: the tensor."""
        target = args[0] if args else kwargs.get("device")
        if len(args) > 1 or isinstance(target, torch.dtype | Tensor) or kwargs.get("dtype") is not None:
            return self.dense().to(*args, **kwargs)
        device = self.device if target is None else torch.device(target)
        return PairMask(self.mask.to(device), self.sizes, device)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __invert__(self) -> Tensor:
        return ~self.dense()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_laid_out(args), **_laid_out(kwargs or {}))

    def __repr__(self) -> str:
        return f"PairMask({self.mask!r}, {list(self.shape)})"


def _laid_out(value: Any) -> Any:
    if isinstance(value, PairMask):
        return value.dense()
    if isinstance(value, dict):
        return {name: _laid_out(x) for name, x in value.items()}
    return type(value)(map(_laid_out, value)) if type(value) in (tuple, list) else value


for _operator in ("and", "or", "add", "mul", "sub", "eq", "ne", "rand", "ror", "radd", "rmul", "rsub"):

    def _apply(self: PairMask, other: Any, _name: str = f"__{_operator}__") -> Any:
        return getattr(self.dense(), _name)(_laid_out(other))

    setattr(PairMask, f"__{_operator}__", _apply)
PairMask.__hash__ = object.__hash__  # type: ignore[method-assign]


def make_mask(  # noqa: PLR0913  transformers calls it so
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: Any = None,
    device: Any = "cpu",
    **options: Any,
) -> Any:
    """The mask interface: a PairMask, or transformers' own boolean tensor for what is none."""
    from transformers import masking_utils as theirs

    if isinstance(attention_mask, PairMask):  # made before, as `generate` does
        return attention_mask
    function = theirs.causal_mask_function if mask_function is None else mask_function
    device = torch.device(device)
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    try:
        if tracing and any(isinstance(x, Tensor) for x in (q_offset, kv_offset)):
            raise _hf_masks.Unread("offsets that tracing must not look at")
        # A static cache counts in a tensor. A traced length stays what it is.
        first_q, first_k = (int(x) if isinstance(x, Tensor) else x for x in (q_offset, kv_offset))
        region = _hf_masks.Region(
            batch_size, q_length, kv_length, first_q, first_k, device, _hf_masks.TRUSTED
        )
        if tracing:
            mask = _hf_masks.read_traced(function, region, attention_mask, options)
        else:
            mask = _hf_masks.read(function, region, attention_mask)
    except _hf_masks.Unread:
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return theirs.sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=function, attention_mask=attention_mask, device=device,
            **options,
        )  # fmt: skip
    return PairMask(mask, (batch_size, q_length, kv_length), device)


def attention_forward(  # noqa: PLR0913  transformers calls it so
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention interface: query [B, H, Sq, D], key and value [B, Hk, Sk, D] to [B, Sq, H, Dv].

    attention_mask: a PairMask, a tensor that broadcasts to [B, H, Sq, Sk] (bool True = keep, float added), or
    None: then `is_causal`, or the module's, decides, aligned with the first key (as in transformers' "sdpa").
    softcap, s_aux (sinks [H]) and position_bias as in transformers. The second result is the weights
    [B, H, Sq, Sk] with `output_attentions`, else None. Rows that keep no key give zeros.

    Raises NotImplementedError for arguments that no kernel here serves.
    """
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f'attn_implementation="saccade": {name} ({what}) is not served')
    batch = max(query.shape[0], key.shape[0])
    query, key, value = (
        x if x.shape[0] == batch else x.expand(batch, *x.shape[1:]) for x in (query, key, value)
    )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    mask, bias = _resolve(attention_mask, query, key, bool(is_causal))
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    terms: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sink": s_aux}
    terms = {name: x for name, x in terms.items() if x is not None}
    if kwargs.get("output_attentions"):
        problem = Problem.of(
            query, key, value, mask, bias=bias, dropout_p=dropout, layout=BATCH_FIRST, **terms
        )
        out, weights = attend_with_weights(problem)
        return out.transpose(1, 2), weights
    options = Options(need_weights=False, average=False, dropout_p=dropout, terms=terms)
    out, _ = attend((query, key, value), BATCH_FIRST, options, mask=mask, bias=bias)
    return out.transpose(1, 2), None


def _resolve(given: Any, query: Tensor, key: Tensor, is_causal: bool) -> tuple[Mask | None, Tensor | None]:
    """(mask, bias) of what stands for the attention mask."""
    if given is None:
        return (Causal(align="start") if is_causal and query.shape[2] > 1 else None), None
    if isinstance(given, PairMask):
        if given.sizes[1:] != (query.shape[2], key.shape[2]):
            raise ValueError(
                f"attention_mask: made for {given.sizes[1]} queries and {given.sizes[2]} keys, "
                f"the call has {query.shape[2]} and {key.shape[2]}"
            )
        if given.mask.num_batch in (None, query.shape[0]):
            plain = isinstance(given.mask, Band) and given.mask.left is None and given.mask.right is None
            return (None if plain else given.mask), None
        given = given.dense()
    if not isinstance(given, Tensor):
        raise TypeError(f"attention_mask: expected a tensor, got {type(given).__name__}")
    given = given[(None,) * (4 - given.dim())]
    if given.dtype != torch.bool:
        return None, given
    if given.shape[1] == given.shape[2] == 1:  # the same for all queries: no bias of N x N
        return KeyPadding(keep=given[:, 0, 0].expand(query.shape[0], key.shape[2])), None
    return None, torch.zeros((), dtype=query.dtype, device=given.device).masked_fill(~given, -torch.inf)
