"""What training a decoder needs beside torch's losses: shifted targets, and mixing in its own predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import probability


def shift_right(targets: Tensor, bos: int) -> Tensor:
    """Teacher forcing's input: BOS, then `targets` [N, T] without the last token. [N, T]."""
    return torch.cat([torch.full_like(targets[:, :1], bos), targets[:, :-1]], 1)


def scheduled_sampling(
    inputs: Tensor,
    logits: Tensor,
    truth: float,
    *,
    sample: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Decoder inputs of which a part are the model's own predictions (Bengio et al., 1506.03099), for all
    positions at once (Mihaylova, Martins: 1906.07651; Duckworth et al.: 1906.04331).

    Args:
        inputs: [N, T] int64, those of teacher forcing: BOS, y_1, ..., y_(T-1).
        logits: [N, T, V], what the decoder gave for them in a first pass; no gradient flows through it.
        truth: probability, for each token, of keeping the true one. With 1 the result is `inputs`.
        sample: draw predictions from softmax(logits), or take the likeliest.
        generator: torch's, for both draws.

    Returns [N, T]: BOS stays; position t + 1 has y_t or the prediction made at t. Train on a second pass over
    it, against the true targets.
    """
    if logits.dim() != 3 or logits.shape[:2] != inputs.shape:
        raise ValueError(f"logits: expected shape {[*inputs.shape, 'V']}, got {list(logits.shape)}")
    probability("truth", truth)
    if truth == 1.0 or inputs.shape[1] < 2:
        return inputs
    logits = logits.detach()[:, :-1]
    if sample:
        weights = torch.softmax(logits.float(), -1).flatten(0, 1)
        own = torch.multinomial(weights, 1, generator=generator).view(inputs.shape[0], -1)
    else:
        own = logits.argmax(-1)
    draw = torch.rand(own.shape, device=own.device, generator=generator)
    return torch.cat([inputs[:, :1], torch.where(draw < truth, inputs[:, 1:], own)], 1)
