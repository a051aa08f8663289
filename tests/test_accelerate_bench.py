"""The benchmark of encoders: all that are compared give the same at real tokens, and the check sees it."""

from __future__ import annotations

import pytest
import saccade
import torch
from saccade.benchmarks.encoder import EncoderCase, EncoderWork, encoders


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_encoders(padded: bool, training: bool, dtype: str) -> None:
    case = EncoderCase("tiny", 64, padded, 32, 4, 64, 1, dtype=dtype, training=training)
    before = torch.random.get_rng_state()
    work = EncoderWork(case, "cpu")
    assert torch.equal(before, torch.random.get_rng_state())
    (direction,) = work.directions
    offers = work.offers(direction)
    assert set(offers) == {"saccade", "saccade-packed", "torch", "linear"}
    refused = {n: offers.pop(n) for n in list(offers) if isinstance(offers[n], str)}
    assert refused == (
        {"linear": "padding takes no part"} if padded else {"saccade-packed": "nothing is padded"}
    )
    for name, offer in offers.items():
        assert callable(offer) and work.fault(name, direction, offer) == ""
    offer = offers["saccade"]
    assert callable(offer)
    assert work.fault("saccade", direction, lambda: [1.05 * x for x in offer()])
    if not padded:
        assert work.fault("linear", direction, offer), "attention is no diagonal"
    assert isinstance(work._saccade.layers[0].self_attn, saccade.nn.MultiheadAttention)
    assert work._packed.packed and type(work._torch) is torch.nn.TransformerEncoder


def test_half_is_padding_or_nothing() -> None:
    names = set()
    for group in encoders():
        for case in group.cases:
            lengths = case.lengths()
            assert sum(lengths) == (2048 if case.padded else 4096)
            assert len(lengths) * case.length == 4096
            linear = sum(lengths) * (8 * 512**2 + 4 * 512 * 2048)
            attention = 4 * 512 * sum(n**2 for n in lengths)
            assert case.flops() == 2 * (linear + attention) * (3 if case.training else 1)
            names.add((case.dtype, case.length, case.padded, case.training))
    assert len(names) == 2 * 2 * (1 + 4)
