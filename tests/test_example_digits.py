"""The digits example: that its models learn, that attention is the convolution, what a run leaves behind."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from example import EXAMPLES, program

FOLDER = EXAMPLES / "digits"
pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def test_each_model_learns(run) -> None:
    images, labels = run.digits()
    assert images.shape == (1797, 1, 8, 8) and images.max() == 1 and labels.bincount().min() > 170
    for make, steps in ((run.patches, 100), (run.Pixels, 30), (run.convolutions, 60)):
        torch.manual_seed(0)
        model = make()
        losses = run.train(model, images[:400], labels[:400], "test", steps)
        assert losses[-1] < 0.6 * losses[0]
        assert run.accuracy(model, images[1400:], labels[1400:]) > 0.4  # a tenth by chance


def test_the_attention_twin_gives_the_same_logits_and_gradients(run) -> None:
    network = run.convolutions().double()
    twin = run.as_attention(network)
    assert [type(m).__name__ for m in twin[:3:2]] == ["ConvolutionalAttention"] * 2
    images = torch.rand(3, 1, 8, 8).double()
    torch.testing.assert_close(twin(images), network(images), rtol=1e-12, atol=1e-14)
    for model in (network, twin):
        model(images).square().sum().backward()
    torch.testing.assert_close(twin[0].weight.grad, network[0].weight.grad)


def test_a_short_run_leaves_losses_and_a_picture(tmp_path: Path) -> None:
    result = program(FOLDER, "--steps", "3", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for part in ("patches", "pixels", "convolutions", "as attention", "unseen digits"):
        assert part in result.stdout
    with (tmp_path / "training.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 9
    pytest.importorskip("matplotlib")
    assert (tmp_path / "digits.png").stat().st_size > 10_000
