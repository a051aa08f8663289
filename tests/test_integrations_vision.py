"""timm's and torchvision's models after `saccade.accelerate`: the same results, keys and gradients.

Random weights, small images. Each library's tests skip by name where it is absent.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import saccade
import torch
from saccade.integrations import direct
from torch import Tensor, nn

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def library(name: str) -> Any:
    try:  # a release may not load beside a later torch
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} is not installed, or does not load: {error}")


def timm_model(name: str, **options: Any) -> Any:
    timm = library("timm")
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **options)


def torchvision_model(**options: Any) -> Any:
    torchvision = library("torchvision")
    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 32}
    return torchvision.models.VisionTransformer(**sizes, mlp_dim=64, num_classes=5, **options)


VIT = {"img_size": 64, "depth": 2, "num_classes": 5}
# What each of them is here for, and its number of attention modules.
MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "timm vit": (lambda: timm_model("vit_tiny_patch16_224", **VIT), 2),
    "timm vit, qk norm, parallel blocks": (
        lambda: timm_model("vit_small_patch16_18x2_224", **VIT | {"depth": 1, "qk_norm": True}), 2),
    "timm vit, attention pooling": (
        lambda: timm_model("vit_base_patch16_siglip_224", **VIT | {"embed_dim": 64, "num_heads": 2}), 3),
    "timm swin, a bias per window": (
        lambda: timm_model("swin_tiny_patch4_window7_224", img_size=64, depths=(2, 2), num_heads=(2, 4),
                           embed_dim=32, window_size=4), 4),
    "timm beit, relative positions": (
        lambda: timm_model("beit_base_patch16_224", **VIT | {"embed_dim": 64, "num_heads": 2}), 2),
    "timm eva, rotary positions": (
        lambda: timm_model("eva02_tiny_patch14_224", img_size=56, depth=2, num_classes=5), 2),
    "torchvision vit": (torchvision_model, 2),
}  # fmt: skip


def result(model: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    image = IMAGE[..., :56, :56] if "eva" in type(model).__name__.lower() else IMAGE
    out = model(image)
    out.square().mean().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", MODELS)
def test_results_gradients_and_keys_stay(name: str) -> None:
    make, count = MODELS[name]
    model = make().eval()
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    classes = [type(m) for m in model.modules()]
    expected = result(model)
    report = saccade.accelerate(model)
    assert len(report.swapped) == count and not report.skipped, report
    out, grads = result(model)
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
    for grad, old in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(grad, old, rtol=1e-3, atol=1e-5)
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    assert saccade.restore(model) == report.swapped and [type(m) for m in model.modules()] == classes
    assert torch.equal(result(model)[0], expected[0])


def test_timm_runs_on_saccade(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = timm_model("vit_tiny_patch16_224", **VIT).eval(), []
    saccade.accelerate(model)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return saccade.scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(direct, "scaled_dot_product_attention", run)
    with torch.no_grad():
        model(IMAGE)
    assert len(calls) == 2


def test_torchvision_runs_on_saccade(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = torchvision_model().eval(), []
    saccade.accelerate(model)
    forward = saccade.nn.MultiheadAttention.forward

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(saccade.nn.MultiheadAttention, "forward", run)
    with torch.no_grad():
        model(IMAGE)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["timm vit", "torchvision vit"])
def test_training_and_compile(name: str) -> None:
    model = MODELS[name][0]().train()
    saccade.accelerate(model)
    optimizer, target = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.tensor([1, 3])
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(IMAGE), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-5)
