"""The translation example: its data, that it learns, what a run leaves behind, BLEU."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
import torch
from example import EXAMPLES, program

FOLDER = EXAMPLES / "translation"


def test_words_of_numbers(run) -> None:
    import data

    said = {
        0: "zero",
        17: "seventeen",
        40: "forty",
        342: "three hundred forty two",
        1_000_000: "one million",
        305_012: "three hundred five thousand twelve",
    }
    for number, expected in said.items():
        assert " ".join(data.words(number)) == expected
    assert " ".join(data.words(999_101, british=True)) == (
        "nine hundred and ninety nine thousand one hundred and one"
    )
    generator = random.Random(0)
    trained = {data.draw(generator, False) for _ in range(300)}
    assert not trained & {data.draw(generator, True) for _ in range(300)}


def test_it_learns_and_padding_changes_nothing(run) -> None:
    model, losses = run.train(40)
    assert losses[-1] < 0.85 * losses[0]
    test = run.pairs(8, seed=3, held_out=True)
    together = model.translate(test)
    beam = model.translate(test, beams=3)
    assert bool((beam.scores[:, 0] >= beam.scores[:, 1]).all())
    for n in range(8):
        size = int(test.source_lengths[n])
        alone = model.translate(run.Pairs(test.source[n : n + 1, :size], test.target[n : n + 1]))
        count = int(alone.lengths)
        assert torch.equal(alone.tokens[0, :count], together.tokens[n, :count])
    # The loss: padding more changes nothing (in eval, so that no dropout differs).
    guide = run.GuidedAttentionLoss(sigma=0.2, heads=[0])
    wider = run.Pairs(
        torch.nn.functional.pad(test.source, (0, 3)), torch.nn.functional.pad(test.target, (0, 2))
    )
    with torch.no_grad():
        losses = [run.loss_of(model, x, 1.0, guide) for x in (test, wider)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_alignments_are_the_weights(run) -> None:
    model = run.Translator().eval()
    batch = run.pairs(3, seed=0)
    weights = model.alignment(batch, run.shift_right(batch.target, run.BOS))
    assert weights.shape == (3, run.HEADS, batch.target.shape[1], batch.source.shape[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    hidden = batch.padding[:, None, None].expand_as(weights)
    assert not bool(weights[hidden].any())


def test_bleu_is_sacrebleus(run) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    assert run.bleu(["1 2 3 4 5"], ["1 2 3 4 5"]) == pytest.approx(100)
    # By hand: 4 of 5 words, 2 of 4 pairs, 1 of 3 triples, 0 of 2 fours, smoothed to 1 / (2 * 2).
    expected = 100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25
    assert run.bleu(["1 2 3 9 5"], ["1 2 3 4 5"]) == pytest.approx(expected, rel=1e-6)
    # Too short: the brevity penalty exp(1 - 5 / 4).
    assert run.bleu(["1 2 3 4"], ["1 2 3 4 5"]) == pytest.approx(100 * 2.718281828 ** (1 - 5 / 4), rel=1e-6)


def test_a_short_run_leaves_losses_and_pictures(tmp_path: Path) -> None:
    result = program(FOLDER, "--steps", "3", "--test", "10", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for part in ("greedy", "beam 4", "all at once", "BLEU", "->"):
        assert part in result.stdout
    with (tmp_path / "training.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    pytest.importorskip("matplotlib")
    assert (tmp_path / "alignments.png").stat().st_size > 10_000


def test_bad_steps() -> None:
    result = program(FOLDER, "--steps", "0")
    assert result.returncode == 2 and "at least 1" in result.stderr
