"""A label for every word, or one for all of them; and what either can do without seeing the others."""

from __future__ import annotations

import torch
from data import TAGS, WORDS
from saccade.nn import SelfAttentionPooling, SinusoidalPosition, TransformerEncoder, TransformerEncoderLayer
from torch import Tensor, nn

WIDTH, HEADS, LAYERS = 32, 4, 2


class Reader(nn.Module):
    """Words to vectors [N, S, WIDTH]. Without `context` each word is read by itself."""

    def __init__(self, context: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS) + 1, WIDTH, padding_idx=0)
        self.context = context
        if context:
            self.position = SinusoidalPosition(WIDTH, base=100.0, batch_first=True)
            layer = TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
            self.encoder = TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH))
        else:
            self.alone = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        if not self.context:
            return self.alone(x)
        return self.encoder(self.position(x), src_key_padding_mask=words == 0)


class Tagger(nn.Module):
    """Logits [N, S, tags]: a label for every word."""

    def __init__(self, context: bool = True) -> None:
        super().__init__()
        self.reader, self.head = Reader(context), nn.Linear(WIDTH, len(TAGS))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.reader(words))


class Judge(nn.Module):
    """Logits [N, 2]: a label for the whole. Without context the words' mean is read."""

    def __init__(self, context: bool = True) -> None:
        super().__init__()
        self.reader, self.head = Reader(context), nn.Linear(WIDTH, 2)
        self.pool = SelfAttentionPooling(WIDTH) if context else None

    def forward(self, words: Tensor) -> Tensor:
        x, padding = self.reader(words), words == 0
        if self.pool is not None:
            return self.head(self.pool(x, padding))
        total = x.masked_fill(padding[..., None], 0.0).sum(1)
        return self.head(total / (~padding).sum(1, keepdim=True))

    @torch.no_grad()
    def looks(self, words: Tensor) -> Tensor:
        """[N, S]: how much each word counts."""
        assert self.pool is not None
        return self.pool.weights(self.reader(words), words == 0)[:, 0]
