"""Three ways to read an 8 x 8 digit: patches, pixels with their neighbours, convolutions and their twin."""

from __future__ import annotations

import copy
from typing import Any

import torch
from saccade.nn import ConvolutionalAttention, PixelAttention, VisionTransformer
from torch import Tensor, nn

SIDE, CLASSES, WIDTH, HEADS = 8, 10, 48, 4


def patches() -> nn.Module:
    """A Vision Transformer of 16 patches of 2 x 2 and a class token."""
    return VisionTransformer(SIDE, 2, 2, HEADS, WIDTH, CLASSES, 2 * WIDTH, in_channels=1, dropout=0.1)


class Block(nn.Module):
    """Attention of every pixel to its neighbourhood, then a feed-forward part; norms first."""

    def __init__(self, radius: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, WIDTH), nn.GroupNorm(1, WIDTH)
        self.attention = PixelAttention(WIDTH, HEADS, radius)
        self.feed = nn.Sequential(nn.Conv2d(WIDTH, 2 * WIDTH, 1), nn.GELU(), nn.Conv2d(2 * WIDTH, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Pixels(nn.Module):
    """64 pixels, each with a learned position, that see 5 x 5 neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, WIDTH, 1)
        self.position = nn.Parameter(0.02 * torch.randn(1, WIDTH, SIDE, SIDE))
        self.blocks = nn.Sequential(Block(2), Block(2))
        self.head = nn.Sequential(
            nn.GroupNorm(1, WIDTH), nn.Flatten(), nn.Linear(WIDTH * SIDE * SIDE, CLASSES)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.enter(images) + self.position))


def convolutions() -> nn.Sequential:
    """An ordinary small network of two convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, CLASSES),
    )  # fmt: skip


def as_attention(network: nn.Sequential) -> nn.Sequential:
    """The same network with every convolution as self-attention."""
    made: Any = copy.deepcopy(network)
    for n, layer in enumerate(made):
        if isinstance(layer, nn.Conv2d):
            made[n] = ConvolutionalAttention.of(layer)
    return made
