"""A decoder that gives all positions at once (Gu et al., 1711.02281): how long, from what, until where."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import int_at_least
from ._asked import check_padding, check_shape


class LengthPredictor(nn.Module):
    """Logits over the length of the output from the mean of the memory's valid rows: a classification, as the
    special token of Mask-Predict (Ghazvininejad et al., 1904.09324) does it.

    `linear` is [max_len + 1, d_model]. forward: memory [N, S, d_model], padding bool [N, S] (True = padding)
    -> logits [N, max_len + 1]; train them by cross-entropy against the lengths.
    """

    def __init__(self, d_model: int, max_len: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.d_model, self.max_len = int_at_least("d_model", d_model, 1), int_at_least("max_len", max_len, 1)
        self.linear = nn.Linear(d_model, max_len + 1, device=device, dtype=dtype)

    def forward(self, memory: Tensor, padding: Tensor | None = None) -> Tensor:
        """memory [N, S, d_model], padding bool [N, S] (True = padding) -> logits [N, max_len + 1]."""
        check_shape("memory", memory, f"[N, S, {self.d_model}]", (3,), self.d_model)
        check_padding("padding", padding, *memory.shape[:2])
        if padding is None:
            return self.linear(memory.mean(1))
        valid = ~padding[..., None]
        total = memory.masked_fill(padding[..., None], 0.0).sum(1)
        return self.linear(total / valid.sum(1).clamp(min=1))


def uniform_copy(source: Tensor, source_lengths: Tensor, lengths: Tensor) -> Tensor:
    """The decoder's input: its row t is row round(t S_b / T_b) of sentence b (1711.02281, section 3.1).

    source [N, S, E], source_lengths S_b [N], lengths T_b [N] ints -> [N, max(lengths), E], zeros from T_b on.
    """
    check_shape("source", source, "[N, S, E]", (3,))
    longest = int(lengths.max()) if lengths.numel() else 0
    place = torch.arange(longest, device=source.device)
    steps, parts = place * source_lengths[:, None], lengths.clamp(min=1)[:, None]
    at, rest = torch.div(steps, parts, rounding_mode="floor"), 2 * (steps % parts)
    at = at + ((rest > parts) | ((rest == parts) & (at % 2 == 1)))  # halves to even
    at = torch.minimum(at, (source_lengths - 1).clamp(min=0)[:, None])
    rows = source.gather(1, at[..., None].expand(-1, -1, source.shape[2]))
    return rows.masked_fill((place >= lengths[:, None])[..., None], 0.0)


def ignore_after_end(tokens: Tensor, eos: int, pad: int | None = None) -> Tensor:
    """`tokens` [..., T] with everything after the first END replaced by `pad` (default: END)."""
    seen = (tokens == eos).long()
    after = (seen.cumsum(-1) - seen) > 0
    return tokens.masked_fill(after, eos if pad is None else pad)


class NonAutoregressiveDecoder(nn.Module):
    """A decoder stack run once over all positions, with a length predictor.

    Args:
        decoder: a TransformerDecoder with batch_first; its self-attention is not masked.
        position: added to the decoder's input, such as a `SinusoidalPosition(batch_first=True)`.
        head: [.., d_model] -> logits [.., V].
        lengths: a `LengthPredictor`.

    In training call it with the true lengths. `generate` takes the predicted ones.
    """

    def __init__(
        self, decoder: nn.Module, position: nn.Module, head: nn.Module, lengths: LengthPredictor
    ) -> None:
        super().__init__()
        for n, layer in enumerate(getattr(decoder, "layers", ())):
            if not layer.self_attn.batch_first:
                raise ValueError(f"decoder: expected layers with batch_first=True, got False in layer {n}")
        self.decoder, self.position, self.head, self.lengths = decoder, position, head, lengths

    def forward(
        self,
        source: Tensor,
        memory: Tensor,
        lengths: Tensor,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [N, max(lengths), V] of all positions.

        source [N, S, E] (the encoder's input), memory [N, S, E], lengths [N] ints, the padding bool [N, S].
        """
        padding = memory_key_padding_mask
        sizes = torch.full_like(lengths, source.shape[1]) if padding is None else (~padding).sum(1)
        x = self.position(uniform_copy(source, sizes, lengths))
        hidden = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        out = self.decoder(
            x, memory, tgt_key_padding_mask=hidden, memory_key_padding_mask=memory_key_padding_mask
        )
        return self.head(out)

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        memory: Tensor,
        memory_key_padding_mask: Tensor | None = None,
        *,
        candidates: int = 1,
        eos: int | None = None,
        pad: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(tokens [N, T] int64, lengths [N]): the likeliest token at each place.

        The `candidates` likeliest lengths are tried at once, and the one with the best mean log-probability
        is taken (1711.02281, section 4). With `eos` a sentence also ends at its first END, not counted.
        """
        padding, batch = memory_key_padding_mask, memory.shape[0]
        tries = self.lengths(memory, padding)[:, 1:].topk(candidates, -1)[1] + 1  # [N, C]
        each = [None if x is None else x.repeat_interleave(candidates, 0) for x in (source, memory, padding)]
        logs = torch.log_softmax(self(each[0], each[1], tries.flatten(), each[2]).float(), -1)
        best, tokens = logs.max(-1)  # [N C, T]
        inside = torch.arange(tokens.shape[1], device=tokens.device) < tries.view(-1, 1)
        if eos is not None:
            ends = (ignore_after_end(tokens, eos, -1) == -1) | (tokens == eos)
            inside = inside & ~ends
        counts = inside.sum(-1)
        mean = (best * inside).sum(-1) / counts.clamp(min=1)
        mean = mean.masked_fill(counts == 0, -torch.inf)
        chosen = (
            mean.view(batch, candidates).argmax(-1) + torch.arange(batch, device=mean.device) * candidates
        )
        tokens = tokens.masked_fill(~inside, pad)
        return tokens[chosen], counts[chosen]
