"""LoRA by PEFT, on torch's MultiheadAttention and on a Hugging Face model, before and after `accelerate`."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="peft is not installed")

E, H = 32, 4
X = torch.randn(2, 9, E, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(E, H, batch_first=True)
        self.head = nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x, x, x, need_weights=False)[0])


def llama() -> Any:
    transformers = pytest.importorskip(
        "transformers", minversion="5.0", reason="transformers is not installed"
    )
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=E, num_hidden_layers=2, num_attention_heads=H, num_key_value_heads=2,
        intermediate_size=64, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def make(kind: str) -> tuple[Any, dict[str, Any], Any]:
    """A model, what LoRA aims at, and its output."""
    torch.manual_seed(0)
    if kind == "mha":
        return Model(), {"target_modules": ["attn"]}, lambda model: model(X)
    aims = {"target_modules": ["q_proj", "v_proj"]}
    return llama(), aims, lambda model: model(IDS, attention_mask=torch.ones_like(IDS)).logits


def train(model: Any, run: Any, steps: int = 4) -> list[Tensor]:
    """Outputs before and between steps of the parameters that train."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = []
    for _ in range(steps):
        out = run(model)
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(out.detach())
    return found


def adapted(model: Any, aims: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **aims))
    torch.manual_seed(2)
    for name, p in lora.named_parameters():
        if "lora_B" in name:  # as after some training: LoRA starts at zero
            nn.init.normal_(p, std=0.1)
    return lora.eval()


@pytest.mark.parametrize("order", ["adapted first", "accelerated first"])
@pytest.mark.parametrize("kind", ["mha", "llama"])
def test_lora_trains_the_same(kind: str, order: str) -> None:
    model, aims, run = make(kind)
    plain = adapted(model, aims)
    keys, expected = list(plain.state_dict()), train(plain, run)
    model, _, _ = make(kind)
    if order == "accelerated first":
        report = saccade.accelerate(model)
    lora = adapted(model, aims)
    if order == "adapted first":
        report = saccade.accelerate(lora)
    assert len(report.swapped) == 1 and not report.skipped, report
    assert list(lora.state_dict()) == keys
    for out, old in zip(train(lora, run), expected, strict=True):
        torch.testing.assert_close(out, old, rtol=1e-4, atol=1e-5)
    last = run(lora).detach()
    assert (last - expected[0]).abs().max() > 1e-3  # it did train
    with lora.disable_adapter():
        assert (run(lora) - last).abs().max() > 1e-3
    assert len(saccade.restore(lora)) == 1
    torch.testing.assert_close(run(lora), last, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(lora.merge_and_unload()), last, rtol=1e-4, atol=1e-5)
