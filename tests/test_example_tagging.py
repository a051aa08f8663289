"""The tagging example: its languages, that context decides, what a run leaves behind."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
import torch
from example import EXAMPLES, program

FOLDER = EXAMPLES / "tagging"


def test_saw_is_a_verb_and_a_noun(run) -> None:
    import data

    draw = random.Random(0)
    tags: dict[str, set[str]] = {}
    for _ in range(500):
        for word, tag in data.sentence(draw):
            tags.setdefault(word, set()).add(tag)
    assert tags["saw"] == {"VERB", "NOUN"} and tags["can"] == {"AUX", "NOUN"}
    assert {data.NUMBER[word] for word, found in tags.items() if len(found) > 1} == data.AMBIGUOUS


def test_verdicts_follow_from_the_words(run) -> None:
    import data

    draw = random.Random(0)
    for _ in range(300):
        words, verdict = data.review(draw)
        total, factor = 0, 1
        for word in words:
            factor *= {"not": -1, "very": 2}.get(word, 1)
            if word in data.GOOD or word in data.BAD:
                total += factor if word in data.GOOD else -factor
                factor = 1
        assert verdict == int(total > 0) and total != 0
    batch = data.reviews(1000, 0)
    assert 0.4 < batch.labels.float().mean() < 0.6


def test_only_context_tells_the_two_words_apart(run) -> None:
    test = run.tagged(300, -1)
    shares = []
    for context in (False, True):
        torch.manual_seed(0)
        model = run.Tagger(context)
        run.train(model, run.tagged, "test", 150)
        shares.append(run.right_tags(model, test)[1])
    assert shares[0] < 0.7 and shares[1] > 0.9
    # Without context a word has one tag wherever it stands.
    model = run.Tagger(False).eval()
    words = test.words[:2]
    assert torch.equal(model(words.flip(1)).flip(1), model(words))


def test_padding_changes_nothing(run) -> None:
    batch = run.reviews(5, 0)
    wide = torch.nn.functional.pad(batch.words, (0, 4))
    for model in (run.Judge(True).eval(), run.Judge(False).eval()):
        torch.testing.assert_close(model(wide), model(batch.words), rtol=1e-4, atol=1e-5)
    tags = run.tagged(5, 0)
    model = run.Tagger().eval()
    wide = run.Batch(
        torch.nn.functional.pad(tags.words, (0, 3)), torch.nn.functional.pad(tags.labels, (0, 3), value=-1)
    )
    torch.testing.assert_close(run.loss_of(model, wide), run.loss_of(model, tags))


def test_verdicts_are_learnt(run) -> None:
    torch.manual_seed(0)
    model = run.Judge()
    losses = run.train(model, run.reviews, "test", 150)
    assert losses[-1] < 0.8 * losses[0]
    looks = model.looks(run.reviews(4, 1).words)
    torch.testing.assert_close(looks.sum(-1), torch.ones(4))


def test_a_short_run_leaves_losses_and_pictures(tmp_path: Path) -> None:
    result = program(FOLDER, "--steps", "2", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for part in ("tags, with context", "words with two tags", "verdicts, without context"):
        assert part in result.stdout
    with (tmp_path / "training.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    pytest.importorskip("matplotlib")
    assert (tmp_path / "tagging.png").stat().st_size > 10_000
