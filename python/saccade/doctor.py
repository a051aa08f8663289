"""`python -m saccade doctor`: what is installed, what runs here, and whether it computes the right thing."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import ops, reference
from .backends import available, reasons
from .functional import attention
from .masks import Causal
from .problem import Problem
from .testing import Shape, check_attention, make_inputs

_OPTIONAL = ("triton", "torch-geometric", "rich", "matplotlib", "pytest-benchmark")
_ON_GPU = ("cuda", "triton")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def doctor() -> int:
    """Print everything; returns 0 when the machine's fast backend is there and every check passed, else 1."""
    healthy = True
    for title, section in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("compiled", _compiled()),
        ("backends", _backends()),
        ("self-check: forward and backward beside fp64", _checks()),
    ):
        print(title)
        for name, text, fine in section:
            print(f"  {name:<22} {text}")
            healthy &= fine
    print("everything works" if healthy else "something is missing or wrong: see the lines marked with !")
    return 0 if healthy else 1


Lines = Iterator[tuple[str, str, bool]]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed (optional)"


def _versions() -> Lines:
    yield "saccade", f"{_version('saccade')} in {Path(__file__).parent}", True
    yield "python", f"{platform.python_version()} ({sys.executable})", True
    yield "torch", torch.__version__, True
    for package in _OPTIONAL:
        yield package, _version(package), True


def _devices() -> Lines:
    threads, count = torch.get_num_threads(), os.cpu_count()
    yield "cpu", f"{platform.machine()}, {count} logical processors, torch uses {threads} threads", True
    if not torch.cuda.is_available():
        yield "cuda", "none that torch sees", True
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        yield f"cuda:{index}", f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {memory:.0f} GiB", True


def _compiled() -> Lines:
    if not ops.LOADED:
        yield "! operators", ops.WHY_NOT, False
    else:
        yield "operators", ops.PATH, True
        archs = ", ".join(f"sm_{arch}" for arch in ops.CUDA_ARCHS)
        yield (
            "CUDA kernels",
            f"compiled for {archs}" if archs else "not compiled (no nvcc at build time)",
            True,
        )
        yield _instruction_set()
    try:
        facts = import_module("saccade._C")
    except ImportError as error:
        yield "build facts", f"saccade._C is missing ({error}); only this page needs it", True
        return
    yield "compiler", f"{facts.compiler}, for torch {'.'.join(map(str, facts.torch_target))} and later", True
    yield "compiled sets", ", ".join(facts.instruction_sets), True
    yield "processor features", ", ".join(facts.cpu_features()) or "none asked for", True


def _instruction_set() -> tuple[str, str, bool]:
    try:
        current, *supported = torch.ops.saccade.cpu_isa("").split()
    except RuntimeError as error:  # SACCADE_CPU_ISA names none of this processor's
        return "! instruction set", str(error), False
    usable = [name for name in supported if not name.startswith("emulated")]
    forced = " (SACCADE_CPU_ISA)" if os.environ.get("SACCADE_CPU_ISA") else ""
    return "instruction set", f"{current} in use{forced}; this processor can run {', '.join(usable)}", True


def _backends() -> Lines:
    q = torch.zeros(1, 1, 2, 8)
    for name, why in reasons(Problem.of(q, q, q)).items():
        yield name, "ready" if name in available() else "; ".join(why), True


def _checks() -> Lines:
    has_gpu = torch.cuda.is_available()  # Triton's interpreter is for tests, and slow
    names = [name for name in available() if name != "reference" and (has_gpu or name not in _ON_GPU)]
    if not names:
        yield (
            "! none",
            "only the reference backend is here: correct, slow, and it keeps every weight in memory",
            False,
        )
    for name in names:
        device = "cuda" if name in _ON_GPU else "cpu"
        for dtype in _DTYPES[1:3] if name == "cuda" else _DTYPES:
            verdict, fine = _outcome(partial(_check, name, dtype, device))
            yield f"{'' if fine else '! '}{name} {str(dtype).removeprefix('torch.')}", verdict, fine
    verdict, fine = _outcome(_check_default)
    yield f"{'' if fine else '! '}default call", verdict, fine


def _outcome(check: Callable[[], str]) -> tuple[str, bool]:
    try:
        return check(), True
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", False


def _check(name: str, dtype: torch.dtype, device: str) -> str:
    shape = Shape(seqlen_q=67, seqlen_k=131, heads_k=2, head_dim=40, head_dim_v=24)
    check_attention(make_inputs(shape, dtype, device=device), Causal(), name)
    return "ok"


def _check_default() -> str:
    q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    if not torch.allclose(attention(q, q, q), reference.attention(q, q, q), atol=1e-5):
        raise AssertionError("differs from the reference")
    return "agrees with the reference"
