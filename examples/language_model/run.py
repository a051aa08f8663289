"""Trains a small Transformer with torch's attention and with saccade's, and shows both.

The model is plain torch, with `nn.MultiheadAttention` (model.py). For the full and the causal mask the swap
is one line, `saccade.accelerate(model)` (variants.py); the windowed model is built with
`saccade.nn.MultiheadAttention(window=...)` and compared with torch's under a banded mask. Seed, initial
weights and text are the same, so the loss must be too.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KINDS = {
    "full": "torch's module with a dense causal mask; the same module after saccade.accelerate(model)",
    "causal": "the same with is_causal=True, so that torch may skip what the mask hides",
    "windowed": "each position sees 128: torch with a banded mask; saccade.nn.MultiheadAttention(window=...)",
}
WARM = 2  # first steps, which start threads and touch memory for the first time, are not in the time per step


@dataclass
class Run:
    """What one process printed."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0

    @property
    def step_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds[WARM:] or self.seconds)


class Progress:
    """A bar where rich is installed; a line per kind elsewhere."""

    def __init__(self, total: int) -> None:
        try:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        except ImportError:
            self._bar: Any = None
            return
        columns = (
            TextColumn("{task.description:<46}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, text: str) -> None:
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.update(self._task, description=text)

    def step(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=text, advance=1)


def start(name: str, steps: int) -> subprocess.Popen[str]:
    """A process that trains one variant, a step for every line it is sent."""
    command = [sys.executable, str(HERE / "variants.py"), name, str(steps)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def heard(child: subprocess.Popen[str]) -> dict[str, float]:
    """The next line of a process."""
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise SystemExit("a training process failed; its message stands above")
    said: dict[str, float] = json.loads(line)
    return said


def compare(kind: str, steps: int, progress: Progress) -> dict[str, Run]:
    """Train both variants of a kind, step by step in turn: what slows the machine down slows down both."""
    names = (kind, f"{kind}-saccade")
    runs = {name: Run() for name in names}
    progress.begin(f"{kind}: starting")
    with start(names[0], steps) as first, start(names[1], steps) as second:
        children = dict(zip(names, (first, second), strict=True))
        for _ in range(steps):
            for name, child in children.items():
                assert child.stdin is not None
                child.stdin.write("\n")
                child.stdin.flush()
                said = heard(child)
                runs[name].losses.append(said["loss"])
                runs[name].seconds.append(said["seconds"])
                whose = "saccade" if name != kind else "torch"
                progress.step(f"{kind}, {whose}: loss {said['loss']:.3f}, {said['seconds'] * 1e3:.0f} ms")
        for name, child in children.items():
            runs[name].peak_mib = heard(child)["peak_mib"]
    return runs


HEAD = [
    "attention",
    "torch ms",
    "saccade ms",
    "faster",
    "torch MiB",
    "saccade MiB",
    "torch loss",
    "saccade",
    "apart",
]
TITLE = (
    "Median time of a training step, peak memory of the process, last loss, largest difference at any step"
)


def kinds_of(runs: dict[str, Run]) -> list[str]:
    return [kind for kind in KINDS if kind in runs]


def table(runs: dict[str, Run]) -> list[list[str]]:
    """A line per kind of mask."""
    rows = []
    for kind in kinds_of(runs):
        ours, theirs = runs[f"{kind}-saccade"], runs[kind]
        apart = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
        rows.append(
            [
                kind,
                f"{theirs.step_ms:.0f}",
                f"{ours.step_ms:.0f}",
                f"{theirs.step_ms / ours.step_ms:.2f} x",
                f"{theirs.peak_mib:.0f}",
                f"{ours.peak_mib:.0f}",
                f"{theirs.losses[-1]:.4f}",
                f"{ours.losses[-1]:.4f}",
                f"{apart:.1e}",
            ]
        )
    return rows


def caption(kinds: list[str]) -> str:
    return "\n".join(f"{kind}: {KINDS[kind]}" for kind in kinds)


def show(rows: list[list[str]]) -> None:
    """Print the table, with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(TITLE)
        widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
        for row in (HEAD, *rows):
            print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)))
        print(caption([row[0] for row in rows]))
        return
    grid = Table(
        title=TITLE, title_justify="left", caption=caption([row[0] for row in rows]), caption_justify="left"
    )
    for n, name in enumerate(HEAD):
        grid.add_column(name, justify="right" if n else "left")
    for row in rows:
        grid.add_row(*row)
    console = Console()
    Console(width=max(console.width, 110)).print(grid)


def write_csv(path: Path, runs: dict[str, Run]) -> None:
    """Every step of every run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["attention", "implementation", "step", "loss", "seconds", "peak_mib"])
        for name, run in runs.items():
            kind, _, ours = name.partition("-")
            for step, (loss, seconds) in enumerate(zip(run.losses, run.seconds, strict=True)):
                writer.writerow([kind, ours or "torch", step, loss, f"{seconds:.6f}", f"{run.peak_mib:.1f}"])


def draw(path: Path, runs: dict[str, Run]) -> bool:
    """Loss curves, time and memory in one picture. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, times, memory) = plt.subplots(1, 3, figsize=(15, 4.2))
    kinds = kinds_of(runs)
    for kind, colour in zip(kinds, ("#d1495b", "#edae49", "#0b6e4f"), strict=False):
        curves.plot(runs[kind].losses, color=colour, linewidth=4, alpha=0.35, label=f"{kind}, torch")
        curves.plot(runs[f"{kind}-saccade"].losses, color=colour, linewidth=1.2, label=f"{kind}, saccade")
    curves.set(xlabel="step", ylabel="loss (nats per byte)", title="the same loss")
    curves.legend(fontsize=8)
    for ax, title, value in ((times, "ms per step", "step_ms"), (memory, "peak memory, MiB", "peak_mib")):
        for shift, suffix, name, colour in (
            (-0.2, "", "torch", "#9aa5b1"),
            (0.2, "-saccade", "saccade", "#0b6e4f"),
        ):
            heights = [getattr(runs[kind + suffix], value) for kind in kinds]
            bars = ax.bar([n + shift for n in range(len(kinds))], heights, 0.4, label=name, color=colour)
            ax.bar_label(bars, fmt="%.0f", fontsize=8)
        ax.set_xticks(range(len(kinds)), kinds)
        ax.set_title(title)
        ax.margins(y=0.3)
        ax.legend(fontsize=8, loc="upper center", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def main() -> None:
    """Train all, show the table, leave results/ behind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=60, help="training steps of each model (default 60)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="masks to compare (default all)"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder of the picture and the CSV"
    )
    asked = parser.parse_args()
    if asked.steps < 1:
        parser.error(f"--steps: expected at least 1, got {asked.steps}")
    runs: dict[str, Run] = {}
    with Progress(asked.steps * 2 * len(asked.kinds)) as progress:
        for kind in asked.kinds:
            runs |= compare(kind, asked.steps, progress)
    show(table(runs))
    asked.out.mkdir(parents=True, exist_ok=True)
    write_csv(asked.out / "training.csv", runs)
    files = [asked.out / "training.csv"]
    if draw(asked.out / "training.png", runs):
        files.insert(0, asked.out / "training.png")
    print("written:", *files)


if __name__ == "__main__":
    main()
