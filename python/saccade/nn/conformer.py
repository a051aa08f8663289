"""The Conformer (Gulati et al., 2005.08100), in which padding is nowhere seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import int_at_least
from ..masks import Mask
from ._asked import check_padding, check_shape
from .attention import MultiheadAttention
from .positions import TransformerXLPosition


class MaskedBatchNorm(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over the channels of [N, S, C], whose statistics are those of the valid rows.

    forward(x, valid): `valid` bool [N, S] or None for all. Rows that are not valid come out as zeros. A batch
    without valid rows counts for nothing. How many are valid is never read from the device.
    """

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x [N, S, C] -> the same; `valid` bool [N, S] or None for all."""
        if valid is None:
            return super().forward(x.flatten(0, -2)).view_as(x)
        if valid.shape != x.shape[:-1]:
            raise ValueError(f"valid: expected shape {list(x.shape[:-1])}, got {list(valid.shape)}")
        hidden = ~valid[..., None]
        if not self.training and self.track_running_stats:
            rows = x.masked_fill(hidden, 0.0)  # NaN there would reach the gradient of the weight
            return super().forward(rows.flatten(0, -2)).view_as(x).masked_fill(hidden, 0.0)
        rows = x.masked_fill(hidden, 0.0).to(torch.promote_types(x.dtype, torch.float32))
        total = valid.sum()
        count = total.clamp(min=1).to(rows.dtype)
        mean = rows.sum((0, 1)) / count
        centred = (rows - mean).masked_fill(hidden, 0.0)
        var = centred.square().sum((0, 1)) / count
        if self.training and self.track_running_stats:
            self._track(mean.detach(), var.detach() * (count / (count - 1).clamp(min=1)), total > 0)
        out = centred * (var + self.eps).rsqrt()
        if self.affine:
            out = out * self.weight + self.bias
        return out.to(x.dtype).masked_fill(hidden, 0.0)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, seen: Tensor) -> None:
        """torch's running statistics; `var` with Bessel's correction."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(seen)
        share: Any = self.momentum
        if share is None:  # the mean over all batches
            share = 1.0 / self.num_batches_tracked.clamp(min=1).to(mean.dtype)
        for held, new in ((self.running_mean, mean), (self.running_var, var)):
            held.copy_(torch.where(seen, held + share * (new - held), held))


