"""`MultiheadAttention`: torch's module with the kernels of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..masks import Band, Mask
from . import _checks, _extras, _nested
from ._core import BATCH_FIRST, SEQ_FIRST, Options, attend, attend_packed
from ._masks import join, resolve_masks

_PLAIN = (Tensor, nn.Parameter)
Masks = tuple[Tensor | None, Tensor | None]


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`: same arguments, parameters, state_dict, initial values and results, through
    `saccade.attention`. Nothing of size L x S is kept unless `need_weights` (torch's default, True) asks for it.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: torch's.
        window: (left, right), each an int, None or an [H] tensor: `saccade.Window`.
        num_kv_heads: fewer key and value heads; head h reads h // (num_heads // num_kv_heads).
        head_dim: of each head, where it is not embed_dim // num_heads.
        score: "dot"; "additive", w . tanh(q + k) with its own w [H, D]; an Additive or GATv2; a callable giving one.
        activation: "softmax", "relu", "sigmoid" or "softmax1".
        qk_norm: an RMS norm with a weight [D] on every head's queries and keys.
        position: a `saccade.position` object, or a callable (L, S) -> one. A module's parameters become this module's.
        compat: "safe", or "torch" for what torch does where it contradicts itself. In the safe form a row without keys
            gives zeros (out_proj.bias after the projection); attn_mask and is_causal both hold; the columns of
            add_bias_kv and add_zero_attn are always visible.

    Without the arguments from `window` on, the state_dict is torch's. With them: in_proj_weight [(H + 2 Hk) D, E] (or
    q_proj_weight [H D, E], k_proj_weight [Hk D, kdim], v_proj_weight [Hk D, vdim]), in_proj_bias [(H + 2 Hk) D], bias_k
    and bias_v [1, 1, Hk D], out_proj.weight [E, H D], score_term.weight [H, D], q_norm.weight and k_norm.weight [D],
    position_term.*. `_qkv_same_embed_dim` is then False: nobody may compute with these weights but this class.

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
        if window is not None:
            _extras.set_window(self, window)
        if activation != "softmax":
            _extras.set_activation(self, activation)
        if score != "dot":
            _extras.set_score(self, score, factory)
        if qk_norm:
            _extras.set_norms(self, factory)
        if position is not None:
            _extras.set_position(self, position)
        if resized or window is not None or activation != "softmax" or score != "dot" or qk_norm or position is not None:
            self._set_extras(compat)
        if compat != "safe":
            self.compat = compat
        if resized or score == "additive":
            self._reset_parameters()

    def _set_extras(self, compat: str) -> None:
        if compat == "torch":
            raise ValueError('compat: "torch" knows none of the arguments from window to position')
        self._has_extras = True
        # torch's encoder layer computes with the weights of a module that says True here, past its forward.
        self._qkv_same_embed_dim = False

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
            nn.init.xavier_uniform_(self.score_term.weight)

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            "saccade.nn.MultiheadAttention: torch.jit.script cannot compile it; use torch.compile or torch.export"
        )

    def forward(  # type: ignore[override]
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

        Shapes: query (L, N, E), or (N, L, E) with batch_first, or (L, E); key and value alike with S, kdim and vdim; or
        nested tensors (N, ragged, E). key_padding_mask (N, S) or (S,); attn_mask (L, S) or (N * H, L, S). True hides.
        Returns the output, like query, and with `need_weights` the weights after dropout: (N, L, S'), or (N, H, L, S')
        unless averaged. S' is S, then one column for add_bias_kv, then one for add_zero_attn.
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
        if all(type(x) in _PLAIN for x in inputs) or any(x.is_nested for x in inputs):
            return False
        # Subclasses that redefine torch's functions, or its operators (DTensor), know torch's, not ours.
        return any(_redefines_torch(x) or is_traceable_wrapper_subclass(x) for x in inputs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, masks: Masks, flags: Any, is_causal: bool, mask: Any, first: bool
    ) -> tuple[Tensor, Tensor | None]:
        """On [N, S, E] (`first`) or [S, N, E]."""
        at = 1 if first else 0  # the dimension of the sequence
        batch, tgt_len, src_len = query.shape[1 - at], query.shape[at], key.shape[at]
        qkv = self._project(query, key, value)  # [N, S, H, D] or [S, N, H, D]
        _checks.check_sizes(self, (batch, tgt_len, src_len), qkv[1], masks)
        own, bias = resolve_masks(masks, is_causal, (batch, self.num_heads), qkv[0].dtype)
        options = self._options(flags, tgt_len, src_len)
        q, k, v = (x.transpose(1, 2) if first else x.permute(1, 2, 0, 3) for x in qkv)
        out, weights = attend(
            (q, k, v), BATCH_FIRST if first else SEQ_FIRST, options,
            mask=join(own, _extras.get_window(self), mask), bias=bias, **self._extra_key(),
        )  # fmt: skip
        rows = out.transpose(1, 2) if first else out.permute(2, 0, 1, 3)
        if weights is not None and self.activation == "softmax1":
            weights = weights[..., :-1]  # its zero column belongs to add_zero_attn alone
        return self._project_out(rows), weights

    def _forward_nested(
        self, inputs: tuple[Tensor, Tensor, Tensor], masks: Masks, flags: Any, is_causal: bool, mask: Mask | None
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
            raise AssertionError(f"nested query, key and value: expected one batch, got {[x.batch for x in (query, key, value)]}")
        qkv = self._project(query.values, key.values, value.values)  # [total, H, D]
        mask = join(_extras.get_window(self), mask)
        options = self._options(flags, query.longest, key.longest)
        if not options.need_weights:
            lengths = (query.cu_seqlens, key.cu_seqlens, query.longest, key.longest)
            out = attend_packed(qkv, lengths, options, mask, **self._extra_key())
            return _nested.unpack(self._project_out(out), query), None
        if mask is not None:
            raise NotImplementedError("need_weights with nested tensors and a mask or window: pad the inputs instead")
        q, real = _nested.padded(qkv[0], query)
        k, v = (_nested.padded(x, key)[0] for x in qkv[1:])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, weights = attend((q, k, v), BATCH_FIRST, options, mask=_nested.padding(key), **self._extra_key())
        return _nested.unpack(self._project_out(out.transpose(1, 2)[real]), query), weights

    def _options(self, flags: Any, seqlen_q: int, seqlen_k: int) -> Options:
        return Options(*flags, self.dropout if self.training else 0.0, _extras.terms(self, seqlen_q, seqlen_k))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [..., H, D], k and v [..., Hk, D]: views of one product where the three inputs are one."""
        heads, heads_k = self.num_heads, self.num_kv_heads or self.num_heads
        weight, bias, dim = self.in_proj_weight, self.in_proj_bias, self.head_dim
        if weight is not None and query is key and key is value:
            joint = F.linear(query, weight, bias)
            q, k, v = joint.view(*joint.shape[:-1], heads + 2 * heads_k, dim).split([heads, heads_k, heads_k], -2)
        elif weight is not None and key is value:
            first = heads * dim
            q = F.linear(query, weight[:first], None if bias is None else bias[:first]).unflatten(-1, (heads, dim))
            joint = F.linear(key, weight[first:], None if bias is None else bias[first:])
            k, v = joint.view(*joint.shape[:-1], 2 * heads_k, dim).split(heads_k, -2)
        else:
            sizes = [heads * dim, heads_k * dim, heads_k * dim]
            weights = weight.split(sizes) if weight is not None else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.split(sizes)
            parts = zip((query, key, value), weights, biases, strict=True)
            q, k, v = (F.linear(*part).unflatten(-1, (-1, dim)) for part in parts)
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)

    def _project_out(self, out: Tensor) -> Tensor:
        # By attribute, as torch does: what stands in place of out_proj may hold other weights at every call.
        return F.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)

    def _extra_key(self) -> dict[str, Tensor]:
        """bias_k and bias_v as one more key of every head."""
        bias_k, bias_v = self.bias_k, self.bias_v
        if bias_k is None or bias_v is None:
            return {}
        group = self.num_heads // (self.num_kv_heads or self.num_heads)
        found = (x.view(-1, self.head_dim).repeat_interleave(group, 0) if group > 1 else x.view(-1, self.head_dim) for x in (bias_k, bias_v))
        return dict(zip(("extra_k", "extra_v"), found, strict=True))

    def extra_repr(self) -> str:
        found = {n: getattr(self, n) for n in ("window", "num_kv_heads", "score", "activation", "qk_norm", "compat")}
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
