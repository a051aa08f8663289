"""`python -m saccade`: each command in a process of its own, with and without what it can use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import saccade
from saccade import ops

needs_library = pytest.mark.skipif(not ops.LOADED, reason="the operator library is not built")


def call(*arguments: str, code: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    command = ["-c", code] if code else ["-m", "saccade"]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


@needs_library
def test_doctor_finds_a_whole_installation() -> None:
    result = call("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    for part in ("torch ", "instruction set", "in use", "reference", "cpu bfloat16", "everything works"):
        assert part in result.stdout
    assert "!" not in result.stdout


@pytest.mark.parametrize(
    ("content", "why"), [(None, "is missing: no file"), ("not a library", "does not load")]
)
def test_doctor_says_what_to_do_without_the_library(tmp_path: Path, content: str | None, why: str) -> None:
    library = tmp_path / "ops.so"
    if content is not None:
        library.write_text(content)
    result = call("doctor", SACCADE_OPS_LIBRARY=str(library))
    assert result.returncode == 1
    assert f"the operator library {why}" in result.stdout and "pip install -v" in result.stdout
    assert "agrees with the reference" in result.stdout
    assert result.stderr.count("UserWarning") == 1 and why in result.stderr
    if content is not None:
        assert "invalid ELF header" in result.stdout or "file too short" in result.stdout


@needs_library
def test_doctor_uses_the_instruction_set_it_is_told() -> None:
    result = call("doctor", SACCADE_CPU_ISA="portable")
    assert result.returncode == 0 and "portable in use (SACCADE_CPU_ISA)" in result.stdout
    result = call("doctor", SACCADE_CPU_ISA="mmx")
    assert result.returncode == 1
    assert "! instruction set" in result.stdout and "mmx cannot run here" in result.stdout


@needs_library
def test_doctor_notices_a_wrong_kernel() -> None:
    code = (
        "from saccade.backends import cpu\n"
        "run = cpu.run\n"
        "cpu.run = lambda problem: tuple(1.01 * x for x in run(problem))\n"
        "from saccade.doctor import doctor\n"
        "raise SystemExit(doctor())"
    )
    result = call(code=code)
    assert result.returncode == 1 and "! cpu float32" in result.stdout and "differs from" in result.stdout


def test_bench_works_without_rich_and_matplotlib(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['rich'] = sys.modules['rich.console'] = sys.modules['matplotlib'] = None\n"
        "from saccade.__main__ import main\n"
        "options = ['--quick', '--only', 'molecules', '--threads', '1']\n"
        f"raise SystemExit(main(['bench', *options, '--out', {str(tmp_path)!r}]))"
    )
    result = call(code=code)
    assert result.returncode == 0, result.stderr
    assert "molecules-23  fwd+bwd" in result.stdout and "[0/1]" in result.stderr
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".json"}


@pytest.mark.parametrize(
    ("arguments", "status"),
    [((), 2), (("nonsense",), 2), (("doctor", "x"), 2), (("--help",), 0), (("doctor", "--help"), 0)],
)
def test_usage(arguments: tuple[str, ...], status: int) -> None:
    result = call(*arguments)
    assert result.returncode == status
    assert "python -m saccade COMMAND" in (result.stderr if status else result.stdout)
    if arguments and status:
        assert " ".join(arguments) in result.stderr


def test_version() -> None:
    assert call("--version").stdout == f"saccade {saccade.__version__}\n"
