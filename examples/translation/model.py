"""An encoder with two decoders: one writes digit after digit, the other all of them at once."""

from __future__ import annotations

from typing import Any

import saccade
import torch
from data import BOS, DIGITS, EOS, PAD, SOURCE, Pairs
from saccade.nn import (
    DecoderState,
    Hypotheses,
    LengthPredictor,
    NonAutoregressiveDecoder,
    SinusoidalPosition,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    beam_search,
    greedy_search,
)
from torch import Tensor, nn

WIDTH, HEADS, LAYERS = 64, 4, 2
MAX_DIGITS = 10  # END included
LAYER: dict[str, Any] = {"dim_feedforward": 128, "dropout": 0.1, "batch_first": True, "norm_first": True}


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(len(SOURCE) + 3, WIDTH, padding_idx=PAD)
        self.target = nn.Embedding(len(DIGITS) + 3, WIDTH, padding_idx=PAD)
        self.position = SinusoidalPosition(WIDTH, base=100.0, dropout=0.1, batch_first=True)
        layer = TransformerEncoderLayer(WIDTH, HEADS, **LAYER)
        self.encoder = TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH))
        self.decoder, self.head = self._decoder(), nn.Linear(WIDTH, len(DIGITS) + 3)
        self.parallel = NonAutoregressiveDecoder(
            self._decoder(),
            self.position,
            nn.Linear(WIDTH, len(DIGITS) + 3),
            LengthPredictor(WIDTH, MAX_DIGITS),
        )

    def _decoder(self) -> TransformerDecoder:
        layer = TransformerDecoderLayer(WIDTH, HEADS, **LAYER)
        return TransformerDecoder(layer, LAYERS, nn.LayerNorm(WIDTH))

    def encode(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        """(embedded source, memory), [N, S, WIDTH] each."""
        x = self.position(self.source(batch.source))
        return x, self.encoder(x, src_key_padding_mask=batch.padding)

    def decode(self, inputs: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """Logits [N, T, V] of teacher forcing: every position at once, none sees a later one."""
        x = self.position(self.target(inputs))
        mask = saccade.Causal()
        return self.head(self.decoder(x, memory, tgt_mask=mask, memory_key_padding_mask=padding))

    @torch.no_grad()
    def translate(self, batch: Pairs, beams: int = 1, alpha: float = 0.6) -> Hypotheses:
        """Token by token: greedy with one beam, else beam search."""
        _, memory = self.encode(batch)
        state = DecoderState(self.decoder, memory, batch.padding, beams=beams, capacity=MAX_DIGITS)

        def step(last: Tensor) -> Tensor:
            return self.head(state.step(self.position(self.target(last), state.length)))

        options: dict[str, Any] = {"bos": BOS, "eos": EOS, "max_len": MAX_DIGITS, "alpha": alpha}
        count = len(batch.source)
        if beams == 1:
            return greedy_search(step, count, **options)
        return beam_search(step, state.reorder, count, beams, **options)

    @torch.no_grad()
    def translate_at_once(self, batch: Pairs, candidates: int = 3) -> Tensor:
        """[N, T]: one pass over the likeliest lengths."""
        x, memory = self.encode(batch)
        return self.parallel.generate(x, memory, batch.padding, candidates=candidates, pad=PAD)[0]

    @torch.no_grad()
    def alignment(self, batch: Pairs, inputs: Tensor) -> Tensor:
        """[N, H, T, S]: where the last decoder layer looks in the source."""
        module: Any = self.decoder.layers[-1].multihead_attn
        seen: list[Any] = []
        hook = module.register_forward_pre_hook(lambda m, args: seen.append(args))
        self.decode(inputs, self.encode(batch)[1], batch.padding)
        hook.remove()
        query, key, value = seen[0]
        options = {"key_padding_mask": batch.padding, "average_attn_weights": False}
        return module(query, key, value, **options)[1]
