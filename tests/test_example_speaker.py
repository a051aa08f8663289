"""The speaker example: the data set's layout, that padding is not seen, that it learns, what a run leaves."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from example import EXAMPLES, program

FOLDER = EXAMPLES / "speaker"


def test_the_layout_is_hw04s(run, tmp_path: Path) -> None:
    run.generate(tmp_path, 3, 4, 2)
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    mapping = json.loads((tmp_path / "mapping.json").read_text())
    asked = json.loads((tmp_path / "testdata.json").read_text())
    assert metadata["n_mels"] == asked["n_mels"] == 40
    assert set(metadata["speakers"]) == set(mapping["speaker2id"]) and len(metadata["speakers"]) == 3
    assert {int(n): name for n, name in mapping["id2speaker"].items()} == {
        n: name for name, n in mapping["speaker2id"].items()
    }
    for one in [*asked["utterances"], *(x for xs in metadata["speakers"].values() for x in xs)]:
        assert one["feature_path"].startswith("uttr-")
        mels = torch.load(tmp_path / one["feature_path"], weights_only=True)
        assert mels.dtype == torch.float32 and tuple(mels.shape) == (one["mel_len"], 40)
        assert bool(mels.isfinite().all()) and mels.std() > 1
    data = run.Speakers(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (11, 1, 6)
    one = asked["utterances"][0]["feature_path"]
    torch.save(torch.zeros(3, 39), tmp_path / one)
    with pytest.raises(ValueError, match="expected"):
        run.Speakers(tmp_path)


def test_a_voice_is_harmonics_through_formants(run) -> None:
    import voices

    torch.testing.assert_close(voices.BANDS.sum(0)[10:230], torch.ones(220), rtol=0.02, atol=0.02)
    f = torch.linspace(0, voices.RATE / 2, voices.BINS)
    gain = voices._filter(torch.tensor([[730.0, 1090, 2440, 3400]]), f)[0]
    peaks = (gain[1:-1] > gain[:-2]) & (gain[1:-1] > gain[2:])
    found = f[1:-1][peaks]
    # The slopes of the others move a peak a little.
    assert len(found) == 4 and bool((found / torch.tensor([730, 1090, 2440, 3400]) - 1).abs().lt(0.03).all())


def test_an_utterance_does_not_change_when_it_is_padded_or_its_batch_is_shuffled(run) -> None:
    model = run.SpeakerClassifier(5).eval()
    rows = [(torch.randn(n, 40) * 5 - 6, k) for k, n in enumerate((50, 17, 33))]
    batch = run.collate(rows)
    together = model(batch.mels, batch.padding)
    for n, (mels, _) in enumerate(rows):
        torch.testing.assert_close(model(mels[None])[0], together[n], rtol=1e-4, atol=1e-5)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(batch.mels[order], batch.padding[order]), together[order])


def test_segments(run) -> None:
    rows = [(torch.full((n, 40), float(k)), k) for k, n in enumerate((10, 200, 300))]
    batch = run.segments(rows, 8, 128, random.Random(0))
    assert batch.mels.shape == (3, 128, 40)
    for mels, padding, speaker in zip(batch.mels, batch.padding, batch.speaker.tolist(), strict=True):
        assert int((~padding).sum()) == min(len(rows[speaker][0]), 128)
        assert bool((mels[~padding] == speaker).all()) and bool((mels[padding] == -20).all())
    assert [run.rate_at(n, 100) for n in (0, 9, 55)] == pytest.approx([0.1, 1.0, 0.5], abs=0.01)
    assert run.rate_at(99, 100) < 0.001


def test_it_learns_a_few_voices(run, tmp_path: Path) -> None:
    run.generate(tmp_path, 3, 10, 2)
    data = run.Speakers(tmp_path)
    _, losses, checks = run.train(data, 12)
    assert losses[-1] < 0.75 * losses[0] and len(checks) >= 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data /nonexistent", "--data: no metadata.json in /nonexistent"),
        ("--speakers 1 --utterances 1", "expected two utterances at least"),
        ("--speakers 0", "expected two utterances at least"),
    ],
)
def test_bad_options(tmp_path: Path, options: str, message: str) -> None:
    result = program(FOLDER, *options.split(), "--out", str(tmp_path))
    assert result.returncode == 2 and message in result.stderr


def test_a_short_run_leaves_predictions_and_a_picture(tmp_path: Path) -> None:
    result = program(FOLDER, "--steps", "1", "--speakers", "3", "--utterances", "3", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for part in ("3 speakers", "validation", "test: "):
        assert part in result.stdout
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["Id", "Category"] and len(rows) == 12
    asked = json.loads((tmp_path / "voices-3-3/testdata.json").read_text())["utterances"]
    assert [row["Id"] for row in rows] == [one["feature_path"] for one in asked]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "speakers.png").stat().st_size > 10_000
