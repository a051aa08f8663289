"""What a run leaves: tables on the screen, a CSV of all rows, a JSON that also says on which machine."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from .cases import BACKWARD, FORWARD, TRAIN
from .console import Console

Row = dict[str, Any]


def default_folder() -> Path:
    """benchmarks/results of a checkout, else saccade-bench in the current folder."""
    here = Path(__file__).resolve().parent
    return here / "results" if (here.parent / "pyproject.toml").exists() else Path("saccade-bench")


def _short(direction: str) -> str:
    return {FORWARD: "fwd", TRAIN: "fwd+bwd", BACKWARD: "bwd"}[direction]


def group_table(console: Console, group: str, rows: list[Row], note: str = "") -> None:
    """One line per case and direction: saccade's figures, every peer's time and saccade's speed over it."""
    names = [n for n in dict.fromkeys(r["provider"] for r in rows) if n != "saccade"]
    names = [n for n in names if any(r["provider"] == n and ("ms" in r or r.get("error")) for r in rows)]
    table = []
    for case, direction in dict.fromkeys((r["case"], r["direction"]) for r in rows):
        here = {r["provider"]: r for r in rows if (r["case"], r["direction"]) == (case, direction)}
        mine = here.get("saccade", {})
        line = [f"{case}  {_short(direction)}", _time(mine), _spread(mine)]
        line += [_figure(mine.get("gflops"), "{:.0f}"), _figure(mine.get("peak_fraction"), "{:.2f}")]
        for name in names:
            line += [_time(here.get(name, {})), _times_faster(mine, here.get(name, {}))]
        table.append(line)
    peers = [text for name in names for text in (f"{name} ms", "faster x")]
    console.table(group, ["case", "saccade ms", "quartiles", "GFLOP/s", "of peak", *peers], table)
    if note:
        console.print(f"  {note}")
    for row in rows:
        if row.get("error"):
            console.print(
                f"  no number for {row['provider']} on {row['case']} ({row['direction']}): {row['error']}"
            )


def _time(row: Row) -> str:
    if "ms" in row:
        return f"{row['ms']:.3g}" if row["ms"] < 100 else f"{row['ms']:.0f}"
    return "WRONG" if row.get("error") else "-"


def _spread(row: Row) -> str:
    return f"{row['ms_low']:.3g}..{row['ms_high']:.3g}" if "ms" in row else ""


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _times_faster(mine: Row, peer: Row) -> str:
    """By useful operations per second, so that calls of different sizes compare too."""
    return f"{mine['gflops'] / peer['gflops']:.2f}" if "gflops" in mine and "gflops" in peer else "-"


def summary_table(console: Console, summary: list[Row]) -> None:
    """Geometric means per group."""
    rows = []
    for s in summary:
        name = f"{s['group']}  {_short(s['direction'])}"
        figures = [_figure(s[n], "{:.2f}") for n in ("mean", "goal", "limit", "least", "floor")]
        rows.append([name, s["peer"], str(s["cases"]), *figures, s["least_case"]])
    head = ["group", "against", "cases", "mean x", "goal", "at mm rate", "least x", "floor", "least in"]
    console.table("speed of saccade over its peers (geometric mean per group)", head, rows)


def memory_table(console: Console, rows: list[Row]) -> None:
    """Peak memory beside what any implementation must hold."""
    table = []
    for row in rows:
        peak, least = row.get("peak_mib"), row.get("inputs_mib")
        share = peak / least if peak is not None and least else None
        why = row.get("error") or row.get("absent") or ""
        table.append(
            [
                f"{row['case']}  {row['dtype']}",
                row["provider"],
                _figure(peak, "{:.0f}"),
                _figure(least, "{:.0f}"),
                _figure(share, "{:.2f}"),
                why,
            ]
        )
    head = ["case", "provider", "peak MiB", "q k v out, gradients MiB", "ratio", "note"]
    console.table("memory that one forward+backward call takes", head, table)


def write(folder: Path, stem: str, content: dict[str, Any]) -> list[Path]:
    """`stem`.json with everything, `stem`.csv with the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_csv = folder / f"{stem}.json", folder / f"{stem}.csv"
    as_json.write_text(json.dumps(content, indent=1) + "\n")
    machine = {
        n: content["machine"].get(n, "")
        for n in ("cpu", "gpu", "threads", "instruction_set", "torch", "commit", "date")
    }
    rows = [row | machine for row in content["rows"] + content["memory"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with as_csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return [as_json, as_csv]
