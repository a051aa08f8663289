"""The non-autoregressive decoder, scheduled sampling, and what they share with teacher forcing."""

from __future__ import annotations

import pytest
import saccade
import torch
from saccade.nn import (
    LengthPredictor,
    NonAutoregressiveDecoder,
    ignore_after_end,
    scheduled_sampling,
    shift_right,
    uniform_copy,
)
from torch import nn
from torch.nn import functional as F

E, V = 16, 9


def make() -> NonAutoregressiveDecoder:
    layer = saccade.nn.TransformerDecoderLayer(E, 2, 16, 0.0, batch_first=True)
    position = saccade.nn.SinusoidalPosition(E, batch_first=True)
    return NonAutoregressiveDecoder(
        saccade.nn.TransformerDecoder(layer, 2), position, nn.Linear(E, V), LengthPredictor(E, 20)
    )


def test_uniform_copy_is_the_papers() -> None:
    source = torch.randn(3, 6, 2)
    sizes, lengths = torch.tensor([6, 3, 1]), torch.tensor([4, 8, 0])
    found = uniform_copy(source, sizes, lengths)
    assert found.shape == (3, 8, 2)
    for b in range(3):
        for t in range(8):
            if t >= lengths[b]:
                assert not found[b, t].any()
                continue
            at = min(round(t * int(sizes[b]) / int(lengths[b])), int(sizes[b]) - 1)
            assert torch.equal(found[b, t], source[b, at])


def test_ignore_after_end() -> None:
    tokens = torch.tensor([[5, 2, 7, 2], [2, 1, 1, 1], [3, 4, 5, 6]])
    assert ignore_after_end(tokens, 2).tolist() == [[5, 2, 2, 2], [2, 2, 2, 2], [3, 4, 5, 6]]
    assert ignore_after_end(tokens, 2, 0).tolist() == [[5, 2, 0, 0], [2, 0, 0, 0], [3, 4, 5, 6]]


def test_every_position_sees_every_other_and_no_padding() -> None:
    model = make().eval()
    source = torch.randn(2, 5, E)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    lengths = torch.tensor([6, 4])
    both = model(source, source, lengths, padding)
    alone = model(source[1:, :3], source[1:, :3], lengths[1:])
    torch.testing.assert_close(both[1, :4], alone[0], rtol=1e-4, atol=1e-5)
    copied = uniform_copy(source[:1], torch.tensor([5]), lengths[:1]).requires_grad_()
    out = model.decoder(model.position(copied), source[:1])
    (gradient,) = torch.autograd.grad(out[0, 0].sum(), copied)
    assert bool(gradient[0].abs().sum(-1).gt(0).all())  # the first position sees the last


def test_lengths_do_not_see_padding() -> None:
    predictor = LengthPredictor(E, 10)
    memory = torch.randn(1, 4, E)
    padded = torch.cat([memory, torch.full((1, 3, E), torch.nan)], 1)
    hidden = torch.arange(7)[None] >= 4
    torch.testing.assert_close(predictor(padded, hidden), predictor(memory))
    with pytest.raises(ValueError, match="padding"):
        predictor(memory, hidden)
    with pytest.raises(ValueError, match="memory"):
        predictor(memory[0])


def test_candidates_are_each_decoded_and_the_likeliest_taken() -> None:
    model = make().eval()
    source = torch.randn(3, 5, E)
    padding = torch.arange(5) >= torch.tensor([5, 4, 2])[:, None]
    tokens, lengths = model.generate(source, source, padding, candidates=3)
    for b in range(3):
        size = int((~padding[b]).sum())
        one = source[b : b + 1, :size]
        tries = model.lengths(one)[0, 1:].topk(3)[1] + 1
        best = []
        for length in tries:
            logs = torch.log_softmax(model(one, one, length[None]), -1)[0]
            best.append((logs.max(-1)[0].mean().item(), logs.argmax(-1)))
        score, words = max(best, key=lambda x: x[0])
        assert int(lengths[b]) == len(words)
        assert torch.equal(tokens[b, : len(words)], words)


