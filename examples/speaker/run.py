"""Speaker classification end to end, on data of the HW04 layout: made up, or your own with --data.

Trains a Conformer with self-attention pooling and the additive margin softmax on random segments, validates
on whole utterances, writes predictions.csv (Id,Category) for testdata.json, a picture and the losses to
results/.
"""

from __future__ import annotations

import math
import random
import sys
import time
from pathlib import Path

import torch
from data import ANSWERS, Speakers, collate, generate, read_predictions, segments, write_predictions
from model import SpeakerClassifier
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from common import arguments, parse, progress, pyplot, write_csv  # noqa: E402

BATCH, FRAMES, RATE, WARM_UP = 32, 128, 1e-3, 0.1


def rate_at(step: int, steps: int) -> float:
    """Linear up, then half a cosine down."""
    warm = max(round(steps * WARM_UP), 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


@torch.no_grad()
def accuracy(model: SpeakerClassifier, rows: list[tuple[Tensor, int]]) -> float:
    """On whole utterances, in padded batches."""
    model.eval()
    right = 0
    for n in range(0, len(rows), BATCH):
        batch = collate(rows[n : n + BATCH])
        right += int((model.predict(batch.mels, batch.padding) == batch.speaker).sum())
    model.train()
    return right / max(len(rows), 1)


def train(data: Speakers, steps: int) -> tuple[SpeakerClassifier, list[float], list[tuple[int, float]]]:
    """The model, its losses, and the share of the validation set it gets right along the way."""
    torch.manual_seed(0)
    draw = random.Random(0)
    model = SpeakerClassifier(len(data.names))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    losses, checks = [], []
    with progress("speakers", steps) as report:
        for step in range(steps):
            batch = segments(data.train, BATCH, FRAMES, draw)
            loss = model.loss(model(batch.mels, batch.padding), batch.speaker)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            report(losses[-1])
            if (step + 1) % max(steps // 5, 1) == 0:
                checks.append((step + 1, accuracy(model, data.validation)))
    return model.eval(), losses, checks


def predict(model: SpeakerClassifier, data: Speakers) -> list[tuple[str, str]]:
    """(Id, Category) of every test utterance, one at a time."""
    return [(path, data.names[int(model.predict(mels[None]))]) for path, mels in data.test]


@torch.no_grad()
def draw(path: Path, model: SpeakerClassifier, data: Speakers, losses: list[float], checks: list) -> bool:
    """What pooling looks at in an utterance, the vectors of the validation set in a plane, and training."""
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(1, 3, figsize=(19, 5), layout="constrained")
    mels = data.test[0][1]
    axes[0].imshow(mels.t().numpy(), origin="lower", aspect="auto", cmap="magma")
    weights = model.pool.weights(model.encode(mels[None]))[0, 0]
    axes[0].plot(weights / weights.max() * 38, color="cyan", linewidth=1.5)
    axes[0].set(xlabel="frame", ylabel="mel band", title="what the pooling attends to (cyan)")
    batch = collate(data.validation if len(data.validation) > 2 else data.train[:BATCH])
    vectors = torch.nn.functional.normalize(model(batch.mels, batch.padding), dim=-1)
    plane = vectors - vectors.mean(0)
    plane = plane @ torch.linalg.svd(plane, full_matrices=False)[2][:2].t()
    axes[1].scatter(*plane.t().numpy(), c=batch.speaker.numpy(), cmap="tab20", s=25)
    axes[1].set(title="validation utterances, coloured by speaker")
    axes[2].plot(losses, linewidth=0.8)
    axes[2].set(xlabel="step", title="loss, and share right (red)")
    twin = axes[2].twinx()
    twin.plot(*zip(*checks, strict=True), "o-", color="tab:red")
    twin.set_ylim(0, 1)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return True


def main() -> None:
    parser = arguments(__doc__, HERE, steps=600)
    parser.add_argument("--data", type=Path, help="a data set of this layout (default: one is made up)")
    parser.add_argument("--speakers", type=int, default=60, help="how many voices to make up (default 60)")
    parser.add_argument("--utterances", type=int, default=20, help="of each for training (default 20)")
    asked = parse(parser)
    if asked.data is not None and not (asked.data / "metadata.json").is_file():
        parser.error(f"--data: no metadata.json in {asked.data}")
    if asked.data is None and (
        min(asked.speakers, asked.utterances) < 1 or asked.speakers * asked.utterances < 2
    ):
        parser.error("--speakers, --utterances: expected two utterances at least, of one speaker or two")
    folder = asked.data
    if folder is None:
        folder = asked.out / f"voices-{asked.speakers}-{asked.utterances}"
        if not (folder / ANSWERS).exists():
            generate(folder, asked.speakers, asked.utterances, tests=4)
    data = Speakers(folder)
    parts = f"{len(data.train)} to train, {len(data.validation)} to validate, {len(data.test)} to test"
    print(f"{len(data.names)} speakers, utterances: {parts}")
    start = time.perf_counter()
    model, losses, checks = train(data, asked.steps)
    print(f"trained in {time.perf_counter() - start:.0f} s; validation: {checks[-1][1]:.1%} right")
    files = [asked.out / "predictions.csv"]
    found = predict(model, data)
    write_predictions(files[0], found)
    if (folder / ANSWERS).exists():
        answers = read_predictions(folder / ANSWERS)
        right = sum(answers[path] == name for path, name in found)
        print(f"test: {right / max(len(found), 1):.1%} right")
    files.append(write_csv(asked.out / "training.csv", ["step", "loss"], enumerate(losses)))
    if draw(asked.out / "speakers.png", model, data, losses, checks):
        files.append(asked.out / "speakers.png")
    print("written:", *files)


if __name__ == "__main__":
    main()
