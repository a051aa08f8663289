"""The command line of the benchmarks: `python -m saccade bench`."""

from __future__ import annotations

import argparse
import datetime
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import machine, memory, plots, report
from .apart import apart
from .cases import DTYPES, Group
from .console import Console
from .measure import Budget, Clock, Peak
from .runner import Plan, Row, add_ratios, measure_case, summarise
from .suites import SUITES, Part

QUICK = Budget(0.15, 3, 10)
APART = True  # each case on the CPU in a process of its own
INTERRUPTED = 130  # the exit status of a program that SIGINT ended


def parser() -> argparse.ArgumentParser:
    """Every option of the command."""
    suites = "; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items())
    made = argparse.ArgumentParser(
        prog="python -m saccade bench",
        description="Times attention beside its peers, each case in one process. Every result is checked "
        "against fp64 before its time is printed.",
    )
    made.add_argument("--suite", choices=list(SUITES), default="attention", help=suites)
    made.add_argument(
        "--only", default="", metavar="TEXT", help="only cases with TEXT in their or their group's name"
    )
    made.add_argument(
        "--quick", action="store_true", help="few rounds per case: minutes become seconds, noise grows"
    )
    made.add_argument("--device", type=_device, default="cpu", help="cpu (default), cuda")
    made.add_argument(
        "--threads", type=_from_zero(int), default=0, help="threads of torch (default: as torch chooses)"
    )
    made.add_argument(
        "--memory", action="store_true", help="also peak memory, each call in a process of its own"
    )
    made.add_argument(
        "--no-flex", action="store_true", help="leave flex_attention out (compiling takes 6 to 20 s a case)"
    )
    made.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        default=report.default_folder(),
        help="for CSV, JSON and the picture (default: %(default)s)",
    )
    made.add_argument(
        "--seconds",
        type=_from_zero(float),
        default=0,
        help="start no case after so long (default: measure them all)",
    )
    made.add_argument("--list", action="store_true", help="print the cases and stop")
    return made


def _from_zero(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if not value >= 0:
            raise argparse.ArgumentTypeError(f"expected at least 0, got {text}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch sees {torch.cuda.device_count()} CUDA devices, got {text}")
    return text


def _fault(asked: argparse.Namespace, selected: list[Any], tasks: list[Any]) -> str:
    """What is wrong with the options together, or nothing."""
    if not selected and not tasks:
        return f"no case of suite {asked.suite!r} has {asked.only!r} in its name; --list shows them"
    if asked.memory and not tasks:
        return f"no memory case has {asked.only!r} in its name; --memory --list shows them"
    if asked.list:
        return ""
    if SUITES[asked.suite].gpu and not asked.device.startswith("cuda"):
        return f"--suite {asked.suite}: its tensors are a GPU's; give --device cuda"
    try:  # before anything is measured
        asked.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=asked.out).close()
    except OSError as error:
        return f"--out: {error}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 1 when saccade gave a wrong result, 130 when interrupted."""
    options = parser()
    asked = options.parse_args(arguments)
    suite = SUITES[asked.suite]
    budget = QUICK if asked.quick else suite.budget
    excluded = frozenset({"flex"} if asked.no_flex else ())
    plan = Plan(asked.suite, asked.device, budget, asked.only, excluded)
    selected = plan.selected(suite)
    tasks = memory.tasks(asked.only) if asked.memory or suite.memory else []
    if wrong := _fault(asked, selected, tasks):
        options.error(wrong)
    if asked.list:
        for _, group, wanted in selected:
            print(f"{group.name} (against {group.peer}):", *(case.name for case in wanted), sep="\n  ")
        if tasks:
            print("memory:", *dict.fromkeys(case.name for case, _, _ in tasks), sep="\n  ")
        return 0
    if asked.threads:
        torch.set_num_threads(asked.threads)
    content = _measure(plan, selected, tasks, asked.seconds)
    date = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    stem = f"{asked.suite}-{asked.device.replace(':', '')}-{date}"
    files = report.write(asked.out, stem, content)
    if plots.draw(asked.out / f"{stem}.png", content):
        files.append(asked.out / f"{stem}.png")
    print("written:", *files, sep="\n  ")
    if content["stopped"] == "interrupted":
        return INTERRUPTED
    wrong = any(r["provider"].startswith("saccade") and r.get("error") for r in content["rows"])
    return int(wrong or bool(content["stopped"]))


