"""Who speaks: a Conformer over the frames, one vector by attention, one class per speaker."""

from __future__ import annotations

import torch
from saccade.nn import AdditiveMarginSoftmax, Conformer, SelfAttentionPooling
from torch import Tensor, nn
from voices import MELS

WIDTH, HEADS, LAYERS, KERNEL = 80, 2, 2, 15
MEAN, SPREAD = -6.0, 5.0  # of log mel bands, roughly


class SpeakerClassifier(nn.Module):
    def __init__(self, speakers: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.enter = nn.Linear(MELS, WIDTH)
        self.encoder = Conformer(WIDTH, HEADS, LAYERS, 2 * WIDTH, KERNEL, dropout)
        self.pool = SelfAttentionPooling(WIDTH)
        self.loss = AdditiveMarginSoftmax(WIDTH, speakers)

    def encode(self, mels: Tensor, padding: Tensor | None = None) -> Tensor:
        """[N, S, 40] -> [N, S, WIDTH]."""
        return self.encoder(self.enter((mels - MEAN) / SPREAD), padding)

    def forward(self, mels: Tensor, padding: Tensor | None = None) -> Tensor:
        """A vector per utterance, [N, WIDTH]."""
        return self.pool(self.encode(mels, padding), padding)

    @torch.no_grad()
    def predict(self, mels: Tensor, padding: Tensor | None = None) -> Tensor:
        """The speaker of each utterance, [N]."""
        return self.loss.logits(self(mels, padding)).argmax(-1)
