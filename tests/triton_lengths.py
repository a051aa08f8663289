"""How many kernels calls of many lengths compile: prints {case: {kernel: how many}}.

python tests/triton_lengths.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from saccade.kernels import call as calls
from saccade.kernels import decode, launch
from saccade.kernels.weights import weights
from saccade.maskbase import UNBOUNDED
from triton_ahead import compiling

LENGTHS = (130, 131, 1, 17, 64, 200, 1024)


def empty(*shape: int, kind: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=kind, device="meta")


def launches(case: str, n: int) -> None:
    """One call with sequences of n."""
    q = empty(2, 4, n, 64)
    rest: list[Any] = [None] * 17
    numbers = [[], [UNBOUNDED, 0, UNBOUNDED, UNBOUNDED], [], 0, 0, 0, 0, 0.125, 0.0, 0.0, 0.0, 0]
    call = calls.Call(*[q, q, q, *rest, *numbers])  # type: ignore[arg-type]
    lse = empty(2, 4, n, kind=torch.float64)
    if case == "cache":
        call = replace(call, q=empty(2, 4, 1, 64), seqused_k=empty(2, kind=torch.int64), max_q=1, max_k=n)
        pages, table = empty(9, 4, 16, 64), empty(2, n, kind=torch.int32)
        for change in ({"beam": table}, {"page_table": table, "k": pages, "v": pages}):
            decode.forward(replace(call, **change), empty(2, 4, 1, 64), empty(2, 4, 1, kind=torch.float64))
        return
    if case == "padding":
        ids = empty(2, n, kind=torch.int32)
        call = replace(call, keep=empty(2, n, kind=torch.bool), q_ids=ids, k_ids=ids)
    launch.forward(call, torch.empty_like(q), lse)
    grads = (*(torch.empty_like(q) for _ in range(3)), *[empty(0)] * 5)
    launch.backward(call, torch.empty_like(q), lse, torch.empty_like(q), lse, grads, 7)
    weights(call, lse, empty(2, 4, n, n), False)


def main() -> None:
    calls.architecture = decode.architecture = lambda device: "sm90"
    counts: dict[str, dict[str, int]] = {}
    for case in ("plain", "padding", "cache"):
        with compiling(90) as found:
            for n in LENGTHS:
                launches(case, n)
        kernels = {name: {id(k) for other, k in found if other == name} for name, _ in found}
        counts[case] = {name: len(k) for name, k in kernels.items()}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
