"""Attention from pixel to pixel, in 2-D neighbourhoods, and convolution as a case of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import int_at_least
from ..functional import attention
from ..graph import Graph
from ..maskbase import untraced
from ..patterns import check_radius, grid2d
from ._asked import check_shape
from .attention import MultiheadAttention

Pair = int | tuple[int, int]
_KEPT = 8  # neighbourhoods of as many image sizes
_FP32_PLACES = 4096  # above, the squares of places from the middle, and alpha times them, want fp64


class PixelAttention(nn.Module):
    """Self-attention of the pixels of an image, each a vector of its channels (1805.08318, 1906.05909).

    Args:
        channels, num_heads: of the attention.
        radius: a pixel sees those at most so far in rows and in columns, cut off at the border: an int,
            (rows, columns), or None for the whole image.
        dilation: only every so many-th of them.
        options: `MultiheadAttention`'s, such as dropout or qk_norm.

    forward: [N, C, H, W], any H and W -> the same. Nothing of size (H W)^2 is made; with a radius the cost is
    that of the neighbourhoods.
    """

    def __init__(
        self, channels: int, num_heads: int, radius: Pair | None = None, *, dilation: int = 1, **options: Any
    ) -> None:
        super().__init__()
        if radius is not None:
            check_radius(radius)
        if int_at_least("dilation", dilation, 1) > 1 and radius is None:
            raise ValueError(f"dilation: needs a radius, got {dilation} without one")
        self.radius, self.dilation = radius, dilation
        self.attention = MultiheadAttention(channels, num_heads, batch_first=True, **options)
        self._graphs: dict[Any, Graph] = {}

    def neighbourhood(self, height: int, width: int, device: Any = None) -> Graph | None:
        """The mask for images of this size; it is kept. `torch.compile(fullgraph=True)` wants it, and its
        `prepare()`, before.
        """
        if self.radius is None:
            return None
        device = torch.get_default_device() if device is None else torch.device(device)
        key = (height, width, str(device))
        if key not in self._graphs:
            self._build(height, width, device)
        return self._graphs[key]

    @untraced("the mask for images of a new size: call neighbourhood(height, width, device).prepare() before")
    def _build(self, height: int, width: int, device: Any) -> None:
        assert self.radius is not None
        graph = grid2d(height, width, self.radius, dilation=self.dilation)
        while len(self._graphs) >= _KEPT:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[height, width, str(device)] = graph if device is None else graph.to(device)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W], any H and W -> the same."""
        check_shape("images", images, "[N, C, H, W]", (4,))
        rows = images.flatten(2).transpose(1, 2)
        height, width = images.shape[2:]
        mask = self.neighbourhood(height, width, images.device)
        out, _ = self.attention(rows, rows, rows, need_weights=False, mask=mask)
        return out.transpose(1, 2).unflatten(2, (height, width))

    def extra_repr(self) -> str:
        return f"radius={self.radius}, dilation={self.dilation}"


