"""The benchmark of padded encoders: three that give the same at real tokens, and the check that sees it."""

from __future__ import annotations

import pytest
import saccade
import torch
from saccade.benchmarks.encoder import EncoderCase, EncoderWork, encoders


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("training", [True, False])
def test_encoders(training: bool, dtype: str) -> None:
    case = EncoderCase("tiny", 16, 32, 4, 64, dtype=dtype, training=training)
    before = torch.random.get_rng_state()
    work = EncoderWork(case, "cpu")
    assert torch.equal(before, torch.random.get_rng_state())
    (direction,) = work.directions
    offers = work.offers(direction)
    assert set(offers) == {"saccade", "saccade-packed", "torch"}
    for name, offer in offers.items():
        assert callable(offer) and work.fault(name, direction, offer) == ""
    offer = offers["saccade"]
    assert callable(offer)
    assert work.fault("saccade", direction, lambda: [1.05 * x for x in offer()])
    assert isinstance(work._saccade.layers[0].self_attn, saccade.nn.MultiheadAttention)
    assert work._packed.packed and type(work._torch) is torch.nn.TransformerEncoder


def test_half_is_padding() -> None:
    for group in encoders():
        for case in group.cases:
            assert sum(case.lengths()) == 2 * case.length == 2048  # of 4 x 1024
            linear, attention = (
                2048 * (8 * 512**2 + 4 * 512 * 2048),
                4 * 512 * (1024**2 + 640**2 + 256**2 + 128**2),
            )
            assert case.flops() == 2 * (linear + attention) * (3 if case.training else 1)
