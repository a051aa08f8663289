"""Peak memory of one call, in a process of its own: `python -m saccade.benchmarks.memory` with a task.

The peak is the highest resident size while the call runs, less the size just before, with the inputs there:
what the call itself takes, results included. On a GPU it is the allocator's own peak, in the same sense.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import saccade
import torch

from .cases import FORWARD, TRAIN, Case, square
from .peers import PROVIDERS, Inputs

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def tasks(only: str = "") -> list[tuple[Case, str, str]]:
    """(case, direction, provider): what the memory table shows, of the cases with `only` in their name."""
    long = square("window128-n32768", 32768, heads=4, heads_k=4, window=(128, 128))
    found = [(replace(long, name=f"{long.name}-{d}", dtype=d), TRAIN, "saccade") for d in ("fp32", "bf16")]
    window = square("window128-n8192", 8192, heads=4, heads_k=4, window=(128, 128))
    causal = square("causal-n8192", 8192, heads=4, heads_k=4, causal=True)
    dropout = square("dropout-n2048", 2048, heads=4, heads_k=4, dropout_p=0.1)
    found += [(window, TRAIN, name) for name in ("saccade", "sdpa-mask")]
    found += [(causal, TRAIN, name) for name in ("saccade", "sdpa")]
    found += [(dropout, TRAIN, name) for name in ("saccade", "sdpa")]
    return [task for task in found if only in task[0].name or only in "memory"]


def measure(case: Case, direction: str, provider: str, threads: int, device: str) -> dict[str, Any]:
    """Run the task in a child; the row has `peak_mib`, `inputs_mib` (q, k, v, out, gradients) or `error`."""
    task = {
        "case": asdict(case),
        "direction": direction,
        "provider": provider,
        "threads": threads,
        "device": device,
    }
    child = subprocess.run(
        [sys.executable, "-m", "saccade.benchmarks.memory"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
    )
    row = {
        "suite": "memory",
        "group": "memory",
        **case.describe(),
        "direction": direction,
        "provider": provider,
    }
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        return row | {"error": lines[-1] if lines else f"the process ended with {child.returncode}"}
    return row | json.loads(child.stdout.splitlines()[-1])


def _resident(field: str) -> int:
    """VmRSS or VmHWM in bytes; elsewhere the highest resident size so far."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _forget_peak() -> None:
    """Let VmHWM count from now on, where the system can."""
    try:
        _RESET.write_text("5")
    except OSError:
        pass


def peak_of(call: Any, device: str) -> int:
    """Bytes a call takes at its worst moment, over what was there before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _forget_peak()
    before = _resident("VmRSS")
    result = call()
    after = max(_resident("VmHWM"), before)
    del result
    return after - before


def _child(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(task["threads"])
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in task["case"].items()}
    case, direction, device = Case(**lists), task["direction"], task["device"]
    offer = PROVIDERS[task["provider"]].offer
    # Libraries load and threads start on a small call of the same kind.
    lengths = tuple(min(n, 256) for n in case.lengths) if case.lengths else None
    small = Inputs.of(replace(case, seqlen_q=256, seqlen_k=256, lengths=lengths), device)
    if task["provider"] == "saccade" and saccade.explain(small.q, small.k, small.v).backend == "reference":
        return {"absent": "only the reference backend is here, which holds every weight"}
    inputs = Inputs.of(case, device)
    for warm in (offer(small, direction), offer(small, FORWARD)):
        if not isinstance(warm, str):
            warm()
    call = offer(inputs, direction)
    if isinstance(call, str):
        return {"absent": call}
    return {"peak_mib": peak_of(call, device) / 2**20, "inputs_mib": inputs.nbytes() / 2**20}


if __name__ == "__main__":
    print(json.dumps(_child(json.load(sys.stdin))))
