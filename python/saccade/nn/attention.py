"""`MultiheadAttention`: torch's module with the kernels of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..masks import Band, Mask
from . import _checks, _extras, _nested
from ._core import BATCH_FIRST, attend, attend_heads, attend_packed, options_of
from ._masks import join
from ._projections import extra_key, project, project_out

_PLAIN = (Tensor, nn.Parameter)
Masks = tuple[Tensor | None, Tensor | None]


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` through `saccade.attention`: torch's arguments, parameters, state_dict,
    initial values and results. Nothing of size L x S is kept unless `need_weights` (True by default) asks.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first: torch's.
        device, dtype: torch's.
        window: (left, right), each an int, None or an [H] tensor: `saccade.Window`.
        num_kv_heads: fewer key and value heads; head h reads h // (num_heads // num_kv_heads).
        head_dim: of each head, where it is not embed_dim // num_heads.
        score: "dot"; "additive", w . tanh(q + k) with its own w [H, D]; an Additive or GATv2, or a callable
            that gives one.
        activation: "softmax", "relu", "sigmoid" or "softmax1".
        qk_norm: an RMS norm with a weight [D] on every head's queries and keys.
        position: a `saccade.position` object, or a callable (L, S) -> one. A module's parameters join ours.
        compat: "safe", or "torch" for what torch does where it contradicts itself. In the safe form a row
            without keys gives zeros (out_proj.bias after the projection), attn_mask and is_causal both hold,
            and the columns of add_bias_kv and add_zero_attn are always visible.

    Without the arguments from `window` on, the state_dict is torch's. With them: in_proj_weight
    [(H + 2 Hk) D, E] (or q_proj_weight [H D, E], k_proj_weight [Hk D, kdim], v_proj_weight [Hk D, vdim]),
    in_proj_bias [(H + 2 Hk) D], bias_k and bias_v [1, 1, Hk D], out_proj.weight [E, H D], score_term.weight
    [H, D], q_norm.weight and k_norm.weight [D], position_term.*; and `_qkv_same_embed_dim` is False, which
    keeps torch's encoder layer from computing full attention with these weights past this forward.

    Raises torch's errors for torch's arguments, ValueError and TypeError naming the argument for the others.
    """

    # Class attributes serve instances that torch's class has made and `accelerate` has given this one.
    window: tuple[Any, Any] | None = None
    num_kv_heads: int | None = None
    score: str = "dot"
    activation: str = "softmax"
    qk_norm: bool = False
    compat: str = "safe"
    _window: Band | None = None
    _has_extras: bool = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        window: tuple[Any, Any] | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        score: Any = "dot",
        activation: str = "softmax",
        qk_norm: bool = False,
        position: Any = None,
        compat: str = "safe",
    ) -> None:
        if compat not in ("safe", "torch"):
            raise ValueError(f'compat: expected "safe" or "torch", got {compat!r}')
        base = (dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        factory = {"device": device, "dtype": dtype}
        resized = num_kv_heads not in (None, num_heads) or head_dim is not None
        if resized and embed_dim > 0 and num_heads > 0:
            _extras.check_heads(num_heads, num_kv_heads, head_dim)
            # torch asks that the heads divide embed_dim; with a head_dim of their own that need not hold.
            super().__init__(embed_dim, num_heads if head_dim is None else 1, *base)
            self.num_heads = num_heads
            _extras.resize(self, num_kv_heads, head_dim, factory)
        else:
            super().__init__(embed_dim, num_heads, *base)
        extras = {
            "window": window,
            "activation": activation,
            "score": score,
            "qk_norm": qk_norm,
            "position": position,
        }
        changed = _extras.add(self, extras, factory)
        if resized or changed:
            if compat == "torch":
                raise ValueError('compat: "torch" knows none of the arguments from window to position')
            self._has_extras = True
            self._qkv_same_embed_dim = False
        if compat != "safe":
            self.compat = compat
        if resized or self.score == "additive":
            self._reset_parameters()

    def _reset_parameters(self) -> None:
        if not self._has_extras:
            super()._reset_parameters()
            return
        packed = self.in_proj_weight is not None
        names = ("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        for name in names:
            nn.init.xavier_uniform_(getattr(self, name))
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        if self.bias_k is not None and self.bias_v is not None:
            nn.init.xavier_normal_(self.bias_k)
            nn.init.xavier_normal_(self.bias_v)
        if self.score == "additive":
            nn.init.xavier_uniform_(self.get_parameter("score_term.weight"))

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            "saccade.nn.MultiheadAttention: not for torch.jit.script; use torch.compile or torch.export"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask: Mask | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """torch's forward. `mask`: a saccade.Mask that must hold too; it sees L queries and S keys.

        Shapes: query (L, N, E), or (N, L, E) with batch_first, or (L, E); key and value alike with S, kdim
        and vdim; or nested tensors (N, ragged, E). key_padding_mask (N, S) or (S,); attn_mask (L, S) or
        (N * H, L, S). True hides, a float is added.
        Returns the output, like query, and with `need_weights` the weights after dropout: (N, L, S'), or
        (N, H, L, S') unless averaged. S' is S, then a column for add_bias_kv, then one for add_zero_attn.
        """
        if self._is_torchs(query, key, value, (key_padding_mask, attn_mask), mask):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        masks = (key_padding_mask, attn_mask)
        flags = (need_weights, average_attn_weights)
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested((query, key, value), masks, flags, is_causal, mask)
        if not _checks.check_inputs(self, (query, key, value), masks, is_causal):
            query, key, value = _for_each(query, key, value, lambda x: x.unsqueeze(0))
            if key_padding_mask is not None:
                masks = (key_padding_mask.unsqueeze(0), attn_mask)
            out, weights = self._attend(query, key, value, masks, flags, is_causal, mask, True)
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return self._attend(query, key, value, masks, flags, is_causal, mask, self.batch_first)

    def _is_torchs(self, query: Tensor, key: Tensor, value: Tensor, masks: Masks, mask: Mask | None) -> bool:
        """Whether torch's own forward must answer."""
        if self._has_extras or mask is not None:
            return False
        if self.compat == "torch" and (query.is_nested or masks[0] is not None or masks[1] is not None):
            return True
        inputs = (query, key, value)
        if type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN:
            return False
        if any(x.is_nested for x in inputs):
            return False
        # Subclasses that redefine torch's functions, or its operators (DTensor), know torch's, not ours.
        return any(_redefines_torch(x) or is_traceable_wrapper_subclass(x) for x in inputs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: Masks,
        flags: tuple[bool, bool],
        is_causal: bool,
        mask: Any,
        first: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """On [N, S, E] (`first`) or [S, N, E]."""
        return attend_heads(self, project(self, query, key, value), masks, flags, is_causal, mask, first)

    def _forward_nested(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        masks: Masks,
        flags: tuple[bool, bool],
        is_causal: bool,
        mask: Mask | None,
    ) -> tuple[Tensor, Tensor | None]:
        if masks[0] is not None or masks[1] is not None:
            raise AssertionError(
                "MultiheadAttention does not support NestedTensor beside key_padding_mask or attn_mask; "
                "its lengths are its padding, and mask= takes a saccade.Mask"
            )
        if is_causal:
            raise RuntimeError(_checks._NEED_MASK)
        query, key, value = _for_each(*inputs, _nested.pack)
        if key.batch != query.batch or key.cu_seqlens.shape != value.cu_seqlens.shape:
            raise AssertionError(
                f"nested query, key, value: expected one batch, got {query.batch}, {key.batch}, {value.batch}"
            )
        qkv = project(self, query.values, key.values, value.values)  # [total, H, D]
        mask = join(_extras.get_window(self), mask)
        options = options_of(self, flags, query.longest, key.longest)
        if not options.need_weights:
            lengths = (query.cu_seqlens, key.cu_seqlens, query.longest, key.longest)
            out = attend_packed(qkv, lengths, options, mask, **extra_key(self))
            return _nested.unpack(project_out(self, out), query), None
        if mask is not None:
            raise NotImplementedError(
                "need_weights with nested tensors and a mask or window: pad the inputs instead"
            )
        q, real = _nested.padded(qkv[0], query)
        k, v = (_nested.padded(x, key)[0] for x in qkv[1:])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, weights = attend((q, k, v), BATCH_FIRST, options, mask=_nested.padding(key), **extra_key(self))
        return _nested.unpack(project_out(self, out.transpose(1, 2)[real]), query), weights

    def extra_repr(self) -> str:
        found = {
            n: getattr(self, n)
            for n in ("window", "num_kv_heads", "score", "activation", "qk_norm", "compat")
        }
        shown = [f"{n}={x}" for n, x in found.items() if x != getattr(MultiheadAttention, n)]
        if self._has_extras and self.num_heads * self.head_dim != self.embed_dim:
            shown.append(f"head_dim={self.head_dim}")
        return ", ".join(shown)


def _redefines_torch(x: Tensor) -> bool:
    function: Any = type(x).__torch_function__
    ours = torch._C._disabled_torch_function_impl, Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    return getattr(function, "__func__", function) not in ours


def _for_each(query: Any, key: Any, value: Any, fn: Any) -> tuple[Any, Any, Any]:
    """`fn` of each, once for what is one object: the projections ask for identity."""
    q = fn(query)
    k = q if key is query else fn(key)
    v = k if value is key else q if value is query else fn(value)
    return q, k, v
