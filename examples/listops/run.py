"""ListOps with four patterns of attention: what each learns, and what a step costs at full length.

By default the expressions are short, so that training takes minutes; --paper takes the Long Range Arena's, of
500 to 2000 tokens. Leaves a table, a picture and the losses in results/.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from data import PAPER, Batch, Expression, batch, expressions, spell
from model import HEADS, LAYERS, PATTERNS, Calculator
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from common import arguments, parse, progress, pyplot, write_csv  # noqa: E402

BATCH, SHORT = 32, (20, 100)


def train(pattern: str, some: list[Expression], steps: int) -> tuple[Calculator, list[float]]:
    torch.manual_seed(0)
    model, draw, losses = Calculator(pattern), random.Random(0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1, pct_start=0.2)
    with progress(pattern, steps) as report:
        for _ in range(steps):
            b = batch(draw.sample(some, min(BATCH, len(some))))
            loss = F.cross_entropy(model(b), b.values)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            report(losses[-1])
    return model.eval(), losses


@torch.no_grad()
def accuracy(model: Calculator, some: list[Expression]) -> float:
    right = 0
    for n in range(0, len(some), BATCH):
        b = batch(some[n : n + BATCH])
        right += int((model(b).argmax(-1) == b.values).sum())
    return right / len(some)


def cost(pattern: str, b: Batch, repeats: int) -> tuple[float, float]:
    """Seconds of the fastest of `repeats` training steps; MiB that autograd keeps for the backward pass."""
    model = Calculator(pattern)
    kept: dict[int, int] = {}

    def keep(x: Any) -> Any:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        F.cross_entropy(model(b), b.values).backward()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        F.cross_entropy(model(b), b.values).backward()
        times.append(time.perf_counter() - start)
    return min(times), sum(kept.values()) / 2**20


def draw_curves(path: Path, curves: dict[str, list[float]], rows: list[dict[str, Any]]) -> bool:
    """The losses, and accuracy beside the cost of a step. False without matplotlib."""
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    for name, losses in curves.items():
        wide = max(len(losses) // 20, 1)
        smooth = torch.tensor(losses).unfold(0, wide, 1).mean(-1)
        axes[0].plot(range(wide - 1, len(losses)), smooth, label=name)
    axes[0].set(xlabel="step", title="loss, running mean")
    axes[0].legend()
    for row in rows:
        axes[1].scatter(row["seconds"], row["right"], s=90)
        place = (row["seconds"], row["right"])
        axes[1].annotate(row["pattern"], place, xytext=(6, 6), textcoords="offset points")
    axes[1].set(xlabel="seconds of a step at 2000 tokens", ylabel="share right", title="what it costs")
    axes[1].set_xlim(left=0)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return True


def main() -> None:
    parser = arguments(__doc__, HERE, steps=400)
    parser.add_argument("--paper", action="store_true", help="train on 500 to 2000 tokens: takes hours")
    parser.add_argument("--seen", type=int, default=6000, help="expressions to train on (default 6000)")
    parser.add_argument("--repeats", type=int, default=5, help="steps measured at full length (default 5)")
    asked = parse(parser)
    bounds = PAPER if asked.paper else SHORT
    some, test = expressions(asked.seen, bounds, 0), expressions(max(asked.seen // 10, 1), bounds, 1)
    long = batch(expressions(2, (1900, PAPER[1]), 2))
    shortest = min(test, key=lambda x: len(x.tokens))
    print(f"{len(some)} expressions of {bounds[0]} to {bounds[1]} tokens, such as")
    print(f"  {spell(shortest)} = {shortest.value}")
    shares = torch.tensor([x.value for x in test]).bincount(minlength=10) / len(test)
    print(f"the commonest value is right for {shares.max():.1%}")
    rows, curves = [], {}
    for pattern in PATTERNS:
        model, curves[pattern] = train(pattern, some, asked.steps)
        right = accuracy(model, test)
        seconds, mib = cost(pattern, long, asked.repeats)
        rows.append({"pattern": pattern, "right": right, "seconds": seconds, "mib": mib})
    print(f"{'pattern':<9} {'right':>7}   a step at {long.tokens.shape[1]} tokens, batch {len(long.tokens)}")
    for row in rows:
        share, seconds = row["right"], row["seconds"]
        print(
            f"{row['pattern']:<9} {share:7.1%}   {seconds:6.3f} s   {row['mib']:5.0f} MiB kept for backward"
        )
    laid_out = LAYERS * HEADS * long.tokens.numel() * long.tokens.shape[1] * 4 / 2**20
    print(f"the weights of attention, laid out, would be {laid_out:.0f} MiB more")
    losses = [[name, step, loss] for name, xs in curves.items() for step, loss in enumerate(xs)]
    files = [
        write_csv(asked.out / "patterns.csv", rows[0], [row.values() for row in rows]),
        write_csv(asked.out / "training.csv", ["pattern", "step", "loss"], losses),
    ]
    if draw_curves(asked.out / "listops.png", curves, rows):
        files.append(asked.out / "listops.png")
    print("written:", *files)


if __name__ == "__main__":
    main()
