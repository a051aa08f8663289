"""Patterns from the literature: each against its dense definition, written out pair by pair."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import saccade
import torch
from saccade import Graph, Window, patterns
from saccade.testing import Shape, check_attention, make_inputs

Rule = Callable[[int, int], bool]


def dense(seqlen: int, rule: Rule) -> torch.Tensor:
    rows = [[rule(i, j) for j in range(seqlen)] for i in range(seqlen)]
    return torch.tensor(rows, dtype=torch.bool).reshape(seqlen, seqlen)


def gapped(window: int, dilation: int) -> Rule:
    return lambda i, j: abs(i - j) <= window * dilation and (i - j) % dilation == 0


def grid_rule(width: int, down: int, across: int, dilation: int) -> Rule:
    rows, columns = gapped(down, dilation), gapped(across, dilation)
    return lambda i, j: rows(i // width, j // width) and columns(i % width, j % width)


def bigbird_rule(seqlen: int, block: int, window: int, first: int, others: int, seed: int) -> Rule:
    count, draw = -(-seqlen // block), random.Random(seed)

    def near(a: int, b: int) -> bool:
        return abs(a - b) <= window // 2 or a < first or b < first

    chosen: dict[int, list[int]] = {}
    for a in range(first, count):
        free = [b for b in range(count) if not near(a, b)]
        chosen[a] = draw.sample(free, min(others, len(free)))
    return lambda i, j: near(i // block, j // block) or j // block in chosen.get(i // block, ())


CASES: list[tuple[str, Any, int, Rule]] = []
for n in (0, 1, 7, 64, 131):
    for stride in (1, 4, 200, 10**30):
        causal_rule: Rule = lambda i, j, s=stride: j <= i and (i - j < s or (i - j) % s == 0)  # noqa: E731
        both_rule: Rule = lambda i, j, s=stride: abs(i - j) < s or (i - j) % s == 0  # noqa: E731
        CASES += [
            (f"strided-{n}-{stride}", patterns.strided(n, stride), n, causal_rule),
            (f"strided-{n}-{stride}-both", patterns.strided(n, stride, causal=False), n, both_rule),
        ]
    for window, dilation in ((0, 1), (3, 1), (2, 3), (500, 2), (0, 5), (2, 10**30)):
        rule = gapped(window, dilation)
        causal_gapped: Rule = lambda i, j, r=rule: j <= i and r(i, j)  # noqa: E731
        name = f"{n}-{window}-{dilation}"
        CASES += [
            (f"dilated-{name}", patterns.dilated(n, window, dilation), n, rule),
            (f"dilated-{name}-causal", patterns.dilated(n, window, dilation, causal=True), n, causal_gapped),
            (f"longformer-{name}", patterns.longformer(n, window, dilation=dilation), n, rule),
        ]
    tokens = sorted({0, n // 2, n - 1} & set(range(n)))
    with_tokens: Rule = lambda i, j, t=tuple(tokens): abs(i - j) <= 4 or i in t or j in t  # noqa: E731
    CASES.append((f"longformer-{n}-global", patterns.longformer(n, 4, [*tokens, *tokens]), n, with_tokens))
for n, block, window, first, others in ((0, 4, 3, 1, 3), (1, 4, 3, 1, 3), (30, 4, 3, 2, 0), (130, 8, 5, 1, 3),
                                        (67, 1, 1, 0, 2), (64, 16, 3, 9, 3), (50, 100, 3, 1, 3),
                                        (50, 10**30, 3, 1, 3)):  # fmt: skip
    made = patterns.bigbird(
        n, block, num_window_blocks=window, num_global_blocks=first, num_random_blocks=others, seed=5
    )
    rule = bigbird_rule(n, block, window, first, others, 5)
    CASES.append((f"bigbird-{n}-{block}-{window}-{first}-{others}", made, n, rule))
for height, width, radius, dilation in ((0, 5, 1, 1), (1, 1, 3, 1), (5, 9, 1, 1), (9, 5, (0, 2), 1),
                                        (8, 7, 2, 2), (4, 4, 50, 1), (4, 4, 1, 10**30)):  # fmt: skip
    down, across = radius if isinstance(radius, tuple) else (radius, radius)
    rule = grid_rule(max(width, 1), down, across, dilation)
    before: Rule = lambda i, j, r=rule: j <= i and r(i, j)  # noqa: E731
    name, n = f"grid2d-{height}x{width}-{radius}-{dilation}", height * width
    CASES += [
        (name, patterns.grid2d(height, width, radius, dilation=dilation), n, rule),
        (name + "-causal", patterns.grid2d(height, width, radius, dilation=dilation, causal=True), n, before),
    ]


@pytest.mark.parametrize(("mask", "seqlen", "rule"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_equals_its_dense_definition(mask: saccade.Mask, seqlen: int, rule: Rule) -> None:
    expected = dense(seqlen, rule)
    assert torch.equal(mask.materialize(seqlen, seqlen), expected)
    if isinstance(mask, Graph):
        assert mask.num_edges == int(expected.sum()) and not mask.has_repeats and mask.edge_ids is None
        assert torch.equal(mask.indices, expected.nonzero()[:, 1].int())


def test_bands_stay_bands() -> None:
    assert isinstance(patterns.dilated(100, 5), Window)
    assert isinstance(patterns.longformer(100, 5), Window)
    assert isinstance(patterns.longformer(100, 5, [3]), Graph)


@pytest.mark.parametrize(
    "mask",
    [
        patterns.strided(70, 8),
        patterns.dilated(70, 3, 4),
        patterns.longformer(70, 5, [0, 40]),
        patterns.bigbird(70, 8),
        patterns.grid2d(7, 10, 1),
        patterns.longformer(70, 5, [0]) & saccade.Causal(),
    ],
    ids=repr,
)
def test_attention_with_a_pattern(mask: saccade.Mask, backend: str) -> None:
    check_attention(make_inputs(Shape(1, 2, 2, 70, 70)), mask, backend)


def test_building_follows_the_kept_pairs() -> None:
    """A length at which anything of size N x N would be 40 GB."""
    n = 200_000
    for mask, most in (
        (patterns.dilated(n, 4, 8), 9 * n),
        (patterns.longformer(n, 4, [7]), 11 * n),
        (patterns.grid2d(400, 500, 1), 9 * n),
        (patterns.bigbird(n, 2, num_global_blocks=0), 12 * n),
    ):
        assert isinstance(mask, Graph) and n < mask.num_edges <= most


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "seqlen: expected an int", lambda: patterns.strided(4.0, 2)),  # type: ignore[arg-type]
        (ValueError, "stride: expected at least 1", lambda: patterns.strided(4, 0)),
        (ValueError, "seqlen: expected at least 0", lambda: patterns.dilated(-1, 2)),
        (ValueError, "window: expected at least 0", lambda: patterns.dilated(4, -2)),
        (ValueError, "dilation: expected at least 1", lambda: patterns.longformer(4, 2, dilation=0)),
        (ValueError, "global_tokens: expected 0 <= token < 4", lambda: patterns.longformer(4, 2, [4])),
        (ValueError, "global_tokens", lambda: patterns.longformer(4, 2, [-1])),
        (ValueError, "block_size", lambda: patterns.bigbird(4, 0)),
        (ValueError, "num_random_blocks", lambda: patterns.bigbird(4, 2, num_random_blocks=-1)),
        (ValueError, "radius", lambda: patterns.grid2d(4, 4, (1, -1))),
        (TypeError, "height", lambda: patterns.grid2d(True, 4, 1)),
    ],
)
def test_bad_sizes_are_refused(error: type[Exception], message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        make()
