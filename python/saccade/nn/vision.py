"""The Vision Transformer (Dosovitskiy et al., 2010.11929): patches as words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import int_at_least
from ._asked import check_shape
from .transformer import TransformerEncoder
from .transformer_layers import TransformerEncoderLayer

Size = int | tuple[int, int]


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = value if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected an int or (height, width), got {value!r}")
    return int_at_least(name, pair[0], 1), int_at_least(name, pair[1], 1)


class PatchEmbedding(nn.Module):
    """Cuts images into patches and projects each: [N, C, H, W] -> [N, (H / p) (W / p), d_model], by rows.

    `projection` is a Conv2d whose kernel and stride are the patch (2010.11929, equation 1). Raises ValueError
    for an image that the patch does not divide.
    """

    def __init__(
        self, patch_size: Size, in_channels: int, d_model: int, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.patch_size = _pair("patch_size", patch_size)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.projection = nn.Conv2d(in_channels, d_model, self.patch_size, self.patch_size, **factory)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """How many patches down and across."""
        down, across = self.patch_size
        if height % down or width % across:
            raise ValueError(
                f"images: expected a multiple of the patch {self.patch_size}, got {(height, width)}"
            )
        return height // down, width // across

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] -> [N, patches, d_model], by rows."""
        channels = self.projection.in_channels
        if check_shape("images", images, "[N, C, H, W]", (4,)).shape[1] != channels:
            raise ValueError(f"images: expected {channels} channels, got {images.shape[1]}")
        self.grid(*images.shape[2:])
        return self.projection(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Patches, a class token before them, learned positions, an encoder with norms first, a head.

    Args:
        image_size, patch_size: an int or (height, width) each.
        num_layers, num_heads, d_model, dim_feedforward: of the encoder; dim_feedforward by default
            4 d_model.
        num_classes: size of the head.
        in_channels, dropout: of the images; everywhere.
        options: of the layers, such as window or num_kv_heads.

    forward: images [N, C, H, W] -> logits [N, num_classes]. Images of another size than image_size take the
    positions interpolated (2010.11929, section 3.2), the class token's aside. `features` are the encoder's
    rows [N, 1 + patches, d_model].
    """

    def __init__(
        self,
        image_size: Size,
        patch_size: Size,
        num_layers: int,
        num_heads: int,
        d_model: int,
        num_classes: int,
        dim_feedforward: int | None = None,
        in_channels: int = 3,
        dropout: float = 0.0,
        *,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patches = PatchEmbedding(patch_size, in_channels, d_model, **factory)
        self.grid = self.patches.grid(*_pair("image_size", image_size))
        count = self.grid[0] * self.grid[1]
        self.class_token = nn.Parameter(torch.zeros(1, 1, d_model, **factory))
        self.position = nn.Parameter(torch.empty(1, 1 + count, d_model, **factory).normal_(std=0.02))
        layer = TransformerEncoderLayer(
            d_model, num_heads, dim_feedforward or 4 * d_model, dropout, F.gelu, batch_first=True,
            norm_first=True, **factory, **options,
        )  # fmt: skip
        self.encoder = TransformerEncoder(layer, num_layers, nn.LayerNorm(d_model, **factory))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(d_model, num_classes, **factory)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """[1, 1 + patches, d_model] for a grid of patches."""
        if grid == self.grid:
            return self.position
        own = self.position[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        wide = own.to(torch.promote_types(own.dtype, torch.float32))
        wide = F.interpolate(wide, size=grid, mode="bicubic", align_corners=False).to(own.dtype)
        return torch.cat([self.position[:, :1], wide.flatten(2).transpose(1, 2)], 1)

    def features(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] -> [N, 1 + patches, d_model]: class token and patches after the encoder."""
        x = self.patches(images)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
        return self.encoder(self.dropout(x + self.positions(self.patches.grid(*images.shape[2:]))))

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] -> logits [N, num_classes]."""
        return self.head(self.features(images)[:, 0])
