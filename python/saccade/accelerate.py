"""`saccade.accelerate(model)` and `saccade.restore(model)`: swap torch's attention modules, and back.

A module is swapped by its class alone: it stays the same object, with its parameters, buffers, hooks, name
and place in an optimizer. What restore needs is kept on the module itself, so that copies and pickles of an
accelerated model stay accelerated and can be restored too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from . import nn
from .integrations import direct
from .integrations._check import compare, first_line, has_values, results
from .integrations._undo import AttributeChange, ClassChange, is_changed, undo, undo_last

# Exactly these types are swapped: a subclass may have changed what a call means.
SWAPS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.MultiheadAttention: nn.MultiheadAttention
}

# What stands around them follows, once its attention is ours: torch's layers have an inference path past it.
AROUND: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
    torch.nn.TransformerEncoder: nn.TransformerEncoder,
    torch.nn.TransformerDecoderLayer: nn.TransformerDecoderLayer,
    torch.nn.TransformerDecoder: nn.TransformerDecoder,
    torch.nn.Transformer: nn.Transformer,
}


@dataclass
class Report:
    """What `accelerate` did. Names are those of `model.named_modules()`; the model itself is `""`.

    swapped: modules that now run on saccade.
    skipped: attention modules that were left alone, with the reason.
    notes: what was changed, where it is more than the class of torch's attention: modules that call
        `F.scaled_dot_product_attention`, Hugging Face models, and modules around swapped ones.
    """

    swapped: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [f"accelerated {len(self.swapped)} module{'' if len(self.swapped) == 1 else 's'}"]
        lines += [f"  {_shown(name)}{self._note(name)}" for name in self.swapped]
        around = {name: text for name, text in self.notes.items() if name not in self.swapped}
        for title, entries in (("left alone", self.skipped), ("changed around them", around)):
            if entries:
                lines.append(f"{title}:")
                lines += [f"  {_shown(name)}: {text}" for name, text in entries.items()]
        return "\n".join(lines)

    def _note(self, name: str) -> str:
        return f": {self.notes[name]}" if name in self.notes else ""

    def _add(self, name: str, reason: str, note: str = "") -> None:
        if reason:
            self.skipped[name] = reason
            return
        self.swapped.append(name)
        if note:
            self.notes[name] = note


def accelerate(model: torch.nn.Module, *, verify: bool = True) -> Report:
    """Put every attention inside `model` on saccade, in place; `restore` undoes it.

    - Modules of exactly type `torch.nn.MultiheadAttention`, the model itself too, become
      `saccade.nn.MultiheadAttention`; torch's Transformer layers and stacks around them become those of
      `saccade.nn` (in the report's notes), because torch's fused inference path never calls `self_attn`. In
      subclasses that path is switched off. An encoder in eval with `src_key_padding_mask` then returns
      ordinary values at padded positions, not zeros.
    - Modules whose own class calls `F.scaled_dot_product_attention` (timm's, or yours) keep their forward;
      that call in it goes to saccade.
    - Hugging Face models get `attn_implementation="saccade"` (see `saccade.integrations.transformers`).

    Object identity, parameters, hooks, parametrizations, state_dict and optimizer state stay as they are.
    With `verify` what was changed must give what it gave before on a small sample, output and gradients; what
    does not is put back and reported. A torch module is called past its hooks; a Hugging Face model is run as
    a whole, on a few tokens. torch's random generators are left as they were.

    Raises TypeError when `model` is not a module or `verify` not a bool.
    """
    _check_module(model)
    if not isinstance(verify, bool):
        raise TypeError(f"verify: expected a bool, got {type(verify).__name__}")
    report = Report()
    for name, module in list(model.named_modules()):
        if isinstance(module, tuple(SWAPS)):
            report._add(name, _obstacle(module, verify) or _swap(module, verify))
        elif direct.calls_sdpa(module):
            report._add(name, direct.swap(module, verify), "its calls of F.scaled_dot_product_attention")
    if "transformers.modeling_utils" in sys.modules:  # else there is no such model
        from .integrations import transformers

        for name, hf_model in transformers.models_in(model):
            report._add(name, *transformers.swap(hf_model, verify))
    for name, module in model.named_modules():
        if note := _open(module):
            report.notes[name] = note
    return report


def restore(model: torch.nn.Module) -> list[str]:
    """Undo `accelerate` in place; returns the names of the modules that are as they were again."""
    _check_module(model)
    return [name for name, module in model.named_modules() if undo(module)]


def _check_module(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _shown(name: str) -> str:
    return name or "(the model itself)"


def _base(module: torch.nn.Module) -> type:
    """The class of a module, or that under the class that torch puts on it to parametrize it."""
    cls = type(module)
    parametrized = torch.nn.utils.parametrize.is_parametrized(module)
    own = parametrized and cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}"
    return cls.__bases__[0] if own else cls


def _is_sharded(module: torch.nn.Module) -> bool:
    """Whether a parameter is a DTensor, as FSDP2 and tensor parallelism make them."""
    known = sys.modules.get("torch.distributed.tensor")  # else there are none
    return known is not None and any(isinstance(p, known.DTensor) for p in module.parameters())


def _obstacle(module: Any, verify: bool) -> str:
    """Why a module must not be swapped; empty when it may."""
    if isinstance(module, tuple(SWAPS.values())):
        return "runs on saccade already"
    is_torchs = _base(module) in SWAPS
    if _is_sharded(module) and (verify or not is_torchs):  # fully_shard gives a module a class of its own
        return "its parameters are sharded (DTensor): accelerate the model before it is sharded"
    if not is_torchs:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"a subclass of torch's ({kind}), which may mean something else"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    return ""


def _swap(module: Any, verify: bool) -> str:
    """Swap one module; returns why it was put back, or nothing."""
    before: dict[str, Any] | None = None
    if verify and has_values(module):
        try:
            before = results(module)
        except Exception as error:  # whatever torch's own module refuses
            return f"torch's own module fails on a small input: {first_line(error)}"
        if not all(x.isfinite().all() for x in before["plain"]):
            return "its results are not finite, so they cannot be compared; verify=False swaps without"
    # What torch's object lacks are class attributes of saccade's class, at torch's meaning.
    ClassChange(module, _base(module), SWAPS[_base(module)], swaps=True)
    if before is None:
        return ""
    try:
        difference = compare(module, before)
    except Exception as error:
        difference = first_line(error)
    if difference:
        undo_last(module)
        return f"check failed: {difference}"
    return ""


def _open(module: torch.nn.Module) -> str:
    """Make what stands around a swapped attention call it in eval too; returns what was changed."""
    if is_changed(module) or not _stands_around(module):
        return ""
    if type(module) in AROUND and "forward" not in module.__dict__:
        own = AROUND[type(module)]
        ClassChange(module, type(module), own, swaps=False)
        return f"now saccade.nn.{own.__name__}, which calls the attention module in inference too"
    # Another class keeps its forward: the fused path is switched off in it.
    layer = isinstance(module, torch.nn.TransformerEncoderLayer)
    name = "activation_relu_or_gelu" if layer else "use_nested_tensor"
    if isinstance(module, tuple(AROUND.values())) or not getattr(module, name, None):
        return ""
    AttributeChange(module, name, 0 if layer else False)
    return f"{name}={getattr(module, name)}, so that inference calls the attention module too"


def _stands_around(module: torch.nn.Module) -> bool:
    """Whether a Transformer's part calls a swapped attention: a layer, or a stack of such layers."""
    if isinstance(module, torch.nn.Transformer):
        return any(map(_stands_around, (module.encoder, module.decoder)))
    if isinstance(module, torch.nn.TransformerEncoder | torch.nn.TransformerDecoder):
        return any(map(_stands_around, module.layers))
    parts = [getattr(module, name, None) for name in ("self_attn", "multihead_attn")]
    return isinstance(module, tuple(AROUND)) and any(isinstance(x, tuple(SWAPS.values())) for x in parts)
