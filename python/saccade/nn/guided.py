"""Guided attention: a loss on the attention weights that never lays them out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import int_at_least
from ..functional import attention
from ..masks import KeyPadding
from . import _extras
from ._masks import join
from ._projections import project_memory, project_query
from .attention import MultiheadAttention

_ARGUMENTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask",
              "average_attn_weights", "is_causal")  # fmt: skip


def diagonal_penalty(
    q: Tensor,
    k: Tensor,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    *,
    sigma: float = 0.4,
    **options: Any,
) -> Tensor:
    """r_i = sum_j P_ij W_ij, the penalty that row i of the attention of q over k expects, with

        W_ij = 1 - exp(-(i / Sq_b - j / Sk_b)^2 / (2 sigma^2))     (Tachibana et al., 1710.08969, equation 6)

    A Gaussian of a difference is a short series of cosines, and cos(x - y) = cos x cos y + sin x sin y. So
    every term is an ordinary attention whose values are cos and sin of the key's place: one call of the
    kernel with 2 K value columns, K near 7 + 7 / sigma, gives r to rounding, in O(Sq + Sk) memory.

    Args:
        q: [B, H, Sq, D]; k: [B, Hk, Sk, D]; any float dtype.
        query_lengths, key_lengths: [B] ints, by which places are normalised; keys beyond are not seen.
            Default: all.
        sigma: the paper's g, there 0.2.
        options: of `saccade.attention`, such as scale and mask. Dropout does not belong here.

    Returns [B, H, Sq] in fp32 (fp64 for fp64), with gradients to q and k (and to what the options hold). Rows
    beyond the query's length, and rows that see no key, are 0.
    """
    if not isinstance(sigma, int | float) or sigma <= 0:
        raise ValueError(f"sigma: expected a positive number, got {sigma!r}")
    wide = torch.promote_types(q.dtype, torch.float32)
    frequency, weight = _series(float(sigma), q.device, wide)
    keys = _places(k.shape[2], k.shape[0], key_lengths, "key_lengths", k)  # [B, Sk]
    angle = keys[..., None] * frequency  # [B, Sk, K + 1]
    features = torch.cat([angle.cos(), angle.sin()], -1).to(wide)
    values = features[:, None].expand(-1, k.shape[1], -1, -1)
    mask = options.pop("mask", None)
    if key_lengths is not None:
        mask = join(mask, KeyPadding(key_lengths.to(k.device)))
    # Half precision would round the features, and 1 - sum cancels.
    with torch.autocast(q.device.type, enabled=False):
        expected = attention(q.to(wide), k.to(wide), values, mask, **options)  # [B, H, Sq, 2 (K + 1)]
    queries = _places(q.shape[2], q.shape[0], query_lengths, "query_lengths", q)
    angle = queries[..., None] * frequency
    own = torch.cat([angle.cos() * weight, angle.sin() * weight], -1).to(wide)
    near = (expected * own[:, None]).sum(-1)
    # The first column is cos 0: what the row's weights sum to, 1 or, without a key, 0.
    return (expected[..., 0] - near).masked_fill(~_inside(q, query_lengths)[:, None], 0.0)


def _series(sigma: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Frequencies f and weights w [K + 1], fp64, of exp(-x^2 / (2 sigma^2)) = sum_n w_n cos(f_n x) for
    |x| <= 1: its Fourier series, the first neglected term below the rounding of `dtype`.
    """
    reach = math.sqrt(-2 * math.log(1e-17 if dtype == torch.float64 else 1e-9))  # in sigmas, of what counts
    half_period = (1 + reach * sigma) / 2  # the next Gaussian of the periodic sum is out of reach of |x| <= 1
    step = math.pi / half_period
    count = math.ceil(reach / (step * sigma))
    frequency = torch.arange(count + 1, device=device, dtype=torch.float64) * step
    weight = sigma * math.sqrt(2 * math.pi) / half_period * torch.exp(-(frequency * sigma).square() / 2)
    weight[0] /= 2
    return frequency, weight


def _places(count: int, batch: int, lengths: Tensor | None, name: str, like: Tensor) -> Tensor:
    """[B, count] fp64: the place of each token in its sequence, from 0 to 1; beyond it, 0."""
    place = torch.arange(count, device=like.device, dtype=torch.float64)
    if lengths is None:
        return (place / max(count, 1)).expand(batch, count)
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise ValueError(f"{name}: expected ints [{batch}], got {lengths.dtype} {list(lengths.shape)}")
    lengths = lengths.to(like.device)[:, None]
    return torch.where(place < lengths, place / lengths.clamp(min=1), 0.0)


