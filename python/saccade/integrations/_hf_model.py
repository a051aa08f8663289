"""Setting `attn_implementation="saccade"` on Hugging Face models that exist already, and checking them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ._check import difference, evaluated, first_line, has_values
from ._undo import steps, undo_last


class ConfigChange:
    """The step of `_undo`: configurations that had another attention implementation."""

    swaps = True

    def __init__(self, model: torch.nn.Module, before: list[tuple[Any, str]]) -> None:
        self.before = before
        steps(model).append(self)

    def undo(self, module: Any) -> None:
        for config, name in self.before:
            config._attn_implementation_internal = name

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle opened in a new process names an implementation that has to be known there.
        from .transformers import register

        self.__dict__.update(state)
        register()


def models_in(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost transformers models in a model."""
    from transformers import PreTrainedModel

    found: list[str] = []
    for name, module in list(model.named_modules()):
        inside = any(outer == "" or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append(name)
            yield name, module


def swap(model: Any, verify: bool) -> tuple[str, str]:
    """(why not, or nothing; what was done). What does not pass the check is put back."""
    from .transformers import NAME, register

    try:
        register()
    except ImportError as error:
        return f"this transformers has no mask interface: {first_line(error)}", ""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    if all(name == NAME for _, name in before):
        return "runs on saccade already", ""
    with _quiet():
        try:
            model.set_attn_implementation(NAME)
        except Exception as error:  # a model of its own rules
            ConfigChange(model, before)
            undo_last(model)
            return f"refused by the model: {first_line(error)}", ""
    changed = [(config, name) for config, name in before if config._attn_implementation != name]
    if not changed:
        return "its attention does not go through transformers' AttentionInterface", ""
    ConfigChange(model, changed)
    was = ", ".join(sorted({str(name) for _, name in changed}))
    note = f'attn_implementation="{NAME}" (was "{was}")'
    left = {type(config).__name__ for config, _ in before} - {type(config).__name__ for config, _ in changed}
    if left:
        note += f", but not in the parts of {', '.join(sorted(left))}"
    if not verify or not has_values(model):
        return "", note
    fault, count = _check(model, was)
    if fault:
        undo_last(model)
        return fault, ""
    return "", f"{note}; {count} attention modules checked"


def _configs(model: Any) -> list[Any]:
    """Every configuration of a model and its parts, once."""
    found: dict[int, Any] = {}
    pending = [m.config for m in model.modules() if hasattr(m, "config")]
    while pending:
        config = pending.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        pending += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return list(found.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of parts that cannot be set; the report says it."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check(model: Any, was: str) -> tuple[str, int]:
    """Run a sample; at each attention of it, compare with what the model ran on before. (fault, modules)."""
    from transformers import AttentionInterface

    from .transformers import NAME, attention_forward

    names = {id(module): name for name, module in model.named_modules()}
    faults: dict[str, str] = {}
    seen: set[str] = set()

    def compared(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        name = names.get(id(module), type(module).__name__)
        seen.add(name)
        fault = _fault(module, (query, key, value), mask, options, was)
        if fault:
            faults.setdefault(name, fault)
        return attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register(NAME, compared)
    try:
        with torch.no_grad():
            evaluated(model, lambda: _run_sample(model))
    except Exception as error:
        faults.setdefault("", f"no sample could be run ({first_line(error)}); verify=False sets it without")
    finally:
        AttentionInterface.register(NAME, attention_forward)
    if faults:
        name, fault = next(iter(faults.items()))
        return (f"check failed at {name}: {fault}" if name else f"not checked: {fault}"), 0
    if not seen:
        return "not checked: its sample reached no attention; verify=False sets it without", 0
    return "", len(seen)


def _fault(module: Any, qkv: Any, mask: Any, options: dict[str, Any], was: str) -> str:
    """What is different at one attention: output and gradients; rows that keep no key are left out."""
    from .transformers import PairMask, attention_forward

    plain = _reference(module, was)
    dense = mask.dense() if isinstance(mask, PairMask) else mask
    alive = dense.any(-1) if dense is not None and dense.dtype == torch.bool else None

    def calls(run: Any, dtype: torch.dtype, mask: Any) -> list[Tensor]:
        own = {n: x.to(dtype) if _floats(x) else x for n, x in options.items()}
        with torch.inference_mode(False), torch.enable_grad():
            inputs = [x.detach().clone().to(dtype).requires_grad_() for x in qkv]
            out = run(module, *inputs, mask, **own)[0]
            if alive is not None:
                out = torch.where(alive.transpose(1, 2)[..., None], out, 0)
            return [out.detach(), *torch.autograd.grad(out.sum() + out.square().sum(), inputs)]

    def theirs(dtype: torch.dtype) -> list[Tensor]:
        added = dense
        if dense is not None and dense.dtype == torch.bool and was != "sdpa":
            lowest = torch.finfo(dtype).min
            added = torch.zeros(dense.shape, dtype=dtype, device=dense.device).masked_fill(~dense, lowest)
        elif _floats(dense):
            added = dense.to(dtype)
        return calls(plain, dtype, added)

    dtype = qkv[0].dtype
    exact = theirs(dtype if qkv[0].device.type == "mps" else torch.float64)
    # Eager attention takes its softmax in fp32, in fp64 too.
    eps = torch.finfo(torch.float32).eps
    return difference(calls(attention_forward, dtype, mask), theirs(dtype), exact, least_eps=eps)


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _reference(module: Any, was: str) -> Any:
    """What the module ran on: transformers' "sdpa", else the model's own formula."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return sdpa_attention_forward if was == "sdpa" or eager is None else eager


def _run_sample(model: Any) -> None:
    """Small inputs of the kind that the model names as its main one; padded where that is possible."""
    main, inputs = model.main_input_name, _inputs(model)
    try:
        model.forward(**inputs)
    except Exception:
        vision = getattr(model.config, "vision_config", None)
        if main != "input_ids" or vision is None:
            raise
        model.forward(**inputs, **_inputs(model, "pixel_values"))  # text and image, as CLIP


def _inputs(model: Any, main: str = "") -> dict[str, Any]:
    weight = next(x for x in model.parameters() if x.is_floating_point())
    device, config = weight.device, model.config
    draw = torch.Generator().manual_seed(0)
    main = main or model.main_input_name

    def ids(length: int) -> Tensor:
        most = min(getattr(config.get_text_config(), "vocab_size", None) or 8, 1000)
        return torch.randint(0, most, (2, length), generator=draw, device="cpu").to(device)

    def floats(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cpu").to(device, weight.dtype)

    if main == "input_ids":
        keep = torch.ones(2, 7, dtype=torch.int64, device=device)
        keep[1, -2:] = 0
        inputs = {"input_ids": ids(7), "attention_mask": keep}
    elif main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size
        inputs = {main: floats(2, vision.num_channels, *((size, size) if isinstance(size, int) else size))}
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        inputs = {main: floats(1, config.num_mel_bins, 2 * config.max_source_positions)}
    elif main == "input_values":
        inputs = {main: floats(2, 16000)}
    else:
        inputs = {name: x.to(device) for name, x in model.dummy_inputs.items()}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids(5)[: len(inputs[main])]
    return inputs
