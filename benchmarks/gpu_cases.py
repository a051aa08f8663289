"""What is measured on a GPU: 16,384 tokens of a model 2048 wide at every length, windows, few queries over
long caches, graphs from small to larger than any cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from saccade.graph import Graph

from .cases import BACKWARD, FORWARD, TRAIN, Case, Group, square
from .graph_cases import GraphCase

_TOKENS, _WIDTH = 16384, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_PASSES = (FORWARD, BACKWARD)
# Useful TFLOP/s forward / backward at 8,192 to 16,384, bf16, on an H100 or H200: what torch reaches, what is
# good, the best published.
_WANTED = {
    (128, True): "335 / 300, 550 / 480, 673 / 579",
    (128, False): "370 / 320, 600 / 500, 702 / 612",
    (64, True): "299 / -, 420 / -, 473 / -",
    (64, False): "324 / 291, 440 / 420, 497 / 474",
    (256, False): "326 / -, 600 / 400, 756 / 530",
}


def _note(wanted: str | None) -> str:
    return f"TFLOP/s forward / backward that torch reaches, good, best published: {wanted}" if wanted else ""


def tiled() -> list[Group]:
    """What matters most comes first: a run may have to end early."""
    return [*_squares(128), *_squares(64), _windows(), _decode(), *_squares(256), _grouped()]


def _squares(dim: int) -> list[Group]:
    groups = []
    for causal in (True, False):
        kind = "causal" if causal else "full"
        cases = tuple(
            square(
                f"d{dim}-{kind}-n{n}", n, batch=max(1, _TOKENS // n), heads=_WIDTH // dim,
                heads_k=_WIDTH // dim, dtype="bf16", causal=causal, head_dim=dim, head_dim_v=dim,
                directions=_PASSES, flex=n == 8192,
            )
            for n in LENGTHS
        )  # fmt: skip
        others: dict[str, dict[str, float]] = {"sdpa-cudnn": {}, "sdpa-flash": {}}
        note = _note(_WANTED.get((dim, causal)))
        groups.append(Group(f"d{dim} {kind}", cases, "sdpa", others=others, note=note))
    return groups


def _windows() -> Group:
    """A window of 1024 keys; the same call without it says how much of the ideal 16 or so it gains."""
    base = square("", 2048, heads=32, heads_k=32, dtype="bf16", causal=True, directions=_PASSES)
    cases = [
        replace(base, name=f"window1024-n{n}", batch=max(1, _TOKENS // n), seqlen_q=n, seqlen_k=n,
                window=(1023, 0), flex=True)
        for n in (2048, 8192, 32768)
    ]  # fmt: skip
    cases.append(replace(cases[-1], name="its causal n32768", window=None, flex=False))
    note = _note("-, 300 / 220, 358 / 299") + "; speed-up over its causal: good 8, best 12 to 13"
    return Group("d64 window", tuple(cases), "flex", others={"sdpa": {}}, note=note)


def _decode() -> Group:
    """Bound by the reading of keys and values: an H200 has 4.8 TB/s by its data sheet."""
    sizes = ((1, 4096), (1, 131072), (16, 8192), (64, 8192))
    cases = tuple(
        Case(
            f"decode-b{batch}-n{n}", batch=batch, heads=32, heads_k=8, seqlen_q=1, seqlen_k=n, head_dim=128,
            head_dim_v=128, dtype="bf16", directions=(FORWARD,),
        )
        for batch, n in sizes
    )  # fmt: skip
    return Group(
        "decode", cases, "sdpa", note="GB/s of keys and values = GFLOP/s / 4 (four heads share each)"
    )


def _grouped() -> Group:
    cases = tuple(
        square(
            f"gqa-{'causal' if causal else 'full'}-n{n}", n, heads=64, heads_k=8, dtype="bf16", causal=causal,
            head_dim=128, head_dim_v=128, directions=_PASSES,
        )
        for causal in (True, False)
        for n in (8192, 16384)
    )  # fmt: skip
    best = "TFLOP/s, best published: causal 644 / 541 and 673 / 579, full 691 / 594 and 702 / 612"
    return Group("d128, 64 heads over 8", cases, "sdpa", others={"sdpa-cudnn": {}}, note=best)


@dataclass(frozen=True)
class LargeGraphCase(GraphCase):
    """As many nodes and edges as a known data set, the edges by a power law."""

    nodes: int = 0

    def graph(self) -> Graph:
        return _power_law(self.nodes, self.edges)


@lru_cache(maxsize=1)
def _power_law(nodes: int, edges: int) -> Graph:
    """Made on the GPU, where there is one. Not every form is built: tiles of these would fill its memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)
    # A Zipf law of exponent 1/3: the share of nodes up to x is (x / n)^(2/3). Few edges stand twice.
    ends = (
        (nodes * torch.rand(edges, generator=draw, device=device).double() ** 1.5).long().clamp(max=nodes - 1)
    )
    targets = torch.randperm(nodes, generator=draw, device=device)[ends]
    sources = torch.randint(nodes, (edges,), generator=draw, device=device)
    pairs = torch.unique(targets * nodes + sources)
    indptr = torch.searchsorted(pairs, torch.arange(nodes + 1, device=device) * nodes)
    return Graph.from_csr(indptr, pairs % nodes, nodes)


def large_graphs() -> list[Group]:
    """Small ones are bound by launches, large ones by memory."""
    small = (
        LargeGraphCase("cora-like-h1-d128", "power-law", 10_556, 1, 128, "bf16", nodes=2_708),
        GraphCase("molecules-1024-h1-d128", "molecules", 1024 * 46, 1, 128, "bf16"),
        GraphCase("grid-1m-h4-d64", "grid", 1_000_000, 4, 64, "bf16"),
        GraphCase("power-law-1m-h8-d16", "power-law", 1_000_000, 8, 16, "bf16"),
    )
    large = (
        LargeGraphCase(
            "reddit-like-h1-d128", "power-law", 114_615_892, 1, 128, "bf16", (FORWARD, TRAIN), 232_965
        ),
        LargeGraphCase(
            "products-like-h1-d128", "power-law", 123_718_280, 1, 128, "bf16", (FORWARD,), 2_449_029
        ),
    )
    others: dict[str, dict[str, float]] = {"gather": {FORWARD: 1 / 1.3}, "traffic": {}}
    milliseconds = "milliseconds forward, good and best published: "
    return [
        Group("small graphs", small, "pyg", others=others,  # type: ignore[arg-type]
              note=milliseconds + "cora .05 and .019, molecules .06 and .024"),
        Group("large graphs", large, "pyg", others=others,  # type: ignore[arg-type]
              note=milliseconds + "reddit 13 and 9.2, products 32 and 25.3"),
    ]  # fmt: skip
