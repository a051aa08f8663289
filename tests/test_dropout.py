"""Dropout: the published numbers of Philox, the layout of the counter, the same pairs on every backend."""

from __future__ import annotations

import pytest
import saccade
import torch
from saccade import ops
from saccade.dropout import philox
from saccade.testing import Shape, make_inputs


def words(seed: int, counter: tuple[int, ...]) -> list[int]:
    signed = seed - (1 << 64) if seed >> 63 else seed
    tensors = [torch.tensor([c]) for c in counter]
    return [int(w) for w in philox(torch.tensor([signed]), (tensors[0], tensors[1], tensors[2], tensors[3]))]


def test_known_answers_of_random123() -> None:
    ones = 0xFFFFFFFF
    assert words(0, (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((ones << 32) | ones, (ones,) * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words((0x299F31D0 << 32) | 0xA4093822, counter) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_mask_is_the_contract() -> None:
    seed, p = -(1 << 62) - 12345, 0.37
    mask = saccade.dropout_mask(seed, p, 2, 3, 4, 21)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 3, 20), (1, 0, 2, 7), (0, 2, 1, 8), (1, 1, 0, 13), (0, 1, 3, 18)]:
        lane = j & 7
        word = words(seed % (1 << 64), (j >> 3, i, h, b))[lane >> 1]
        assert bool(mask[b, h, i, j]) == ((word >> (16 * (lane & 1)) & 0xFFFF) >= round(p * 65536))
    assert (
        saccade.dropout_mask(0, 0.0, 1, 1, 8, 9).all() and not saccade.dropout_mask(0, 1.0, 1, 1, 8, 9).any()
    )
    assert torch.equal(mask, saccade.dropout_mask(seed + (1 << 64), p, 2, 3, 4, 21))
    assert torch.equal(mask, saccade.dropout_mask(torch.tensor([seed]), p, 2, 3, 4, 21))


@pytest.mark.skipif(not ops.LOADED, reason="no operator library")
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_cpp_twin(p: float) -> None:
    seed = torch.tensor([-987654321987654321])
    got = torch.ops.saccade.dropout_mask(seed, p, 2, 3, 9, 37)
    assert torch.equal(got, saccade.dropout_mask(seed, p, 2, 3, 9, 37))


def test_weights_are_dropped_and_the_rest_divided(backend: str) -> None:
    q, k, v = make_inputs(Shape(2, 4, 2, 9, 21, 8, 8), torch.float64)
    for p in (0.25, 1.0):
        out, lse = saccade.attention(q, k, v, dropout_p=p, seed=11, return_lse=True, backend=backend)
        logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
        kept = saccade.dropout_mask(11, p, 2, 4, 9, 21)
        weights = torch.where(kept, logits.softmax(-1) / (1 - p if p < 1 else 1), 0.0)
        torch.testing.assert_close(out, weights @ v.repeat_interleave(2, 1))
        torch.testing.assert_close(lse, logits.logsumexp(-1))
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_packed_sequences_count_within_themselves(backend: str) -> None:
    q, k, v = make_inputs(Shape(1, 2, 2, 7, 7, 8, 8))
    cu = torch.tensor([0, 3, 7])
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    out = saccade.attention_varlen(*packed, cu, cu, 4, 4, dropout_p=0.5, seed=9, backend=backend)
    second = [torch.cat([x[:, :, 3:], x[:, :, 3:]]) for x in (q, k, v)]  # its batch index is 1
    want = saccade.attention(*second, dropout_p=0.5, seed=9, backend=backend)[1]
    torch.testing.assert_close(out[3:].transpose(0, 1), want)


def test_seeds() -> None:
    q, k, v = make_inputs(Shape(1, 1, 1, 9, 9, 4, 4))

    def run(seed: object = None) -> torch.Tensor:
        return saccade.attention(q, k, v, dropout_p=0.5, seed=seed)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first) and not torch.equal(first, second)
    assert torch.equal(run(5), run(5 + (1 << 64))) and torch.equal(run(5), run(torch.tensor(5)))
    state = torch.get_rng_state()
    saccade.attention(q, k, v)
    run(7)
    assert torch.equal(torch.get_rng_state(), state), "a given seed or no dropout leaves the generator alone"


def test_share_of_dropped_weights() -> None:
    share = 1 - saccade.dropout_mask(1, 0.3, 4, 8, 128, 128).double().mean().item()
    assert abs(share - 0.3) < 4 * (0.21 / (4 * 8 * 128 * 128)) ** 0.5


def test_repeated_edges_fall_together() -> None:
    edges = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 0, 0, 0, 0]])
    q, k, v = make_inputs(Shape(1, 1, 1, 1, 3, 4, 4), torch.float64)
    once = saccade.attention(
        q, k, v, saccade.Graph.from_edge_index(edges[:, :3], (3, 1)), dropout_p=0.5, seed=2
    )
    twice = saccade.attention(q, k, v, saccade.Graph.from_edge_index(edges, (3, 1)), dropout_p=0.5, seed=2)
    torch.testing.assert_close(once, twice)
