"""Pictures of a run; matplotlib is needed only here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]
_COLOURS = {
    "saccade": "#0b6e4f",
    "saccade-plain": "#83c5a8",
    "sdpa": "#d1495b",
    "sdpa-mask": "#edae49",
    "flex": "#66a1c6",
    "torch": "#d1495b",
}


def draw(path: Path, content: dict[str, Any]) -> bool:
    """Bars of GFLOP/s per group and direction, torch.mm's as a line. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in content["rows"] if "gflops" in r]
    panels = list(dict.fromkeys((r["group"], r["direction"]) for r in timed))
    if not panels:
        return False
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(8 * columns, 3.2 * lines), squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        _panel(ax, panel, [r for r in timed if (r["group"], r["direction"]) == panel])
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    machine = content["machine"]
    figure.suptitle(
        f"saccade {machine['saccade']}, torch {machine['torch']}, "
        f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _panel(ax: Any, panel: tuple[str, str], rows: list[Row]) -> None:
    cases = list(dict.fromkeys(r["case"] for r in rows))
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    width = 0.8 / len(providers)
    for n, provider in enumerate(providers):
        mine = [r for r in rows if r["provider"] == provider]
        places = [cases.index(r["case"]) + (n - (len(providers) - 1) / 2) * width for r in mine]
        ax.bar(places, [r["gflops"] for r in mine], width, label=provider, color=_COLOURS.get(provider))
    limits = [r["gflops"] / r["peak_fraction"] for r in rows if r.get("peak_fraction")]
    if limits:
        ax.axhline(max(limits), color="black", linewidth=0.8, linestyle="--", label="torch.mm 2048")
    ax.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=7)
    ax.set_ylabel("useful GFLOP/s")
    ax.set_title(", ".join(panel), fontsize=9)
    ax.legend(fontsize=7)
