"""Tables and a progress bar: rich where it is installed, plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any


class Console:
    """Prints lines and tables, and shows how far a run is."""

    def __init__(self, total: int = 0) -> None:
        self._total, self._done = total, 0
        try:
            from rich.console import Console as Rich
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        except ImportError:
            self._rich: Any = None
            return
        # A file or a pipe has no width of its own: let tables be as wide as they are.
        self._rich = Rich(highlight=False, width=None if sys.stdout.isatty() else 240)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=self._rich, transient=True)
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Console:
        if self._rich is not None and self._total:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None and self._total:
            self._progress.stop()

    def step(self, about: str, advance: int = 0) -> None:
        """Say what is being done; `advance` how many steps are finished."""
        self._done += advance
        if self._rich is not None:
            self._progress.update(self._task, description=about, advance=advance)
        elif not advance:
            print(f"[{self._done}/{self._total}] {about}", file=sys.stderr, flush=True)

    def print(self, text: str = "") -> None:
        if self._rich is not None:
            self._rich.print(text, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column is text, the others are figures."""
        if self._rich is None:
            print("\n" + plain_table(title, head, rows), flush=True)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", title_style="bold")
        for n, name in enumerate(head):
            table.add_column(name, justify="right" if n else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._rich.print(table)


def plain_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table in plain text."""
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    lines = [title]
    for row in (head, ["-" * w for w in widths], *rows):
        cells = [c.rjust(w) if n else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
