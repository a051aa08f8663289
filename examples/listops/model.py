"""One encoder, four ways to look around: everywhere, nearby, BigBird's pattern, along the tree."""

from __future__ import annotations

from functools import lru_cache

import saccade
import torch
from data import TOKENS, Batch
from saccade.nn import SelfAttentionPooling, SinusoidalPosition, TransformerEncoder, TransformerEncoderLayer
from torch import Tensor, nn

PATTERNS = ("full", "window", "bigbird", "tree")
WIDTH, HEADS, LAYERS, REACH, BLOCK = 64, 4, 4, 16, 8


@lru_cache(maxsize=16)
def bigbird(length: int) -> saccade.Graph:
    return saccade.patterns.bigbird(length, BLOCK, num_random_blocks=2)


class Calculator(nn.Module):
    """Logits [N, 10] of the value. The last vectors of the first token and of a pooling go to the head."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = pattern
        self.words = nn.Embedding(len(TOKENS) + 1, WIDTH, padding_idx=len(TOKENS))
        self.position = SinusoidalPosition(WIDTH, batch_first=True)
        layer = TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.encoder = TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH))
        self.pool = SelfAttentionPooling(WIDTH)
        self.head = nn.Linear(2 * WIDTH, 10)

    def encode(self, batch: Batch) -> Tensor:
        """[N, S, WIDTH]."""
        x = self.position(self.words(batch.tokens))
        if self.pattern == "tree":  # one graph over all places of the batch
            return self.encoder(x.flatten(0, 1)[None], mask=batch.tree).view_as(x)
        return self.encoder(x, mask=self.mask(batch))

    def mask(self, batch: Batch) -> saccade.Mask:
        padding = saccade.KeyPadding(keep=~batch.padding)
        if self.pattern == "window":
            return padding & saccade.Window(REACH, REACH)
        return padding & bigbird(batch.tokens.shape[1]) if self.pattern == "bigbird" else padding

    def forward(self, batch: Batch) -> Tensor:
        x = self.encode(batch)
        return self.head(torch.cat([x[:, 0], self.pool(x, batch.padding)], -1))
