"""The language-model example: the swap changes neither weights nor losses; a run leaves its results."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import saccade
import torch

FOLDER = Path(__file__).parents[1] / "examples/language_model"


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import model
    import variants

    monkeypatch.setattr(model, "CONTEXT", 64)
    monkeypatch.setattr(variants, "CONTEXT", 64)
    monkeypatch.setattr(variants, "WINDOW", 16)
    yield variants
    for name in ("model", "variants"):
        sys.modules.pop(name)


@pytest.mark.parametrize("kind", ["full", "causal", "windowed"])
def test_the_swap_changes_nothing_but_the_kernels(variants, kind: str) -> None:
    theirs, ours = variants.build(kind), variants.build(f"{kind}-saccade")
    assert all(type(block.attention) is torch.nn.MultiheadAttention for block in theirs.blocks)
    assert all(type(block.attention) is saccade.nn.MultiheadAttention for block in ours.blocks)
    for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    losses = [[loss for loss, _ in variants.train(m, 4)] for m in (theirs, ours)]
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=0)


def test_kinds_differ(variants) -> None:
    """A window that sees everything would be no comparison."""
    text = torch.arange(64)[None]
    with torch.no_grad():
        full, causal, windowed = (
            variants.build(f"{kind}-saccade")(text) for kind in ("full", "causal", "windowed")
        )
    torch.testing.assert_close(full, causal, rtol=1e-4, atol=1e-5)
    assert torch.allclose(full[:, :16], windowed[:, :16], atol=1e-4) and not torch.allclose(
        full, windowed, atol=1e-4
    )


def test_a_short_run_leaves_table_and_picture(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(FOLDER / "run.py"),
        "--steps",
        "1",
        "--kinds",
        "windowed",
        "--out",
        str(tmp_path),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for part in ("windowed", "torch ms", "saccade ms", "MiB", "loss"):
        assert part in result.stdout
    with (tmp_path / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(float(row["peak_mib"]) > 1 and float(row["seconds"]) > 0 for row in rows)
    for torchs, ours in zip(rows[::2], rows[1::2], strict=True):
        assert (torchs["implementation"], ours["implementation"]) == ("torch", "saccade")
        assert float(torchs["loss"]) == pytest.approx(float(ours["loss"]), rel=1e-5)
    pytest.importorskip("matplotlib")
    assert (tmp_path / "training.png").stat().st_size > 1000


def test_bad_steps() -> None:
    result = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "--steps", "0"], capture_output=True, text=True
    )
    assert result.returncode == 2 and "at least 1" in result.stderr
