"""The providers of attention: each turns a case into a call of no arguments, or says why it cannot.

All do the same work: forward without autograd, or forward and the gradients of q, k, v (and of the bias).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import saccade
import torch
import torch.nn.functional as F
from saccade.masks import Mask
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import BACKWARD, DTYPES, FORWARD, TRAIN, Case

SEED = 1  # of saccade's dropout, so that its mask can be checked
Call = Callable[[], list[Tensor]]
_MASK_BYTES = 2 << 30  # no peer is asked for a larger dense mask


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case: the same for every provider."""

    case: Case
    mask: Mask | None
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None  # [1, H, Sq, Sk]
    dout: Tensor

    @classmethod
    def of(cls, case: Case, device: str) -> Inputs:
        """Drawn from N(0, 1) with a fixed seed. The cotangent is integers over 8: exact in every dtype."""
        draw = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[case.dtype]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device=device).to(dtype).requires_grad_()

        q = normal(case.batch, case.heads, case.seqlen_q, case.head_dim)
        k = normal(case.batch, case.heads_k, case.seqlen_k, case.head_dim)
        v = normal(case.batch, case.heads_k, case.seqlen_k, case.head_dim_v)
        bias = normal(1, case.heads, case.seqlen_q, case.seqlen_k) if case.bias else None
        shape = (case.batch, case.heads, case.seqlen_q, case.head_dim_v)
        dout = torch.randint(-8, 9, shape, generator=draw, device=device).to(dtype) / 8
        mask = case.mask()
        return cls(case, None if mask is None else mask.to(device), q, k, v, bias, dout)

    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return [x for x in (self.q, self.k, self.v, self.bias) if x is not None]

    def without_dropout(self) -> Inputs:
        """For peers whose random pattern cannot be known: they are checked on the same call without it."""
        return replace(self, case=replace(self.case, dropout_p=0.0))

    def nbytes(self) -> int:
        """Bytes of q, k, v, the output and all their gradients: what any implementation must hold."""
        return 2 * sum(x.numel() * x.element_size() for x in (*self.leaves(), self.dout))


def _call(inputs: Inputs, direction: str, forward: Callable[[], Tensor]) -> Call:
    """`forward` alone, with gradients, or the gradients of the first call's output, as one call."""

    def forward_only() -> list[Tensor]:
        with torch.no_grad():
            return [forward()]

    def train() -> list[Tensor]:
        out = forward()
        return [out.detach(), *torch.autograd.grad(out, inputs.leaves(), inputs.dout)]

    if direction != BACKWARD:
        return train if direction == TRAIN else forward_only
    made: list[Tensor] = []

    def backward() -> list[Tensor]:
        if not made:
            made.append(forward())
        return [
            made[0].detach(),
            *torch.autograd.grad(made, inputs.leaves(), inputs.dout, retain_graph=True),
        ]

    return backward


def ours(inputs: Inputs, direction: str) -> Call | str:
    """`saccade.attention`."""
    case = inputs.case
    options: dict[str, Any] = {"bias": inputs.bias}
    if case.dropout_p:
        options |= {"dropout_p": case.dropout_p, "seed": SEED}
    return _call(
        inputs, direction, lambda: saccade.attention(inputs.q, inputs.k, inputs.v, inputs.mask, **options)
    )


def ours_plain(inputs: Inputs, direction: str) -> Call | str:
    """`saccade.attention` on the same sizes without dropout, bias or a width of its own for the values."""
    if inputs.case.plain() == inputs.case:
        return "the case is plain"
    return ours(Inputs.of(inputs.case.plain(), inputs.q.device.type), direction)


def sdpa(inputs: Inputs, direction: str) -> Call | str:
    """torch's scaled_dot_product_attention with what it can do without a dense mask."""
    return _beyond_sdpa(inputs.case) or _call(inputs, direction, _sdpa(inputs, is_causal=inputs.case.causal))


def _beyond_sdpa(case: Case) -> str:
    if case.window is not None or case.lengths is not None or case.bias:
        return "needs a dense mask here: see sdpa-mask"
    if case.causal and case.seqlen_q != case.seqlen_k:
        return "its is_causal is aligned with the start of the keys"
    return ""