def _measure(plan: Plan, selected: list[Any], tasks: list[Any], seconds: float = 0) -> dict[str, Any]:
    """All rows of a run, with the tables printed as they are ready; what is there when it is interrupted."""
    end, stopped = time.monotonic() + (seconds or math.inf), ""
    clock = Clock(plan.device)
    peak = Peak(clock, plan.device)
    rows: list[Row] = []
    used: list[Row] = []
    groups = [group for _, group, _ in selected]
    facts = machine.facts(plan.device)
    with Console(sum(len(wanted) for _, _, wanted in selected) + len(tasks)) as console:
        console.print(
            f"{facts['cpu']}, {facts['threads']} threads, instruction set {facts['instruction_set']}"
        )
        console.print(f"torch {facts['torch']}, saccade {facts['saccade']} {facts['commit']}".rstrip())
        try:
            if not _time_all(console, plan, selected, (clock, peak), rows, end):
                stopped, end = "failed", 0
            _weigh_all(console, plan, tasks, used, end)
        except KeyboardInterrupt:
            stopped = "interrupted"
            console.print("interrupted: what was measured until then follows")
        add_ratios(rows, groups, peak, DTYPES)  # again: the best matrix product of the whole run
        summary = summarise(rows, groups)
        if summary:
            report.summary_table(console, summary)
        if used:
            report.memory_table(console, used)
        rates = peak.rates()
        console.print(
            f"torch.mm {peak.size}^3, GFLOP/s: " + ", ".join(f"{n} {rate:.0f}" for n, rate in rates.items())
        )
    return {"machine": facts | {"gemm_gflops": rates}, "rows": rows, "summary": summary, "memory": used,
            "stopped": stopped}  # fmt: skip


def _time_all(
    console: Console, plan: Plan, selected: list[Any], clocks: tuple[Clock, Peak], rows: list[Row], end: float
) -> bool:
    """Add the rows of all cases, group by group; False where a GPU has failed."""
    groups, works = [group for _, group, _ in selected], True
    for part, group, wanted in selected:
        before = len(rows)
        for case in wanted:
            if not works or time.monotonic() > end:
                console.print(f"left out: {group.name}: {case.name}")
                continue
            found = _measured(console, part, group, case, plan, clocks)
            works = works and found is not None
            rows += found or []
        mine = rows[before:]
        add_ratios(mine, groups, clocks[1], DTYPES)
        if mine:
            report.group_table(console, group.name, mine, group.note)
    return works


def _weigh_all(console: Console, plan: Plan, tasks: list[Any], used: list[Row], end: float) -> None:
    """Add the rows of the memory table."""
    for case, direction, provider in tasks:
        about = f"memory: {case.name}, {provider}"
        if time.monotonic() > end:
            console.print(f"left out: {about}")
            continue
        console.step(about)
        used.append(memory.measure(case, direction, provider, torch.get_num_threads(), plan.device))
        console.step(about, advance=1)


def _measured(
    console: Console, part: Part, group: Group, case: Any, plan: Plan, clocks: tuple[Clock, Peak]
) -> list[Row] | None:
    """The rows of a case. None where a GPU has failed: it answers nothing more, what it said is kept."""
    console.step(f"{group.name}: {case.name}")
    clock, peak = clocks
    try:
        if clock.cuda or not APART:
            return list(measure_case(part.work(case, plan.device, plan.excluded), group, plan, clock, peak))
        rows, best = apart(_rows_and_peak, part, group, case, plan, torch.get_num_threads())
        peak.join(best)
        return rows
    except Exception as error:
        if not clock.cuda:
            raise
        console.print(f"stopped at {group.name}: {case.name}: {type(error).__name__}: {error}")
        return None
    finally:
        console.step(f"{group.name}: {case.name}", advance=1)


def _rows_and_peak(
    part: Part, group: Group, case: Any, plan: Plan, threads: int
) -> tuple[list[Row], dict[torch.dtype, float]]:
    torch.set_num_threads(threads)
    clock = Clock(plan.device)
    peak = Peak(clock, plan.device)
    work = part.work(case, plan.device, plan.excluded)
    return list(measure_case(work, group, plan, clock, peak)), peak.best


if __name__ == "__main__":
    raise SystemExit(main())
