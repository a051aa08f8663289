"""Hugging Face models on `attn_implementation="saccade"`, compared with their own eager attention in fp32.

Tiny configurations, random weights. Skips where transformers is absent (`pip install saccade[integrations]`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import saccade
import torch
from torch import Tensor

hf = pytest.importorskip("transformers", minversion="5.0", reason="transformers is not installed")
from saccade.integrations import transformers as own  # noqa: E402
from transformers import masking_utils  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
TWO_SIDED: dict[str, Any] = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
LENGTH = 11
IDS = torch.randint(3, 99, (2, LENGTH), generator=torch.Generator().manual_seed(1))
RIGHT = (torch.arange(LENGTH) < torch.tensor([LENGTH, 8])[:, None]).long()
LEFT = RIGHT.flip(1)


def bert() -> Any:
    return hf.BertModel(hf.BertConfig(**SMALL))


def llama(**options: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED | options))


def mistral() -> Any:
    return hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=4))


def gemma2() -> Any:
    options = {"sliding_window": 4, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED | options))


def gpt_oss() -> Any:
    options = {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**GROUPED | options))


def llama4() -> Any:
    kinds = ["chunked_attention", "full_attention"]
    options = {"num_local_experts": 2, "intermediate_size_mlp": 64, "layer_types": kinds}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**GROUPED | options, attention_chunk_size=4))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0))


def whisper() -> Any:
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**TWO_SIDED | sizes, suppress_tokens=None, begin_suppress_tokens=None)
    )


def vit() -> Any:
    sizes = {"image_size": 32, "patch_size": 8}
    return hf.ViTModel(hf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **sizes))


def clip() -> Any:
    one = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = one | {"vocab_size": 99, "eos_token_id": 2}
    return hf.CLIPModel(
        hf.CLIPConfig(text_config=text, vision_config=one | {"image_size": 32, "patch_size": 8})
    )


def made(make: Callable[[], Any]) -> Any:
    """The model in eval on its own eager attention."""
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation("eager")
    return model


def tokens(keep: Tensor | None) -> dict[str, Tensor]:
    return {"input_ids": IDS} if keep is None else {"input_ids": IDS, "attention_mask": keep}


SOUND = {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(2))}
IMAGE = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))}
CASES: dict[str, tuple[Callable[[], Any], dict[str, Tensor], Tensor | None]] = {
    "bert": (bert, tokens(RIGHT), RIGHT),
    "bert, left": (bert, tokens(LEFT), LEFT),
    "bert, no padding": (bert, tokens(None), None),
    "llama": (llama, tokens(RIGHT), RIGHT),
    "llama, left": (llama, tokens(LEFT), LEFT),
    "llama, no padding": (llama, tokens(None), None),
    "mistral": (mistral, tokens(RIGHT), RIGHT),
    "mistral, left": (mistral, tokens(LEFT), LEFT),
    "gemma2 (softcap)": (gemma2, tokens(LEFT), LEFT),
    "gpt_oss (sinks)": (gpt_oss, tokens(LEFT), LEFT),
    "llama4 (chunks)": (llama4, tokens(LEFT), LEFT),
    "t5 (position bias)": (t5, tokens(RIGHT) | {"decoder_input_ids": IDS[:, :5]}, None),
    "whisper": (whisper, SOUND | {"decoder_input_ids": IDS}, None),
    "vit": (vit, IMAGE, None),
    "clip": (clip, tokens(RIGHT) | IMAGE, None),
}


def outputs(model: Any, inputs: dict[str, Tensor], keep: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The first output at real tokens and the gradients of the parameters. Rows of padding mean nothing."""
    model.zero_grad()
    out = model(**inputs)[0]
    out = out if keep is None else out[keep.bool()]
    out.float().square().mean().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_eager(case: str) -> None:
    make, inputs, keep = CASES[case]
    model = made(make)
    names, expected = list(model.state_dict()), outputs(model, inputs, keep)
    report = saccade.accelerate(model)
    assert report.swapped == [""] and not report.skipped, report
    assert 'attn_implementation="saccade" (was "eager")' in repr(report) and "modules checked" in repr(report)
    out, grads = outputs(model, inputs, keep)
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
    assert len(grads) == len(expected[1])
    for grad, old in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(grad, old, rtol=1e-3, atol=1e-6)
    assert list(model.state_dict()) == names
    assert saccade.restore(model) == [""] and model.config._attn_implementation == "eager"
    assert torch.equal(outputs(model, inputs, keep)[0], expected[0]) and not vars(model).get("_saccade_undo")