def sdpa_by(kernel: str) -> Callable[[Inputs, str], Call | str]:
    """torch's scaled_dot_product_attention held to one of its kernels for GPUs."""

    def offer(inputs: Inputs, direction: str) -> Call | str:
        if inputs.q.device.type != "cuda":
            return "for CUDA devices"
        if reason := _beyond_sdpa(inputs.case):
            return reason
        plain = _sdpa(inputs, is_causal=inputs.case.causal)

        def forward() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, kernel)):
                return plain()

        try:
            return _call(inputs, direction, forward) if forward() is not None else ""
        except RuntimeError as error:
            return f"no kernel: {str(error).splitlines()[0]}"

    return offer


def sdpa_mask(inputs: Inputs, direction: str) -> Call | str:
    """scaled_dot_product_attention with a dense mask in q's dtype, made beforehand."""
    case = inputs.case
    if inputs.mask is None and inputs.bias is None:
        return "the case has no mask"
    if case.window is None and case.lengths is None and case.causal and not case.bias:
        return "is_causal serves: see sdpa"
    if (
        case.batch if case.lengths and (case.causal or case.window) else 1
    ) * case.seqlen_q * case.seqlen_k * 4 > _MASK_BYTES:
        return "a dense mask would not fit"
    dense = inputs.bias if case.bias else _dense(inputs)
    return _call(inputs, direction, _sdpa(inputs, attn_mask=dense))


def _dense(inputs: Inputs) -> Tensor:
    """[Sq, Sk], [B, 1, 1, Sk] where padding is all, or [B, 1, Sq, Sk]."""
    assert inputs.mask is not None
    only_padding = not inputs.case.causal and inputs.case.window is None
    keep = inputs.mask.materialize(1 if only_padding else inputs.case.seqlen_q, inputs.case.seqlen_k)
    keep = keep[:, None] if keep.dim() == 3 else keep
    dense = torch.zeros(keep.shape, dtype=inputs.q.dtype, device=inputs.q.device)
    return dense.masked_fill_(~keep.to(inputs.q.device), -torch.inf)


def _sdpa(inputs: Inputs, **options: Any) -> Callable[[], Tensor]:
    gqa = inputs.case.heads != inputs.case.heads_k
    options |= {"dropout_p": inputs.case.dropout_p, "enable_gqa": gqa}
    return lambda: F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, **options)


def flex(inputs: Inputs, direction: str) -> Call | str:
    """Compiled flex_attention, with its block mask made beforehand."""
    case, on_cpu = inputs.case, inputs.q.device.type == "cpu"
    if not case.flex:
        return "not asked of this case (compiling takes long)"
    if case.bias or case.dropout_p:
        return "not written for this option"
    if on_cpu and direction != FORWARD:
        return "no backward on the CPU"
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask, score_mod = None, None
    if inputs.mask is not None:
        batch = case.batch if case.lengths else None
        predicate = _predicate(case, inputs.q.device)
        block_mask = create_block_mask(
            predicate, batch, None, case.seqlen_q, case.seqlen_k, device=inputs.q.device
        )
    torch._dynamo.reset()  # every case compiles anew; torch counts, and refuses the ninth
    torch._functorch.config.donated_buffer = False  # the backward pass alone runs again and again
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    q, k, v = (x.detach() if on_cpu else x for x in (inputs.q, inputs.k, inputs.v))
    gqa = case.heads != case.heads_k
    return _call(
        inputs,
        direction,
        lambda: compiled(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=gqa),
    )


def _predicate(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """The case's mask in the form create_block_mask takes."""
    first, last = case.bounds()
    lengths = torch.tensor(case.lengths or (case.seqlen_k,), device=device)

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = (j - i >= first) & (j - i <= last)
        return inside & (j < lengths[b]) if case.lengths else inside

    return keep


@dataclass(frozen=True)
class Provider:
    """A named way to compute a case. `random`: with dropout its pattern is its own."""

    offer: Callable[[Inputs, str], Call | str]
    random: bool = False


PROVIDERS: dict[str, Provider] = {
    "saccade": Provider(ours),
    "saccade-plain": Provider(ours_plain),
    "sdpa": Provider(sdpa, random=True),
    "sdpa-flash": Provider(sdpa_by("FLASH_ATTENTION"), random=True),
    "sdpa-cudnn": Provider(sdpa_by("CUDNN_ATTENTION"), random=True),
    "sdpa-efficient": Provider(sdpa_by("EFFICIENT_ATTENTION"), random=True),
    "sdpa-mask": Provider(sdpa_mask, random=True),
    "flex": Provider(flex, random=True),
}
