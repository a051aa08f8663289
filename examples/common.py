"""What the examples share: a progress bar, pictures where matplotlib is there, `--steps` and `--out`."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def progress(title: str, steps: int) -> Iterator[Callable[[float], None]]:
    """Gives a function that takes the loss of a step: a bar where rich is installed, else nothing."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda loss: None
        return
    text = TextColumn("{task.description:<34}")
    with Progress(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task(title, total=steps)
        yield lambda loss: bar.update(task, advance=1, description=f"{title}: loss {loss:.3f}")


def pyplot() -> Any:
    """matplotlib.pyplot without a display, or None."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def arguments(description: str | None, folder: Path, steps: int) -> argparse.ArgumentParser:
    """A parser with --steps and --out. `parse` it."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=steps, help=f"training steps (default {steps})")
    parser.add_argument(
        "--out", type=Path, default=folder / "results", help="folder of the pictures and tables"
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, checked; the folder of the results is made."""
    asked = parser.parse_args()
    if asked.steps < 1:
        parser.error(f"--steps: expected at least 1, got {asked.steps}")
    asked.out.mkdir(parents=True, exist_ok=True)
    return asked


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(list(header))
        writer.writerows(rows)
    return path
