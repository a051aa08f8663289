"""The graph Transformer example: its data, that it learns, what a run leaves behind."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from example import EXAMPLES, program

FOLDER = EXAMPLES / "graph_transformer"
pytest.importorskip("networkx", reason="networkx is not installed")


def test_the_club_is_divided_as_it_was(run) -> None:
    club = run.karate()
    assert (club.graph.num_keys, club.graph.num_edges) == (34, 2 * 78 + 34)
    assert int(club.train.sum()) == 2 and int(club.y.sum()) == 17
    _, losses, right = run.train_nodes(club, 25)
    assert losses[-1] < 0.2 * losses[0] and right > 0.85


def test_blocks_and_molecules_are_learnt(run) -> None:
    data = run.blocks(size=300)
    _, losses, right = run.train_nodes(data, 20)
    assert losses[-1] < 0.5 * losses[0] and right > 0.5  # a quarter by chance
    some = run.molecules(40, 3)
    assert {m.y for m in some} == {0, 1}
    odd = torch.tensor([bool(m.x[:, run.ATOMS + 4].any()) for m in some])  # back after five steps
    assert torch.equal(odd, torch.tensor([m.y == 0 for m in some]))


def test_molecules_of_a_batch_do_not_mix(run) -> None:
    some = run.molecules(5, 0)
    joint = run.batch(some)
    model = run.GraphClassifier(run.ATOMS + run.WALK, 2, edge_dim=2).eval()
    together = model(joint.x, joint.graph, joint.bonds, joint.of, 5)
    for n, m in enumerate(some):
        alone = run.batch([m])
        found = model(alone.x, alone.graph, alone.bonds, alone.of, 1)
        torch.testing.assert_close(found[0], together[n], rtol=1e-4, atol=1e-5)


def test_a_short_run_leaves_losses_and_picture(tmp_path: Path) -> None:
    result = program(FOLDER, "--steps", "2", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for part in ("karate club: 34 nodes", "block model: 4000 nodes", "molecules: 256", "right"):
        assert part in result.stdout
    with (tmp_path / "training.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    pytest.importorskip("matplotlib")
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_bad_steps() -> None:
    result = program(FOLDER, "--steps", "0")
    assert result.returncode == 2 and "at least 1" in result.stderr
