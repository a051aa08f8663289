"""A small decoder-only Transformer over bytes, in plain torch, trained on the sources of Python's library."""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 1024, 128, 4, 2, 2
WINDOW = 128  # positions that the windowed model sees, its own included
Attention = Callable[[], nn.Module]


def torch_attention() -> nn.Module:
    """What most models have."""
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and beside a residual."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = attention()
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, masks: dict[str, Any]) -> Tensor:  # [B, S, E]
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False, **masks)[0]
        return x + self.feed_forward(self.norm2(x))


class LanguageModel(nn.Module):
    """Logits of the next byte at every position. `masks` go to every attention layer as they are."""

    def __init__(self, attention: Attention = torch_attention, masks: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.masks = masks or {}
        self.embedding = nn.Embedding(256, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList(Block(attention) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, text: Tensor) -> Tensor:  # [B, S] -> [B, S, 256]
        x = self.embedding(text) + self.places
        for block in self.blocks:
            x = block(x, self.masks)
        return self.head(self.norm(x))


def library_text(limit: int = 4_000_000) -> Tensor:
    """The sources of Python's standard library, file after file, as bytes [N]."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text, dtype=torch.uint8)[:limit].clone()


def train(model: LanguageModel, steps: int) -> Iterator[tuple[float, float]]:
    """Train with AdamW; yields (loss, seconds) of every step. The batches depend on the step alone."""
    text = library_text()
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=draw)
        batch = torch.stack([text[s : s + CONTEXT + 1] for s in starts]).long()
        began = time.perf_counter()
        logits = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item(), time.perf_counter() - began
