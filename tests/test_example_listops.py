"""The ListOps example: the language, that patterns are their masks, what a run leaves behind."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from statistics import median

import pytest
import torch
from example import EXAMPLES, program

FOLDER = EXAMPLES / "listops"


def evaluate(words: list[str]) -> int:
    """The value of a written expression, by a stack."""
    stack: list[list] = [[]]
    rules = {"[MIN": min, "[MAX": max, "[MED": lambda x: int(median(x)), "[SM": lambda x: sum(x) % 10}
    for word in words:
        if word == "]":
            operator, *arguments = stack.pop()
            stack[-1].append(rules[operator](arguments))
        elif word.startswith("["):
            stack.append([word])
        else:
            stack[-1].append(int(word))
    return stack[0][0]


def test_expressions_are_right_and_within_bounds(run) -> None:
    import data

    assert evaluate("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]".split()) == 5
    for x in [*data.expressions(150, (5, 60), 0), *data.expressions(10, data.PAPER, 1)]:
        words = data.spell(x).split()
        assert evaluate(words) == x.value
        assert words.count("]") == sum(w.startswith("[") for w in words)
    long = data.expressions(10, data.PAPER, 1)
    assert all(500 <= len(x.tokens) <= 2000 for x in long)
    assert len({tuple(x.tokens) for x in long}) == 10


def test_trees_keep_to_the_papers_sizes(run) -> None:
    import data

    draw, deepest, widest = random.Random(0), 0, 0

    def walk(node, depth: int = 1) -> int:
        nonlocal widest
        if isinstance(node, int):
            return depth
        widest = max(widest, len(node[1]))
        assert len(node[1]) >= 2
        return max(walk(x, depth + 1) for x in node[1])

    for _ in range(3000):
        deepest = max(deepest, walk(data.tree(draw)))
    assert deepest == widest == 10


def test_the_tree_joins_operators_with_their_arguments(run) -> None:
    import data

    tokens = data.TOKENS
    x = data.write(("[MAX", [4, ("[MIN", [2, 3]), 1]))  # [MAX 4 [MIN 2 3 ] 1 ]
    assert [tokens[n] for n in x.tokens] == "[MAX 4 [MIN 2 3 ] 1 ]".split()
    assert sorted(x.pairs) == [(0, 1), (0, 2), (0, 6), (0, 7), (2, 3), (2, 4), (2, 5)]
    b = data.batch([x, data.write(3)], multiple=8)
    kept = b.tree.materialize()
    expected = torch.zeros(16, 16, dtype=torch.bool)
    for i, j in [*x.pairs, *((n, n) for n in range(8)), (8, 8)]:
        expected[i, j] = expected[j, i] = True
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("pattern", ["full", "window", "bigbird", "tree"])
def test_each_pattern_is_its_dense_mask(run, pattern: str) -> None:
    import data

    b = data.batch(data.expressions(3, (20, 90), 0))
    model = run.Calculator(pattern).double().eval()
    found = model.encode(b)
    count, length = b.tokens.shape
    if pattern == "tree":
        kept = b.tree.materialize().view(count, length, count, length)
        kept = torch.stack([kept[n, :, n] for n in range(count)])
    else:
        kept = model.mask(b).materialize(length, length).expand(count, length, length)
    plain = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True, norm_first=True), 4,
        torch.nn.LayerNorm(64), enable_nested_tensor=False,
    ).double()  # fmt: skip
    plain.load_state_dict(model.encoder.state_dict())
    hidden = ~kept.repeat_interleave(4, 0)
    hidden[:, ~kept.any(0).any(-1)] = False  # torch makes NaN of rows without keys
    expected = plain(model.position(model.words(b.tokens)), mask=hidden)
    valid = ~b.padding
    torch.testing.assert_close(found[valid], expected[valid])


def test_along_the_tree_one_operator_is_learnt(run) -> None:
    some = [x for x in run.expressions(300, (4, 12), 0) if len(x.pairs) == len(x.tokens) - 1]
    model, losses = run.train("tree", some, 60)
    assert losses[-1] < 0.8 * losses[0]
    assert run.accuracy(model, some) > 0.4


def test_a_short_run_leaves_table_and_picture(tmp_path: Path) -> None:
    result = program(FOLDER, "--steps", "2", "--seen", "20", "--repeats", "1", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    with (tmp_path / "patterns.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["pattern"] for row in rows] == ["full", "window", "bigbird", "tree"]
    assert all(float(row["seconds"]) > 0 and float(row["mib"]) < 200 for row in rows)
    assert all(row["pattern"] in result.stdout for row in rows)
    pytest.importorskip("matplotlib")
    assert (tmp_path / "listops.png").stat().st_size > 10_000