NO_PAIRS = [name for name in CASES if name.split(",")[0] not in ("vit", "clip")]


@pytest.mark.parametrize("case", NO_PAIRS)
def test_no_mask_of_all_pairs_is_made(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a mask of all pairs was laid out")

    make, inputs, _ = CASES[case]
    model = made(make)
    saccade.accelerate(model, verify=False)
    monkeypatch.setattr(own.PairMask, "dense", refuse)
    monkeypatch.setattr(masking_utils, "sdpa_mask", refuse)
    model(**inputs)


GENERATE = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("make", [llama, mistral, gemma2, gpt_oss, llama4], ids=lambda f: f.__name__)
def test_generate_gives_the_same_tokens(make: Callable[[], Any], how: str) -> None:
    model = made(make)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= GENERATE[how]
    expected = model.generate(**tokens(LEFT), **options)
    saccade.accelerate(model, verify=False)
    assert torch.equal(model.generate(**tokens(LEFT), **options), expected)
    assert expected.shape == (2, LENGTH + 8)


def test_whisper_generates_the_same_tokens() -> None:
    model = made(whisper)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**SOUND, **options)
    saccade.accelerate(model, verify=False)
    assert torch.equal(model.generate(**SOUND, **options), expected)


@pytest.mark.parametrize("make", [llama, mistral], ids=lambda f: f.__name__)
def test_a_prompt_after_a_cache(make: Callable[[], Any]) -> None:
    """Several queries over longer keys: the queries stand at the end of the keys."""
    results = []
    model = made(make)
    for _ in range(2):
        first = model(IDS[:, :6], use_cache=True)
        results.append(model(IDS[:, 6:], past_key_values=first.past_key_values).logits)
        saccade.accelerate(model, verify=False)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llama, mistral, llama4], ids=lambda f: f.__name__)
def test_packed_sequences(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Position ids that start again mean another sequence, which attends to itself alone."""
    model, lengths = made(make), (7, 4)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    expected = model(IDS[:1], position_ids=positions, use_cache=False).logits
    saccade.accelerate(model, verify=False)
    with monkeypatch.context() as patch:
        patch.setattr(own.PairMask, "dense", None)
        patch.setattr(masking_utils, "sdpa_mask", None)
        out = model(IDS[:1], position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    alone = torch.cat([model(part).logits for part in IDS[:1].split(lengths, 1)], 1)
    torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_the_users_own(dtype: torch.dtype) -> None:
    model = made(llama)
    keep = torch.rand(2, 1, LENGTH, LENGTH).gt(0.5) | torch.eye(LENGTH, dtype=torch.bool)
    floats = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    expected = model(IDS, attention_mask=floats).logits
    saccade.accelerate(model, verify=False)
    out = model(IDS, attention_mask=keep if dtype == torch.bool else floats).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_the_weights_when_asked_for() -> None:
    model = made(llama)
    expected = model(**tokens(RIGHT), output_attentions=True).attentions
    saccade.accelerate(model, verify=False)
    found = model(**tokens(RIGHT), output_attentions=True).attentions
    assert len(found) == len(expected) == 2
    for weights, old in zip(found, expected, strict=True):
        torch.testing.assert_close(weights, old, rtol=1e-4, atol=1e-5)


def test_training_with_dropout_and_checkpointing() -> None:
    model = llama(attention_dropout=0.2).train()
    model.gradient_checkpointing_enable()
    saccade.accelerate(model)
    assert model.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**tokens(RIGHT), labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("make", [bert, mistral], ids=lambda f: f.__name__)
def test_torch_compile_in_one_graph(make: Callable[[], Any]) -> None:
    model = made(make)
    model.config.use_cache = False
    saccade.accelerate(model, verify=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for length in (LENGTH, 9, 6):
            inputs = {name: x[:, :length].clone() for name, x in tokens(LEFT).items()}
            out, keep = compiled(**inputs)[0], inputs["attention_mask"].bool()
            torch.testing.assert_close(out[keep], model(**inputs)[0][keep], rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # whatever the length
