"""The layout of the HW04 speaker data set: written with made-up voices, read for training.

metadata.json   {"n_mels": 40, "speakers": {speaker: [{"feature_path", "mel_len"}, ...]}}
mapping.json    {"speaker2id": {speaker: int}, "id2speaker": {"int": speaker}}
testdata.json   {"n_mels": 40, "utterances": [{"feature_path", "mel_len"}, ...]}
uttr-*.pt       a FloatTensor (mel_len, 40) of log mel bands
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from voices import MELS, utterance, voice

PAD = -20.0  # log of nothing; no model here reads it
ANSWERS = "answers.csv"  # who speaks in the test: only made-up data knows


def generate(folder: Path, speakers: int, utterances: int, tests: int, seed: int = 0) -> None:
    """Writes a data set: `utterances` of each speaker for training, `tests` of each for testing."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    names = random.Random(seed)

    def write(who: Any) -> dict[str, Any]:
        seconds = 1.0 + 2.0 * torch.rand((), generator=draw).item()
        mels, path = utterance(who, seconds, draw), f"uttr-{names.getrandbits(128):032x}.pt"
        torch.save(mels, folder / path)
        return {"feature_path": path, "mel_len": len(mels)}

    made = {f"id{10000 + n}": voice(draw) for n in range(speakers)}
    spoken = {name: [write(who) for _ in range(utterances)] for name, who in made.items()}
    asked = [(write(who), name) for name, who in made.items() for _ in range(tests)]
    names.shuffle(asked)
    order = {name: n for n, name in enumerate(made)}
    _write(folder / "metadata.json", {"n_mels": MELS, "speakers": spoken})
    _write(
        folder / "mapping.json",
        {"speaker2id": order, "id2speaker": {str(n): name for name, n in order.items()}},
    )
    _write(folder / "testdata.json", {"n_mels": MELS, "utterances": [one for one, _ in asked]})
    write_predictions(folder / ANSWERS, [(one["feature_path"], name) for one, name in asked])


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))


def write_predictions(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Id", "Category"])
        writer.writerows(rows)


def read_predictions(path: Path) -> dict[str, str]:
    with path.open() as file:
        return {row["Id"]: row["Category"] for row in csv.DictReader(file)}


@dataclass
class Batch:
    """mels [N, S, 40] filled up with PAD, padding bool [N, S] (True = padding), speaker [N] int64."""

    mels: Tensor
    padding: Tensor
    speaker: Tensor


class Speakers:
    """A data set in memory: (mels, speaker) in `train` and `validation`, (path, mels) in `test`."""

    def __init__(self, folder: Path, share: float = 0.9, seed: int = 0) -> None:
        metadata = json.loads((folder / "metadata.json").read_text())
        mapping = json.loads((folder / "mapping.json").read_text())
        asked = json.loads((folder / "testdata.json").read_text())
        if metadata["n_mels"] != MELS:
            raise ValueError(f"{folder}: expected {MELS} mel bands, got {metadata['n_mels']}")
        self.names = [mapping["id2speaker"][str(n)] for n in range(len(mapping["id2speaker"]))]
        everything = [
            (_load(folder, one), mapping["speaker2id"][name])
            for name, spoken in metadata["speakers"].items()
            for one in spoken
        ]
        random.Random(seed).shuffle(everything)
        cut = round(len(everything) * share)
        self.train, self.validation = everything[:cut], everything[cut:]
        self.test = [(one["feature_path"], _load(folder, one)) for one in asked["utterances"]]


def _load(folder: Path, one: dict[str, Any]) -> Tensor:
    mels = torch.load(folder / one["feature_path"], weights_only=True)
    if tuple(mels.shape) != (one["mel_len"], MELS):
        raise ValueError(
            f"{one['feature_path']}: expected [{one['mel_len']}, {MELS}], got {list(mels.shape)}"
        )
    return mels.float()


def collate(rows: list[tuple[Tensor, int]]) -> Batch:
    longest = max(len(mels) for mels, _ in rows)
    mels = torch.full((len(rows), longest, MELS), PAD)
    for place, (x, _) in zip(mels, rows, strict=True):
        place[: len(x)] = x
    lengths = torch.tensor([len(x) for x, _ in rows])
    padding = torch.arange(longest) >= lengths[:, None]
    return Batch(mels, padding, torch.tensor([speaker for _, speaker in rows]))


def segments(rows: list[tuple[Tensor, int]], size: int, length: int, draw: random.Random) -> Batch:
    """A training batch: `size` utterances, of each a random stretch of at most `length` frames."""
    found = []
    for mels, speaker in draw.sample(rows, min(size, len(rows))):
        start = draw.randrange(max(len(mels) - length, 0) + 1)
        found.append((mels[start : start + length], speaker))
    return collate(found)
