"""How the examples are tested: imported from their folder, and run as the programs they are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> Iterator[ModuleType]:
    """The module `run` of the example in the test module's FOLDER; what it imports beside it can be imported
    too. One thread: on a busy machine, threads of steps of microseconds wait for each other.
    """
    monkeypatch.syspath_prepend(str(request.module.FOLDER))
    monkeypatch.setattr(sys, "path", [*sys.path, str(EXAMPLES)])
    forget()
    import run

    yield run
    forget()


def forget() -> None:
    """Drop every imported module of an example: their names repeat."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(EXAMPLES)):
            del sys.modules[name]


def program(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The example's program run with these arguments, on one thread."""
    command = [sys.executable, str(folder / "run.py"), *arguments]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=alone)