class ConvolutionalAttention(nn.Module):
    """Multi-head self-attention that is a convolution (Cordonnier, Loukas, Jaggi: 1911.03584).

    With the quadratic encoding a head h of the K x K prefers the pixel at `shift` Delta_h from its own,

        logit = -alpha |p_k - p_q - Delta_h|^2

    and for alpha large sees that one alone. Of the square, -alpha |p_q + Delta_h|^2 is the same for all keys
    and falls out of the softmax; the rest is a dot product of three features,

        (2 alpha (p_q + Delta_h), -alpha) . (p_k, |p_k|^2)

    so this is the ordinary kernel, its keys the same for all heads and its values the pixels themselves. The
    output projection then holds the kernel of the convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: `torch.nn.Conv2d`'s. Padding
            is zeros around the image, which are pixels to attend to.
        alpha: 30 makes the weights of all other pixels vanish beside 1, in fp64 nearly (e^-30 = 1e-13).

    `weight` [out, in, kh, kw] and `bias` [out] are as Conv2d's, so that its state_dict loads; `shift`
    [kh kw, 2] (rows, columns) and `alpha` are parameters too: a convolution that can learn where to look.
    forward: [N, in, H, W] -> Conv2d's result, to rounding. Half precision is computed in fp32. Attention goes
    over the whole image: this is to understand and to test, not to replace Conv2d.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        bias: bool = True,
        alpha: float = 50.0,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = (kernel_size, stride, padding, dilation)
        conv = nn.Conv2d(in_channels, out_channels, *sizes, bias=bias, **factory)
        if not isinstance(conv.padding, tuple) or conv.padding_mode != "zeros":
            raise ValueError(f"padding: expected ints, got {padding!r}")
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = conv.padding, conv.dilation
        self.weight, self.bias = conv.weight, conv.bias
        rows, columns = (
            torch.arange(k, device=conv.weight.device) * d
            for k, d in zip(conv.kernel_size, conv.dilation, strict=True)
        )
        self.shift = nn.Parameter(torch.cartesian_prod(rows, columns).to(conv.weight).view(-1, 2))
        self.alpha = nn.Parameter(torch.tensor(float(alpha), device=conv.weight.device).to(conv.weight))

    @classmethod
    def of(cls, conv: nn.Conv2d, alpha: float = 50.0) -> ConvolutionalAttention:
        """With the weights of a Conv2d (groups=1, zero padding), copied."""
        if conv.groups != 1 or conv.padding_mode != "zeros" or not isinstance(conv.padding, tuple):
            raise ValueError(f"conv: expected groups=1 and ints of zero padding, got {conv}")
        sizes: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        factory: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        factory |= {"bias": conv.bias is not None, "alpha": alpha}
        made = cls(conv.in_channels, conv.out_channels, *sizes, **factory)
        made.load_state_dict(conv.state_dict(), strict=False)
        return made

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, in, H, W] -> [N, out, H', W'], as Conv2d gives them."""
        channels = self.weight.shape[1]
        if check_shape("images", images, "[N, C, H, W]", (4,)).shape[1] != channels:
            raise ValueError(f"images: expected {channels} channels, got {images.shape[1]}")
        (down, across), (height, width) = self.padding, images.shape[2:]
        x = F.pad(images, (across, across, down, down))
        tall, wide = height + 2 * down, width + 2 * across
        reach = [(k - 1) * d for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        rows, columns = (
            (size - r - 1) // s + 1 for size, r, s in zip((tall, wide), reach, self.stride, strict=True)
        )
        if rows < 1 or columns < 1:
            raise ValueError(f"images: expected at least the kernel's size, got {(height, width)}")
        # Places far apart have large squares: they keep the digits of fp32 whatever the images' dtype.
        dtype = torch.promote_types(images.dtype, torch.float32)
        if max(tall, wide) > _FP32_PLACES:
            dtype = torch.float64
        q, k = self._features((rows, columns), (tall, wide), images.device, dtype)
        v = x.flatten(2).transpose(1, 2)[:, None].to(dtype)  # [N, 1, tall wide, in], for all heads
        kernel = self.weight.flatten(2).permute(2, 1, 0).flatten(0, 1).to(dtype)  # [kh kw in, out]
        with torch.autocast(images.device.type, enabled=False):
            out = attention(
                q.expand(v.shape[0], -1, -1, -1), k.expand(v.shape[0], -1, -1, -1), v, scale=1.0
            )  # [N, kh kw, rows columns, in]
            out = out.transpose(1, 2).flatten(2) @ kernel
        out = out if self.bias is None else out + self.bias.to(dtype)
        return out.transpose(1, 2).unflatten(2, (rows, columns)).to(images.dtype)

    def _features(
        self, queries: tuple[int, int], keys: tuple[int, int], device: Any, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """q [1, kh kw, rows columns, 3] and k [1, 1, tall wide, 3]."""
        stride = torch.tensor(self.stride, device=device, dtype=dtype)
        # Seen from the middle: the squares are a quarter, and the softmax does not mind.
        middle = torch.tensor([(n - 1) / 2 for n in keys], device=device, dtype=dtype)
        at = _places(queries, device, dtype) * stride - middle
        alpha, shift = self.alpha.to(dtype), self.shift.to(dtype)
        wanted = at + shift[:, None]  # [kh kw, rows columns, 2]
        q = torch.cat([2 * alpha * wanted, (-alpha).expand(*wanted.shape[:2], 1)], -1)
        place = _places(keys, device, dtype) - middle
        k = torch.cat([place, place.square().sum(-1, keepdim=True)], -1)
        return q[None], k[None, None]

    def extra_repr(self) -> str:
        out, into, *size = self.weight.shape
        return f"{into}, {out}, kernel_size={tuple(size)}, stride={self.stride}, padding={self.padding}"


def _places(size: tuple[int, int], device: Any, dtype: torch.dtype) -> Tensor:
    """[height * width, 2]: row and column of every pixel."""
    rows, columns = (torch.arange(n, device=device, dtype=dtype) for n in size)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