def test_end_cuts_what_follows() -> None:
    model = make().eval()
    source = torch.randn(4, 5, E)
    full, _ = model.generate(source, source)
    eos = int(full[0, 1])
    tokens, lengths = model.generate(source, source, eos=eos, pad=-1)
    first = (full[0] == eos).nonzero()[0, 0]
    assert lengths[0] == first and bool((tokens[0, first:] == -1).all())
    assert not bool((tokens == eos).any())


def test_it_learns_to_reverse() -> None:
    torch.manual_seed(1)
    model, embed = make(), nn.Embedding(V, E)
    encoder = saccade.nn.TransformerEncoderLayer(E, 2, 32, 0.0, batch_first=True)
    position = saccade.nn.SinusoidalPosition(E, batch_first=True)
    parameters = [*model.parameters(), *embed.parameters(), *encoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    losses = []
    for _ in range(80):
        words = torch.randint(V, (32, 4))
        source = position(embed(words))
        memory = encoder(source)
        logits = model(source, memory, torch.full((32,), 4))
        target = torch.full((32,), 4)
        loss = F.cross_entropy(logits.flatten(0, 1), words.flip(1).flatten())
        loss = loss + F.cross_entropy(model.lengths(memory), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]
    tokens, lengths = model.generate(source, memory)
    assert bool((lengths == 4).all())


def test_the_truth_alone_is_teacher_forcing() -> None:
    targets = torch.randint(3, V, (4, 7))
    inputs = shift_right(targets, 1)
    assert bool((inputs[:, 0] == 1).all()) and torch.equal(inputs[:, 1:], targets[:, :-1])
    logits = torch.randn(4, 7, V, requires_grad=True)
    assert torch.equal(scheduled_sampling(inputs, logits, 1.0), inputs)


def test_scheduled_sampling_takes_predictions_of_the_step_before() -> None:
    inputs = shift_right(torch.zeros(200, 30, dtype=torch.int64), 1)
    wanted = torch.randint(2, V, (200, 30))
    logits = F.one_hot(wanted, V) * 100.0
    for sample in (True, False):
        mixed = scheduled_sampling(inputs, logits, 0.0, sample=sample)
        assert torch.equal(mixed[:, 1:], wanted[:, :-1]) and bool((mixed[:, 0] == 1).all())
    half = scheduled_sampling(inputs, logits, 0.75, generator=torch.Generator().manual_seed(0))
    own = (half[:, 1:] != 0).float().mean()
    assert abs(own - 0.25) < 0.02
    again = scheduled_sampling(inputs, logits, 0.75, generator=torch.Generator().manual_seed(0))
    assert torch.equal(half, again)
    with pytest.raises(ValueError, match="truth"):
        scheduled_sampling(inputs, logits, 1.5)
    with pytest.raises(ValueError, match="logits"):
        scheduled_sampling(inputs, logits[:, 1:], 0.5)


def test_label_smoothing_and_padding_are_torchs() -> None:
    """The loss is torch's own: padding changes nothing, and smoothing is the mean with the uniform target."""
    logits, targets = torch.randn(6, V), torch.tensor([3, 4, 5, 6, 0, 0])
    loss = F.cross_entropy(logits, targets, ignore_index=0, label_smoothing=0.1)
    assert torch.equal(loss, F.cross_entropy(logits[:4], targets[:4], label_smoothing=0.1))
    logs = torch.log_softmax(logits[:4], -1)
    expected = -0.9 * logs.gather(1, targets[:4, None]).mean() - 0.1 * logs.mean(-1).mean()
    torch.testing.assert_close(loss, expected)


def test_a_decoder_that_takes_sequences_first_is_refused() -> None:
    good = make()
    layer = nn.TransformerDecoderLayer(good.lengths.d_model, 2, 16)
    with pytest.raises(ValueError, match="expected layers with batch_first=True, got False in layer 0"):
        NonAutoregressiveDecoder(nn.TransformerDecoder(layer, 1), good.position, good.head, good.lengths)