def _inside(q: Tensor, lengths: Tensor | None) -> Tensor:
    place = torch.arange(q.shape[2], device=q.device)
    if lengths is None:
        return torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    return place < lengths.to(q.device)[:, None]


class GuidedAttentionLoss:
    """The guided attention loss (1710.08969; mean of P o W over the valid cells) of attention modules.

    ```python
    guide = saccade.nn.GuidedAttentionLoss(sigma=0.4)
    with guide.watch(layer.multihead_attn for layer in model.decoder.layers):
        logits = model(source, target)
    loss = cross_entropy + guide(target_lengths, source_lengths)
    ```

    Args:
        sigma: width of the diagonal.
        heads: of these heads only; default all. A guided head leaves the others free.

    `watch` keeps the inputs of the modules' calls, O(N); the call computes their queries and keys again and
    goes through `diagonal_penalty`. Gradients reach the queries' and keys' projections and inputs. A
    key_padding_mask of a watched call holds here too; its other masks are refused.
    """

    def __init__(self, sigma: float = 0.4, heads: Iterable[int] | None = None) -> None:
        if isinstance(sigma, bool) or not isinstance(sigma, int | float):
            raise TypeError(f"sigma: expected a number, got {type(sigma).__name__}")
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma: expected a positive number, got {sigma}")
        self.sigma = sigma
        self.heads = None if heads is None else [int_at_least("heads", h, 0) for h in heads]
        if self.heads == []:
            raise ValueError("heads: expected at least one, or None for all")
        self._seen: list[tuple[Any, Tensor, Tensor, Tensor | None]] = []

    @contextmanager
    def watch(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Sees the calls of `saccade.nn.MultiheadAttention` modules."""
        self._seen.clear()
        modules = [self._checked(module) for module in modules]

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
            query, key, padding = given["query"], given["key"], given.get("key_padding_mask")
            for name in ("attn_mask", "is_causal", "mask"):
                if given.get(name) is not None and given[name] is not False:
                    raise ValueError(f"{name}: the guided attention loss takes calls with padding only")
            if padding is not None and padding.is_floating_point():  # torch's layers make it so
                if padding.device.type == "cpu" and bool(((padding != 0) & (padding != -torch.inf)).any()):
                    raise ValueError("key_padding_mask: the guided attention loss knows 0 and -inf only")
                padding = padding != 0
            if query.dim() != 3 or query.is_nested:
                raise ValueError("query: the guided attention loss needs a batch [N, L, E] or [L, N, E]")
            self._seen.append((module, query, key, padding))

        hooks = [m.register_forward_pre_hook(see, with_kwargs=True) for m in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _checked(self, module: Any) -> nn.Module:
        if not isinstance(module, MultiheadAttention):
            raise TypeError(f"modules: expected saccade.nn.MultiheadAttention, got {type(module).__name__}")
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError("modules: add_bias_kv and add_zero_attn have keys without a place")
        if self.heads is not None and max(self.heads) >= module.num_heads:
            raise ValueError(f"heads: expected 0 to {module.num_heads - 1}, got {max(self.heads)}")
        return module

    def __call__(self, query_lengths: Tensor | None = None, key_lengths: Tensor | None = None) -> Tensor:
        """The loss, a scalar, over the calls that were seen; lengths [N] of the queries and of the keys."""
        if not self._seen:
            raise ValueError("GuidedAttentionLoss: no call was seen; run the model inside watch(modules)")
        losses = [self._one(*call, query_lengths, key_lengths) for call in self._seen]
        self._seen.clear()
        return torch.stack(losses).mean()

    def _one(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        padding: Tensor | None,
        query_lengths: Tensor | None,
        key_lengths: Tensor | None,
    ) -> Tensor:
        if not module.batch_first:
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        q, k = project_query(module, query).transpose(1, 2), project_memory(module, key)[0].transpose(1, 2)
        terms = _extras.terms(module, q.shape[2], k.shape[2])
        window: Any = _extras.get_window(module)
        if padding is not None:
            window = join(window, KeyPadding(keep=~padding))
        rows = diagonal_penalty(
            q, k, query_lengths, key_lengths, sigma=self.sigma, mask=window, **terms
        )  # [B, H, Sq]
        rows = rows if self.heads is None else rows[:, self.heads]
        each = (
            torch.full((q.shape[0],), q.shape[2], device=q.device) if query_lengths is None else query_lengths
        )
        sees = torch.full((q.shape[0],), k.shape[2], device=q.device) if key_lengths is None else key_lengths
        cells = (each.to(q.device) * sees.to(q.device)).sum().clamp(min=1)
        return rows.sum() / (cells * rows.shape[1])
