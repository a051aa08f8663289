"""Learns to write numbers in digits from their English words, and prints BLEU.

Teacher forcing with label smoothing, then scheduled sampling; one head of the attention to the source is
guided along the diagonal. A second, non-autoregressive decoder on the same encoder writes all digits at once.
Leaves pictures of the alignments and a CSV of the losses in results/.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from data import BOS, PAD, Pairs, pairs, phrase, sentence
from model import HEADS, Translator
from saccade.nn import GuidedAttentionLoss, scheduled_sampling, shift_right
from torch import Tensor
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from common import arguments, parse, progress, pyplot, write_csv  # noqa: E402

BATCH, SMOOTHING, BEAMS = 64, 0.1, 4
GUIDED_HEAD = 0


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """torch's own; the padding is left out."""
    return F.cross_entropy(
        logits.flatten(0, 1), target.flatten(), ignore_index=PAD, label_smoothing=SMOOTHING
    )


def loss_of(model: Translator, batch: Pairs, truth: float, guide: GuidedAttentionLoss) -> Tensor:
    """Of both decoders, the length and the guided head."""
    x, memory = model.encode(batch)
    inputs = shift_right(batch.target, BOS)
    if truth < 1:
        with torch.no_grad():
            first = model.decode(inputs, memory, batch.padding)
        inputs = scheduled_sampling(inputs, first, truth)
    with guide.watch(layer.multihead_attn for layer in model.decoder.layers):
        loss = cross_entropy(model.decode(inputs, memory, batch.padding), batch.target)
    loss = loss + guide(batch.target_lengths, batch.source_lengths)
    lengths = batch.target_lengths - 1  # this decoder needs no END
    at_once = model.parallel(x, memory, lengths, batch.padding)
    digits = batch.target[:, : at_once.shape[1]].masked_fill(
        torch.arange(at_once.shape[1]) >= lengths[:, None], PAD
    )
    loss = loss + cross_entropy(at_once, digits)
    return loss + 0.3 * F.cross_entropy(model.parallel.lengths(memory, batch.padding), lengths)


def train(steps: int) -> tuple[Translator, list[float]]:
    torch.manual_seed(0)
    model = Translator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1, pct_start=0.1)
    guide = GuidedAttentionLoss(sigma=0.2, heads=[GUIDED_HEAD])
    losses = []
    with progress("number words to digits", steps) as report:
        for step in range(steps):
            truth = 1.0 if step < steps // 2 else 1.0 - 0.3 * (step / steps - 0.5)
            loss = loss_of(model, pairs(BATCH, seed=step), truth, guide)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            report(losses[-1])
    return model.eval(), losses


def bleu(found: list[str], wanted: list[str]) -> float | None:
    """sacrebleu's corpus BLEU of tokens between spaces; None where it is not installed."""
    try:
        import sacrebleu
    except ImportError:
        return None
    return sacrebleu.corpus_bleu(found, [wanted], tokenize="none", force=True).score


def evaluate(model: Translator, test: Pairs) -> list[dict[str, Any]]:
    wanted = [sentence(row) for row in test.target]
    ways = {
        "greedy": lambda: model.translate(test).tokens,
        f"beam {BEAMS}": lambda: model.translate(test, BEAMS).tokens[:, 0],
        "all at once": lambda: model.translate_at_once(test),
    }
    rows = []
    for name, way in ways.items():
        start = time.perf_counter()
        found = [sentence(row) for row in way()]
        seconds = time.perf_counter() - start
        right = sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
        rows.append({"way": name, "bleu": bleu(found, wanted), "right": right, "seconds": seconds})
    return rows


def draw(path: Path, model: Translator, losses: list[float]) -> bool:
    """Where the guided head and the mean of the others look, for three numbers. False without matplotlib."""
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(2, 4, figsize=(20, 9), layout="constrained")
    some = pairs(12, seed=11, held_out=True)
    longest = some.source_lengths.topk(3)[1]
    test = Pairs(some.source[longest], some.target[longest])
    weights = model.alignment(test, shift_right(test.target, BOS))
    for n in range(3):
        said, written = phrase(test.source[n]), [*sentence(test.target[n]).split(), "END"]
        inside = weights[n, :, : len(written), : len(said)]
        others = [h for h in range(HEADS) if h != GUIDED_HEAD]
        for axis, part, name in (
            (axes[0, n], inside[GUIDED_HEAD], "guided head"),
            (axes[1, n], inside[others].mean(0), "other heads"),
        ):
            axis.imshow(part.numpy(), cmap="viridis", aspect="auto", vmin=0)
            axis.set_xticks(range(len(said)), said, rotation=60, ha="right", fontsize=8)
            axis.set_yticks(range(len(written)), written)
            axis.set_title(name)
    axes[0, 3].plot(losses)
    axes[0, 3].set(xlabel="step", title="loss")
    axes[1, 3].axis("off")
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return True


def main() -> None:
    parser = arguments(__doc__, HERE, steps=2500)
    parser.add_argument("--test", type=int, default=1000, help="held-out numbers (default 1000)")
    asked = parse(parser)
    start = time.perf_counter()
    model, losses = train(asked.steps)
    print(f"trained in {time.perf_counter() - start:.0f} s on numbers of one to nine digits")
    test = pairs(asked.test, seed=-1, held_out=True)
    for row in evaluate(model, test):
        score = "needs sacrebleu" if row["bleu"] is None else f"{row['bleu']:6.2f}"
        print(f"{row['way']:<12} BLEU {score}   right {row['right']:7.1%}   {row['seconds']:.2f} s")
    few = pairs(4, seed=5, held_out=True)
    for said, found in zip(few.source, model.translate(few, BEAMS).tokens[:, 0], strict=True):
        print(f"  {' '.join(phrase(said))} -> {sentence(found)}")
    files = [write_csv(asked.out / "training.csv", ["step", "loss"], enumerate(losses))]
    if draw(asked.out / "alignments.png", model, losses):
        files.append(asked.out / "alignments.png")
    print("written:", *files)


if __name__ == "__main__":
    main()
