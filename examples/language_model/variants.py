"""The models that are compared, and the process that trains one of them.

Each runs in a process of its own, so that the peak memory is its own, and takes a step for every line it
reads, so that two of them can take turns.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import saccade
import torch
from model import CONTEXT, HEADS, WIDTH, WINDOW, LanguageModel, train
from torch import Tensor


def causal_mask() -> Tensor:
    """The dense mask of torch's tutorials: -inf above the diagonal."""
    return torch.nn.Transformer.generate_square_subsequent_mask(CONTEXT)


def banded_mask() -> Tensor:
    """True where torch's module must not look: above the diagonal, and WINDOW or more below it."""
    ones = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool)
    return ones.triu(1) | ones.tril(-WINDOW)


def windowed_attention() -> torch.nn.Module:
    return saccade.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, window=(WINDOW - 1, 0))


def build(name: str) -> LanguageModel:
    """`full`, `causal` or `windowed`, with torch's attention; or the same name with `-saccade`."""
    kind, _, ours = name.partition("-")
    torch.manual_seed(0)
    if kind == "full":  # a dense mask: every pair is computed, then masked
        model = LanguageModel(masks={"attn_mask": causal_mask()})
    elif kind == "causal":  # the same with torch's hint, which lets it skip what the mask hides
        model = LanguageModel(masks={"attn_mask": causal_mask(), "is_causal": True})
    elif ours:
        return LanguageModel(windowed_attention)
    else:
        return LanguageModel(masks={"attn_mask": banded_mask()})
    if ours:
        saccade.accelerate(model)
    return model


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB; elsewhere the highest resident size."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main(name: str, steps: int) -> None:
    """Train; print a JSON line for every step and one with the peak of memory over what torch alone takes."""
    before = resident("VmRSS")
    training = train(build(name), steps)
    for _ in range(steps):
        sys.stdin.readline()
        loss, seconds = next(training)
        print(json.dumps({"loss": loss, "seconds": seconds}), flush=True)
    print(json.dumps({"peak_mib": resident("VmHWM") - before}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
