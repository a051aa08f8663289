"""torchaudio's Conformer after `saccade.accelerate`. Skips where torchaudio is absent or does not load."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from torch import Tensor

try:  # a release may not load beside a later torch
    import torchaudio
except Exception as error:
    pytest.skip(f"torchaudio is not installed, or does not load: {error}", allow_module_level=True)

LENGTHS = torch.tensor([20, 13])
SOUND = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(1))


def conformer() -> Any:
    torch.manual_seed(0)
    sizes = {"input_dim": 16, "num_heads": 4, "ffn_dim": 32, "num_layers": 2}
    return torchaudio.models.Conformer(**sizes, depthwise_conv_kernel_size=7)


def result(model: Any) -> tuple[Tensor, list[Tensor]]:
    """At the frames that are there, and the gradients."""
    model.zero_grad()
    out, lengths = model(SOUND, LENGTHS)
    out = out[torch.arange(20) < lengths[:, None]]
    out.square().mean().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("training", [False, True])
def test_the_conformer_gives_the_same(training: bool) -> None:
    model = conformer().train(training)
    keys, expected = list(model.state_dict()), result(model)
    report = saccade.accelerate(model)
    assert report.swapped == [f"conformer_layers.{n}.self_attn" for n in range(2)] and not report.skipped
    out, grads = result(model)
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
    for grad, old in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(grad, old, rtol=1e-3, atol=1e-5)
    assert list(model.state_dict()) == keys and saccade.restore(model) == report.swapped
    assert type(model.conformer_layers[0].self_attn) is torch.nn.MultiheadAttention
