"""Decoding with a cache: equal to the parallel forward; searches against exhaustive ones and by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import saccade
import torch
from saccade.nn import DecoderState, beam_search, greedy_search, length_penalty
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

E, H, N, S, T = 24, 4, 3, 7, 11
PADDING = torch.arange(S) >= torch.tensor([7, 3, 5])[:, None]


def make(layers: int = 2, **options: Any) -> saccade.nn.TransformerDecoder:
    given = {"dropout": 0.1, "batch_first": True, "dtype": torch.float64, **options}
    one = saccade.nn.TransformerDecoderLayer(E, H, 32, **given)
    norm = nn.LayerNorm(E, dtype=torch.float64) if given.get("norm_first") else None
    made = saccade.nn.TransformerDecoder(one, layers, norm)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made.eval()


HEADS = torch.tensor([1, 3, 5, 20])
CASES: dict[str, Any] = {
    "plain": dict,
    "norm-first": lambda: {"norm_first": True},
    "sequence-first": lambda: {"batch_first": False},
    "window": lambda: {"window": (3, 0)},
    "window-heads": lambda: {"window": (HEADS, None)},
    "gqa": lambda: {"num_kv_heads": 2},
    "head-dim": lambda: {"head_dim": 5},
    "qk-norm": lambda: {"qk_norm": True},
    "additive": lambda: {"score": "additive"},
    "softmax1": lambda: {"attention_activation": "softmax1"},
    "relu": lambda: {"attention_activation": "relu"},
    "rope": lambda: {"position": saccade.RoPE()},
    "alibi": lambda: {"position": saccade.ALiBi(saccade.ALiBi.default_slopes(H).double())},
    "t5": lambda: {"position": saccade.T5(torch.randn(8, H).double(), max_distance=9)},
    "shaw": lambda: {"position": saccade.Shaw(torch.randn(7, E // H).double())},
    "transformer-xl": lambda: {"position": saccade.nn.TransformerXLPosition(E, H, dtype=torch.float64)},
}


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_parallel_forward_at_every_position(name: str) -> None:
    decoder = make(**CASES[name]())
    x, memory = torch.randn(N, T, E).double(), torch.randn(N, S, E).double()
    first = decoder.layers[0].self_attn.batch_first
    if not first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    with torch.no_grad():
        whole = decoder(x, memory, tgt_mask=saccade.Causal(), memory_key_padding_mask=PADDING)
    state = DecoderState(decoder, memory, PADDING, capacity=2)
    pieces = [state.step(p) for p in x.split([1, 3, 1, 1, 5], 1 if first else 0)]
    torch.testing.assert_close(torch.cat(pieces, 1 if first else 0), whole, rtol=1e-10, atol=1e-12)
    assert state.length == T


def test_each_layer_its_own_memory() -> None:
    encoder = saccade.nn.TransformerEncoder(
        saccade.nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True), 3, nn.LayerNorm(E)
    ).eval()
    source = torch.randn(N, S, E)
    seen = saccade.nn.layer_outputs(encoder, source, src_key_padding_mask=PADDING)
    assert len(seen) == 3 and torch.equal(seen[2], encoder(source, src_key_padding_mask=PADDING))
    decoder = make(3, dtype=torch.float32)
    x = torch.randn(N, T, E)
    whole = decoder(x, seen, tgt_mask=saccade.Causal(), memory_key_padding_mask=PADDING)
    by_hand = x
    for layer, memory in zip(decoder.layers, seen, strict=True):
        by_hand = layer(by_hand, memory, tgt_mask=saccade.Causal(), memory_key_padding_mask=PADDING)
    assert torch.equal(whole, by_hand)
    state = DecoderState(decoder, seen, PADDING)
    torch.testing.assert_close(torch.cat([state.step(x[:, t : t + 1]) for t in range(T)], 1), whole)
    with pytest.raises(ValueError, match="memory"):
        decoder(x, seen[:2])
    with pytest.raises(ValueError, match="memory"):
        DecoderState(decoder, seen[:2])


def test_the_memory_is_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from saccade.nn import decoding

    calls = []
    real = decoding.project_memory
    monkeypatch.setattr(decoding, "project_memory", lambda *a: calls.append(1) or real(*a))
    decoder = make()
    state = DecoderState(decoder, torch.randn(N, S, E).double())
    for _ in range(4):
        state.step(torch.randn(N, 1, E).double())
    assert len(calls) == 2


def test_beams_go_on_from_each_others_past_without_copies() -> None:
    """Each row must equal a parallel forward over its own history, and no cache row may move."""
    beams = 3
    decoder = make()
    memory = torch.randn(N, S, E).double()
    state = DecoderState(decoder, memory, PADDING, beams=beams, capacity=4)
    repeated, padding = memory.repeat_interleave(beams, 0), PADDING.repeat_interleave(beams, 0)
    history = torch.zeros(N * beams, 0, E).double()
    draw = torch.Generator().manual_seed(1)
    for t in range(6):
        x = torch.randn(N * beams, 1, E, generator=draw).double()
        history = torch.cat([history, x], 1)
        found = state.step(x)
        with torch.no_grad():
            whole = decoder(history, repeated, tgt_mask=saccade.Causal(), memory_key_padding_mask=padding)
        torch.testing.assert_close(found, whole[:, -1:], rtol=1e-10, atol=1e-12)
        parents = torch.randint(beams, (N, beams), generator=draw) + torch.arange(N)[:, None] * beams
        before = [cache.keys.clone() for cache in state._caches]
        state.reorder(parents.flatten())
        history = history[parents.flatten()]
        assert all(torch.equal(a, c.keys) for a, c in zip(before, state._caches, strict=True)), t
    with pytest.raises(ValueError, match=r"ints \[9\], got torch.float32 \[9\]"):
        state.reorder(torch.zeros(N * beams))
    with pytest.raises(ValueError, match="same sentence, got 0 at 3"):
        state.reorder(torch.zeros(N * beams, dtype=torch.int64))
    with pytest.raises(ValueError, match="parents"):
        state.reorder(torch.zeros(2, dtype=torch.int64))


class Model(nn.Module):
    """A decoder with an embedding and a head, over a random memory."""

    def __init__(self, vocabulary: int, sharp: float) -> None:
        super().__init__()
        self.embed, self.decoder = nn.Embedding(vocabulary, E, dtype=torch.float64), make()
        self.head = nn.Linear(E, vocabulary, dtype=torch.float64)
        self.position = saccade.nn.SinusoidalPosition(E, base=20.0, batch_first=True)
        nn.init.normal_(self.head.weight, std=sharp)

    def stepper(self, memory: Tensor, beams: int = 1) -> tuple[Any, Any]:
        state = DecoderState(self.decoder, memory, beams=beams)
        return lambda last: self.head(
            state.step(self.position(self.embed(last), state.length))
        ), state.reorder


def test_one_beam_is_greedy_and_rows_end_on_their_own() -> None:
    lengths = set()
    for seed in range(4):
        torch.manual_seed(seed)
        model = Model(7, 0.5)
        memory = torch.randn(5, S, E).double()
        options: dict[str, Any] = {"bos": 1, "eos": 2, "max_len": 12, "alpha": 0.6}
        greedy = greedy_search(model.stepper(memory)[0], 5, **options)
        beam = beam_search(*model.stepper(memory), 5, 1, **options)
        for a, b in zip(greedy, beam, strict=True):
            b = b[:, 0]
            torch.testing.assert_close(a[..., : b.shape[-1]].to(b.dtype), b)
        for n in range(5):  # each alone gives what it gives in the batch
            alone = greedy_search(model.stepper(memory[n : n + 1])[0], 1, **options)
            size = int(alone.lengths)
            assert size == greedy.lengths[n] and torch.equal(alone.tokens[0, :size], greedy.tokens[n, :size])
            assert bool((greedy.tokens[n, size:] == 2).all())
        lengths |= set(greedy.lengths.tolist())
    assert len(lengths) > 2


def test_beams_match_a_search_written_with_lists() -> None:
    torch.manual_seed(2)
    model, beams, alpha, max_len = Model(6, 0.4), 3, 0.8, 8
    memory = torch.randn(4, S, E).double()
    found = beam_search(*model.stepper(memory, beams), 4, beams, bos=1, eos=2, max_len=max_len, alpha=alpha)
    for n in range(4):
        expected = by_lists(model, memory[n : n + 1], beams, max_len, alpha)
        assert len(expected) == beams
        for b, (tokens, score) in enumerate(expected):
            size = len(tokens)
            assert found.tokens[n, b, :size].tolist() == tokens
            assert found.scores[n, b].item() == pytest.approx(score)
            ended = tokens[-1] == 2
            assert bool(found.ended[n, b]) == ended and found.lengths[n, b] == size - ended


def by_lists(model: Model, memory: Tensor, beams: int, max_len: int, alpha: float) -> Any:
    live, finished = [([1], 0.0)], []
    for t in range(1, max_len + 1):
        options = []
        for tokens, total in live:
            with torch.no_grad():
                x = model.position(model.embed(torch.tensor([tokens])))
                y = model.decoder(x, memory, tgt_mask=saccade.Causal())
                logs = torch.log_softmax(model.head(y[0, -1]), -1)
            options += [([*tokens, v], total + logs[v].item()) for v in range(len(logs))]
        options.sort(key=lambda x: -x[1])
        ends = [x for x in options[:beams] if x[0][-1] == 2]
        finished += [(x[0][1:], x[1] / length_penalty(t, alpha)) for x in ends]
        live = [x for x in options if x[0][-1] != 2][:beams]
        if len(finished) >= beams:
            break
    finished.sort(key=lambda x: -x[1])
    rest = [(x[0][1:], x[1] / length_penalty(t, alpha)) for x in live]
    return [*finished, *rest][:beams]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_beam_that_holds_everything_is_exact(alpha: float) -> None:
    """V^T beams: the best of all sentences that end, as enumeration finds it."""
    vocabulary, max_len = 3, 4
    table = torch.randn(2, vocabulary, vocabulary).double()  # a sentence's logits after each token
    beams = vocabulary**max_len

    def step(last: Tensor) -> Tensor:
        return table.repeat_interleave(beams, 0)[torch.arange(2 * beams), last[:, 0]]

    # A table has no state, so nothing need be reordered.
    found = beam_search(step, lambda rows: None, 2, beams, bos=0, eos=2, max_len=max_len, alpha=alpha)
    logs = torch.log_softmax(table, -1)
    for n in range(2):
        scores = []
        for size in range(max_len):
            for words in itertools.product((0, 1), repeat=size):
                path = [0, *words, 2]
                total = sum(logs[n, a, b].item() for a, b in itertools.pairwise(path))
                scores.append((total / length_penalty(size + 1, alpha), path[1:]))
        scores.sort(reverse=True)
        for b in range(5):
            size = int(found.lengths[n, b])
            assert found.tokens[n, b, : size + 1].tolist() == scores[b][1]
            assert found.scores[n, b].item() == pytest.approx(scores[b][0])


def test_errors() -> None:
    decoder = make()
    memory = torch.randn(N, S, E).double()
    with pytest.raises(ValueError, match="eval"):
        DecoderState(decoder.train(), memory)
    decoder.eval()
    with pytest.raises(TypeError, match="accelerate"):
        DecoderState(nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H), 1), memory)
    with pytest.raises(TypeError, match="TransformerDecoder"):
        DecoderState(nn.Linear(1, 1), memory)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory_key_padding_mask"):
        DecoderState(decoder, memory, PADDING[:, 1:])
    with pytest.raises(ValueError, match="beams"):
        DecoderState(decoder, memory, beams=0)
    with pytest.raises(ValueError, match="3 rows"):
        DecoderState(decoder, memory).step(torch.zeros(4, 1, E).double())
    with pytest.raises(ValueError, match="logits"):
        greedy_search(lambda last: torch.zeros(3, 4), 2, bos=0, eos=1, max_len=3)
    with pytest.raises(ValueError, match="max_len"):
        greedy_search(lambda last: torch.zeros(2, 4), 2, bos=0, eos=1, max_len=0)


def test_torchs_layers_decode_after_accelerate() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 32, batch_first=True), 2).eval()
    x, memory = torch.randn(N, T, E), torch.randn(N, S, E)
    causal = nn.Transformer.generate_square_subsequent_mask(T)
    expected = decoder(x, memory, tgt_mask=causal)
    saccade.accelerate(decoder)
    state = DecoderState(decoder, memory)
    torch.testing.assert_close(torch.cat([state.step(x[:, t : t + 1]) for t in range(T)], 1), expected)
