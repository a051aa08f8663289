"""What stands for a mask inside a Hugging Face model, and `accelerate` and `restore` of such models."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import saccade
import torch
from torch import Tensor

hf = pytest.importorskip("transformers", minversion="5.0", reason="transformers is not installed")
from saccade.integrations import _hf_masks  # noqa: E402
from saccade.integrations import transformers as own  # noqa: E402
from test_integrations_transformers import GROUPED, IDS, RIGHT, SMALL, llama, made, mistral, tokens  # noqa: E402
from transformers import masking_utils  # noqa: E402


def mask_of(
    function: Callable[..., Any], padding: Tensor | None = None, **options: Any
) -> tuple[Any, Tensor]:
    """(what the mask interface gives, transformers' own mask) for 3 queries at 4 over 7 keys."""
    own.register()
    sizes = {"batch_size": 2, "q_length": 3, "kv_length": 7, "q_offset": 4, "kv_offset": 0} | options
    common = sizes | {"mask_function": function, "attention_mask": padding}
    given = own.make_mask(**common, allow_is_causal_skip=True)
    return given, masking_utils.sdpa_mask(**common, allow_is_causal_skip=False)


def test_what_is_not_read_is_laid_out() -> None:
    causal = masking_utils.causal_mask_function
    prefix = masking_utils.or_masks(causal, lambda b, h, q, k: k < 2)
    blocks = masking_utils.or_masks(causal, masking_utils.blockwise_overlay(torch.zeros(2, 9).long()))
    third = masking_utils.and_masks(causal, lambda b, h, q, k: k % 3 == 0)
    for function in (prefix, blocks, third):
        given, dense = mask_of(function)
        assert isinstance(given, Tensor) and torch.equal(given, dense)
    given, dense = mask_of(causal, q_offset=torch.tensor(4))
    assert isinstance(given, own.PairMask) and torch.equal(given.dense(), dense)


def test_a_mask_is_a_tensor_for_code_that_wants_one() -> None:
    padding = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])
    given, dense = mask_of(masking_utils.sliding_window_causal_mask_function(3), padding)
    assert isinstance(given, own.PairMask) and given.shape == dense.shape and given.dtype == torch.bool
    floats = torch.zeros(dense.shape).masked_fill(~dense, -1.0)
    for found, expected in (
        (given[:, :, :, :5], dense[..., :5]),
        (~given, ~dense),
        (given & dense, dense),
        (torch.cat([given, given], -1), torch.cat([dense, dense], -1)),
        (torch.where(given, 0.0, -1.0), floats),
        (given.to(torch.float32), dense.float()),
        (given.logical_not(), ~dense),
        (given.to("cpu").dense(), dense),
    ):
        assert torch.equal(found, expected)
    assert "Band" in repr(given) and copy.deepcopy(given).sizes == given.sizes


def test_a_function_that_means_something_else_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    make = masking_utils.sliding_window_causal_mask_function
    monkeypatch.setattr(_hf_masks, "TRUSTED", frozenset())
    monkeypatch.setattr(masking_utils, "sliding_window_causal_mask_function", lambda w: make(w))
    _hf_masks.trust()
    assert "sliding_window_overlay" in _hf_masks.TRUSTED
    # As if transformers counted the window without the query from now on.
    overlay = masking_utils.sliding_window_overlay

    def wider(sliding_window: int) -> Any:
        fn = overlay(sliding_window)
        return masking_utils.and_masks(overlay_of(fn), masking_utils.causal_mask_function)

    def overlay_of(fn: Any) -> Any:
        def inner_mask(b: Any, h: Any, q: Any, k: Any, sliding_window: int = 0) -> Any:
            return fn(b, h, q - 1, k)

        inner_mask.__qualname__, inner_mask.__module__ = fn.__qualname__, fn.__module__
        return inner_mask

    monkeypatch.setattr(masking_utils, "sliding_window_causal_mask_function", wider)
    _hf_masks.trust()
    assert "sliding_window_overlay" not in _hf_masks.TRUSTED and "causal_mask_function" in _hf_masks.TRUSTED
    given, dense = mask_of(wider(3))
    assert torch.equal(given, dense)


def test_refusals() -> None:
    q = torch.randn(1, 2, 3, 8)
    for name in ("cache", "indices", "block_indices", "sinks"):
        with pytest.raises(NotImplementedError, match=f"{name} .* is not served"):
            own.attention_forward(torch.nn.Identity(), q, q, q, None, **{name: q})
    given, _ = mask_of(masking_utils.causal_mask_function)
    with pytest.raises(ValueError, match="made for 3 queries and 7 keys, the call has 3 and 3"):
        own.attention_forward(torch.nn.Identity(), q, q, q, given)


def test_copies_pickles_and_a_new_process(tmp_path: Any) -> None:
    model = made(llama)
    expected = model(IDS).logits
    model = made(llama)  # without the hooks that a call of the model leaves
    saccade.accelerate(model, verify=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config._attn_implementation == "saccade"
        assert saccade.restore(other) == [""] and other.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "saccade"
    (tmp_path / "model").write_bytes(pickle.dumps((model, IDS, expected)))
    code = (
        "import pickle, sys, torch; m, x, y = pickle.load(open(sys.argv[1], 'rb')); "
        "torch.testing.assert_close(m(x).logits, y, rtol=1e-4, atol=1e-5)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model")], check=True)


def test_what_differs_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = own.attention_forward
    monkeypatch.setattr(own, "attention_forward", lambda *a, **k: (forward(*a, **k)[0] * 1.001, None))
    model = made(llama)
    report = saccade.accelerate(model)
    assert not report.swapped and "check failed at model.layers.0.self_attn" in report.skipped[""]
    assert model.config._attn_implementation == "eager" and saccade.restore(model) == []


def test_what_cannot_be_checked_or_set_has_a_reason() -> None:
    model = made(llama)
    model.model.forward = None
    assert "no sample could be run" in saccade.accelerate(model).skipped[""]
    assert saccade.accelerate(model, verify=False).swapped == [""]
    assert "already" in saccade.accelerate(model).skipped[""]
    with torch.device("meta"):
        assert saccade.accelerate(llama()).swapped == [""]
    sizes = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    falcon = hf.FalconForCausalLM(hf.FalconConfig(**sizes, num_attention_heads=4)).eval()
    expected = falcon(IDS).logits
    report = saccade.accelerate(falcon)  # calls F.scaled_dot_product_attention by itself
    assert "AttentionInterface" in report.skipped[""] and len(report.swapped) == 2
    torch.testing.assert_close(falcon(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_after_transformers_own_sdpa(tmp_path: Any) -> None:
    model = made(mistral)
    model.set_attn_implementation("sdpa")
    expected = model(**tokens(RIGHT)).logits[RIGHT.bool()]
    report = saccade.accelerate(model)
    assert '(was "sdpa"); 2 attention modules checked' in report.notes[""]
    torch.testing.assert_close(model(**tokens(RIGHT)).logits[RIGHT.bool()], expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert "saccade" not in (tmp_path / "config.json").read_text()  # who loads it need not have it
    saccade.restore(model)
    assert model.config._attn_implementation == "sdpa"


def test_nothing_random_is_touched() -> None:
    model, before = made(llama), torch.random.get_rng_state()
    saccade.accelerate(model)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters()) and not any(m.training for m in model.modules())


def test_the_name_serves_new_models_after_register() -> None:
    own.register()
    model = hf.AutoModelForCausalLM.from_config(
        hf.LlamaConfig(**GROUPED), attn_implementation="saccade"
    ).eval()
    expected = made(llama)
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-5)
