"""The command line: `python -m saccade doctor` and `python -m saccade bench`."""

from __future__ import annotations

import sys
from importlib import import_module

USAGE = """usage: python -m saccade COMMAND

  doctor   what is installed, what runs on this machine, and a self-check
  bench    time attention beside its peers (bench --help: its options)

  --version   the version of the package
"""


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    if arguments in (["-h"], ["--help"], ["doctor", "-h"], ["doctor", "--help"]):
        print(USAGE, end="")
        return 0
    if arguments == ["--version"]:
        print(f"saccade {import_module('saccade').__version__}")
        return 0
    command, *rest = arguments or [""]
    if command == "doctor" and not rest:
        return int(import_module("saccade.doctor").doctor())
    if command == "bench":
        return int(import_module("saccade.benchmarks.cli").main(rest))
    wrong = f"unknown arguments: {' '.join(arguments)}" if arguments else "a command is missing"
    print(f"saccade: {wrong}\n\n{USAGE}", end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