class ConformerConvolution(nn.Module):
    """Layer norm, pointwise, GLU, depthwise, batch norm, Swish, pointwise, dropout: 2005.08100, figure 2.

    Args:
        d_model: channels.
        kernel_size: of the depthwise convolution. A place sees kernel_size // 2 frames before it and
            (kernel_size - 1) // 2 after it; with `causal` kernel_size - 1 before it and none after.

    forward(x [N, S, d_model], valid bool [N, S] or None) -> [N, S, d_model], without the residual.
    """

    def __init__(
        self,
        d_model: int,
        kernel_size: int = 31,
        dropout: float = 0.0,
        *,
        causal: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        int_at_least("kernel_size", kernel_size, 1)
        self.before = kernel_size - 1 if causal else kernel_size // 2
        self.after = kernel_size - 1 - self.before
        self.norm = nn.LayerNorm(d_model, **factory)
        self.pointwise1 = nn.Linear(d_model, 2 * d_model, **factory)
        self.depthwise = nn.Conv1d(d_model, d_model, kernel_size, groups=d_model, **factory)
        self.batch_norm = MaskedBatchNorm(d_model, **factory)
        self.pointwise2 = nn.Linear(d_model, d_model, **factory)
        self.dropout = nn.Dropout(dropout)

    def enter(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """What the depthwise convolution reads: zeros where there is padding."""
        x = F.glu(self.pointwise1(self.norm(x)), -1)
        return x if valid is None else x.masked_fill(~valid[..., None], 0.0)

    def leave(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """From the depthwise convolution of `x`, which has `before` and `after` more frames at its ends."""
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        return self.dropout(self.pointwise2(F.silu(self.batch_norm(x, valid))))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x [N, S, d_model] -> the same; `valid` bool [N, S] or None for all."""
        return self.leave(F.pad(self.enter(x, valid), (0, 0, self.before, self.after)), valid)


class ConformerLayer(nn.Module):
    """Half a feed-forward part, attention, convolution, half a feed-forward part, layer norm (2005.08100):

        x <- x + F(x) / 2,   x <- x + A(LN(x)),   x <- x + C(x),   x <- LN(x + F'(x) / 2)

    Args:
        d_model, nhead: channels and heads.
        dim_feedforward: default 4 d_model.
        kernel_size: of the convolution, odd or even.
        dropout: everywhere.
        causal: the convolution sees no later frame.
        position: default "relative", Transformer-XL's as in the paper; None; or what `MultiheadAttention`
            takes.
        window, num_kv_heads, head_dim, ...: `saccade.nn.MultiheadAttention`'s, such as
            `window=(64, 8)` for truncated attention (1910.12977), a bound per head as a tensor [H].

    forward: x [N, S, d_model], padding bool [N, S] (True = padding), mask a `saccade.Mask` more for the
    attention. Padded frames are read by nothing and come out as zeros; a frame's result does not depend on
    how far its sequence is padded, in training neither (but for what dropout draws).
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int | None = None,
        kernel_size: int = 31,
        dropout: float = 0.1,
        *,
        causal: bool = False,
        position: Any = "relative",
        device: Any = None,
        dtype: Any = None,
        **extras: Any,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if isinstance(position, str) and position == "relative":
            position = TransformerXLPosition(d_model, nhead, extras.get("head_dim"), **factory)
        wide = 4 * d_model if dim_feedforward is None else dim_feedforward
        self.feed1, self.feed2 = (_feed_forward(d_model, wide, dropout, factory) for _ in range(2))
        self.norm = nn.LayerNorm(d_model, **factory)
        self.self_attn = MultiheadAttention(
            d_model, nhead, dropout, batch_first=True, position=position, **factory, **extras
        )
        self.dropout = nn.Dropout(dropout)
        self.convolution = ConformerConvolution(d_model, kernel_size, dropout, causal=causal, **factory)
        self.norm_out = nn.LayerNorm(d_model, **factory)
        self.d_model = d_model

    def forward(self, x: Tensor, padding: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        """x [N, S, d_model] -> the same; `padding` bool [N, S] (True = padding); a `mask` holds too."""
        check_shape("x", x, f"[N, S, {self.d_model}]", (3,), self.d_model)
        check_padding("padding", padding, *x.shape[:2])
        valid = None if padding is None else ~padding
        x = x if padding is None else x.masked_fill(padding[..., None], 0.0)
        x = x + 0.5 * self.feed1(x)
        y = self.norm(x)
        y, _ = self.self_attn(y, y, y, key_padding_mask=padding, need_weights=False, mask=mask)
        x = x + self.dropout(y)
        x = x + self.convolution(x, valid)
        x = self.norm_out(x + 0.5 * self.feed2(x))
        return x if padding is None else x.masked_fill(padding[..., None], 0.0)


def _feed_forward(d_model: int, wide: int, dropout: float, factory: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(d_model, **factory), nn.Linear(d_model, wide, **factory), nn.SiLU(), nn.Dropout(dropout),
        nn.Linear(wide, d_model, **factory), nn.Dropout(dropout),
    )  # fmt: skip


class Conformer(nn.Module):
    """A stack of `ConformerLayer`s.

    Args:
        num_layers: how many.
        windows: per layer (left, right) or None; in place of `window`.
        others: `ConformerLayer`'s.

    forward: as the layer's. For streaming see `EncoderStream`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_layers: int,
        dim_feedforward: int | None = None,
        kernel_size: int = 31,
        dropout: float = 0.1,
        *,
        windows: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        int_at_least("num_layers", num_layers, 1)
        if windows is not None and len(windows) != num_layers:
            raise ValueError(f"windows: expected one for each of {num_layers} layers, got {len(windows)}")
        if windows is not None and "window" in options:
            raise ValueError("window: not beside windows")
        position = options.get("position")
        if isinstance(position, nn.Module):
            raise ValueError(
                "position: a module would be shared by all layers; make ConformerLayers of your own"
            )
        each = [{}] * num_layers if windows is None else [{"window": window} for window in windows]
        sizes: Any = (d_model, nhead, dim_feedforward, kernel_size, dropout)
        self.layers = nn.ModuleList(ConformerLayer(*sizes, **(options | one)) for one in each)

    def forward(self, x: Tensor, padding: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        """x [N, S, d_model] -> the same; `padding` bool [N, S] (True = padding); a `mask` holds too."""
        for layer in self.layers:
            x = layer(x, padding, mask)
        return x
