"""What the numbers were measured on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from saccade import ops


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, with x86's family and model where the system tells: a virtual machine's name may be that of
    several generations (EPYC: family 25 is Zen 3 and 4, 26 is Zen 5).
    """
    try:
        first = cpuinfo.read_text().partition("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    told = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in first.splitlines())}
    name = told.get("model name", platform.machine())
    if "cpu family" not in told:
        return name
    return f"{name} (family {told['cpu family']}, model {told.get('model', 'unknown')})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The checkout's commit, with `+` when files differ from it; empty outside one."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return ""
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def instruction_sets() -> list[str]:
    """The set the CPU kernels use, then every one that can run here; empty without the library."""
    return torch.ops.saccade.cpu_isa("").split() if ops.LOADED else []


def facts(device: str) -> dict[str, object]:
    """Processor, threads, instruction set, versions, commit, date: what a result file must say."""
    sets = instruction_sets()
    found: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": sets[0] if sets else "none: operator library not built",
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "saccade": _version("saccade"),
        "commit": commit(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
        }
    return found
