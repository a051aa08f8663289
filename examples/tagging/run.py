"""Tags words and judges reviews, with self-attention and without: who does not look around cannot tell.

"I saw a saw" has a verb and a noun that look the same; "not good" is not good. Leaves pictures of what
attention looks at and a CSV of the losses in results/.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data import AMBIGUOUS, TAGS, Batch, reviews, spell, tagged
from model import Judge, Tagger
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from common import arguments, parse, progress, pyplot, write_csv  # noqa: E402

BATCH, TESTS = 64, 1000


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of every label; padding has none."""
    logits = model(batch.words)
    return F.cross_entropy(logits.flatten(0, -2), batch.labels.flatten(), ignore_index=-1)


def train(model: Any, batches: Callable[[int, int], Batch], name: str, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    with progress(name, steps) as report:
        for step in range(steps):
            loss = loss_of(model, batches(BATCH, step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            report(losses[-1])
    model.eval()
    return losses


@torch.no_grad()
def right_tags(model: Tagger, batch: Batch) -> tuple[float, float]:
    """The share of right tags, of all words and of those that have two."""
    right = model(batch.words).argmax(-1) == batch.labels
    two = torch.isin(batch.words, torch.tensor(sorted(AMBIGUOUS)))
    return right[~batch.padding].float().mean().item(), right[two].float().mean().item()


@torch.no_grad()
def right_verdicts(model: Judge, batch: Batch) -> float:
    return (model(batch.words).argmax(-1) == batch.labels).float().mean().item()


@torch.no_grad()
def weights_of(model: Tagger, words: Tensor) -> Tensor:
    """[S, S]: what each word of a sentence looks at in the first layer, averaged over heads."""
    attention: Any = model.reader.encoder.layers[0].self_attn
    seen: list[Any] = []
    hook = attention.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(words[None])
    hook.remove()
    return attention(*seen[0])[1][0]


def draw(path: Path, tagger: Tagger, judge: Judge, curves: dict[str, list[float]]) -> bool:
    """A sentence's attention, what counts in some reviews, the losses. False without matplotlib."""
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(1, 3, figsize=(20, 6), layout="constrained", width_ratios=[1, 1.6, 1])
    some = tagged(200, -5).words
    words = max(some, key=lambda row: sum(n in AMBIGUOUS for n in row.tolist()))
    words = words[words != 0]
    with torch.no_grad():
        tags = [TAGS[n] for n in tagger(words[None]).argmax(-1)[0]]
    axes[0].imshow(weights_of(tagger, words).numpy(), cmap="viridis", vmin=0)
    names = [f"{word} {tag}" for word, tag in zip(spell(words), tags, strict=True)]
    axes[0].set_xticks(range(len(names)), spell(words), rotation=60, ha="right")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_title("what each word looks at, and its tag")
    batch = reviews(6, -7)
    looks = judge.looks(batch.words)
    for n in range(6):
        place = 0.0
        for word, look in zip(spell(batch.words[n]), looks[n].tolist(), strict=False):
            box = {
                "facecolor": plt.get_cmap("Reds")(look / looks[n].max().item() * 0.8),
                "edgecolor": "none",
                "pad": 1.5,
            }
            axes[1].text(place, 5 - n, word, fontsize=9, bbox=box)
            place += 0.12 * len(word) + 0.25
    axes[1].set(xlim=(0, 16), ylim=(-1, 6), title="what counts in a review")
    axes[1].axis("off")
    for name, losses in curves.items():
        axes[2].plot(losses, label=name)
    axes[2].set(xlabel="step", title="loss", yscale="log")
    axes[2].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return True


def main() -> None:
    asked = parse(arguments(__doc__, HERE, steps=400))
    models: dict[str, Any] = {}
    curves: dict[str, list[float]] = {}
    for kind, batches, make in (("tags", tagged, Tagger), ("verdicts", reviews, Judge)):
        test = batches(TESTS, -1)
        for context in (False, True):
            torch.manual_seed(0)
            name = f"{kind}, {'with' if context else 'without'} context"
            models[name] = make(context)
            curves[name] = train(models[name], batches, name, asked.steps)
            if kind == "tags":
                share, two = right_tags(models[name], test)
                print(f"{name:<26} {share:6.1%} right, {two:6.1%} of words with two tags")
            else:
                print(f"{name:<26} {right_verdicts(models[name], test):6.1%} right")
    rows = [[name, step, loss] for name, losses in curves.items() for step, loss in enumerate(losses)]
    files = [write_csv(asked.out / "training.csv", ["model", "step", "loss"], rows)]
    if draw(
        asked.out / "tagging.png", models["tags, with context"], models["verdicts, with context"], curves
    ):
        files.append(asked.out / "tagging.png")
    print("written:", *files)


if __name__ == "__main__":
    main()
