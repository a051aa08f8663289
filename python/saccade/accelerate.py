"""`saccade.accelerate(model)` and `saccade.restore(model)`: swap torch's attention modules, and back.

A module is swapped by its class alone: it stays the same object, with its parameters, buffers, hooks, name
and place in an optimizer. What restore needs is kept on the module itself, so that copies and pickles of an
accelerated model stay accelerated and can be restored too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import nn

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

_UNDO = "_saccade_undo"  # on every module that was touched: {attribute: value before}


@dataclass
class Report:
    """What `accelerate` did. Names are those of `model.named_modules()`; the model itself is `""`.

    swapped: modules that now run on saccade.
    skipped: attention modules that were left alone, with the reason.
    notes: other modules that were changed so that the swapped ones are called, with what was changed.
    """

    swapped: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [f"accelerated {len(self.swapped)} module{'' if len(self.swapped) == 1 else 's'}"]
        lines += [f"  {_shown(name)}" for name in self.swapped]
        for title, entries in (("left alone", self.skipped), ("changed around them", self.notes)):
            if entries:
                lines.append(f"{title}:")
                lines += [f"  {_shown(name)}: {text}" for name, text in entries.items()]
        return "\n".join(lines)


def accelerate(model: torch.nn.Module, *, verify: bool = True) -> Report:
    """Swap every module of exactly type `torch.nn.MultiheadAttention` inside `model`, itself too, in place.

    Object identity, parameters, hooks, state_dict and optimizer state stay as they are. With `verify` each
    swapped module must give what it gave before, output, weights and input gradients, on small random inputs;
    one that does not is put back and reported. torch's random generators are left as they were.

    torch's Transformer layers and stacks around them become those of `saccade.nn` (in the report's notes):
    torch's fused inference path never calls `self_attn`. In subclasses that path is switched off. An encoder
    in eval with `src_key_padding_mask` then returns ordinary values at padded positions, not zeros.

    Raises TypeError when `model` is not a module.
    """
    _check_module(model)
    report = Report()
    for name, module in list(model.named_modules()):
        if not isinstance(module, tuple(SWAPS)):
            continue
        reason = _obstacle(module) or _swap(module, verify)
        if reason:
            report.skipped[name] = reason
        else:
            report.swapped.append(name)
    for name, module in model.named_modules():
        if note := _open(module):
            report.notes[name] = note
    return report


def restore(model: torch.nn.Module) -> list[str]:
    """Undo `accelerate` in place; returns the names of the modules that are torch's again."""
    _check_module(model)
    restored = []
    for name, module in model.named_modules():
        if _UNDO not in module.__dict__:
            continue
        if type(module) in SWAPS.values():
            restored.append(name)
        _undo(module)
    return restored


def _check_module(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _shown(name: str) -> str:
    return name or "(the model itself)"


def _obstacle(module: Any) -> str:
    """Why a module must not be swapped; empty when it may."""
    if isinstance(module, tuple(SWAPS.values())):
        return "runs on saccade already"
    if type(module) not in SWAPS:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if torch.nn.utils.parametrize.is_parametrized(module):
            return f"parametrized ({kind}): accelerate the model before its weights are parametrized"
        return f"a subclass of torch's ({kind}), which may mean something else"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    return ""


def _swap(module: Any, verify: bool) -> str:
    """Swap one module; returns why it was put back, or nothing."""
    checked = verify and not any(
        p.is_meta for p in module.parameters()
    )  # without values there is nothing to compare
    before: dict[str, Any] | None = None
    if checked:
        try:
            before = _results(module)
        except Exception as error:  # whatever torch's own module refuses
            return f"torch's own module fails on a small input: {_first_line(error)}"
        if not all(x.isfinite().all() for x in before["plain"]):
            return "its results are not finite, so they cannot be compared; verify=False swaps without"
    _change_class(module, SWAPS[type(module)])
    if before is None:
        return ""
    try:
        difference = _difference(module, before)
    except Exception as error:
        difference = _first_line(error)
    if difference:
        _undo(module)
        return f"check failed: {difference}"
    return ""


def _change_class(module: torch.nn.Module, own: type[torch.nn.Module]) -> None:
    # What torch's object lacks are class attributes of saccade's class, at torch's meaning.
    module.__dict__[_UNDO] = {"__class__": type(module)}
    module.__class__ = own


def _open(module: torch.nn.Module) -> str:
    """Make what stands around a swapped attention call it in eval too; returns what was changed."""
    if _UNDO in module.__dict__ or not _stands_around(module):
        return ""
    if type(module) in AROUND and "forward" not in module.__dict__:
        _change_class(module, AROUND[type(module)])
        return f"now saccade.nn.{type(module).__name__}, which calls the attention module in inference too"
    # Another class keeps its forward: the fused path is switched off in it.
    layer = isinstance(module, torch.nn.TransformerEncoderLayer)
    name = "activation_relu_or_gelu" if layer else "use_nested_tensor"
    if isinstance(module, tuple(AROUND.values())) or not getattr(module, name, None):
        return ""
    module.__dict__[_UNDO] = {name: getattr(module, name)}
    setattr(module, name, 0 if layer else False)
    return f"{name}={getattr(module, name)}, so that inference calls the attention module too"


def _stands_around(module: torch.nn.Module) -> bool:
    """Whether a Transformer's part calls a swapped attention: a layer, or a stack of such layers."""
    if isinstance(module, torch.nn.Transformer):
        return any(map(_stands_around, (module.encoder, module.decoder)))
    if isinstance(module, torch.nn.TransformerEncoder | torch.nn.TransformerDecoder):
        return any(map(_stands_around, module.layers))
    parts = [getattr(module, name, None) for name in ("self_attn", "multihead_attn")]
    return isinstance(module, tuple(AROUND)) and any(isinstance(x, tuple(SWAPS.values())) for x in parts)


def _undo(module: torch.nn.Module) -> None:
    for name, value in module.__dict__.pop(_UNDO).items():
        setattr(module, name, value)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# The check: two calls that between them use masks, padding, weights and gradients. Every row keeps a key,
# so that what torch answers to empty rows (sometimes NaN) does not matter.

_QUERIES, _BATCH = 7, 2


def _inputs(module: Any, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Query, key, value and masks, from a generator of our own."""
    draw = torch.Generator().manual_seed(0)
    device, own = module.out_proj.weight.device, module.out_proj.weight.dtype
    shape = (_BATCH, _QUERIES) if module.batch_first else (_QUERIES, _BATCH)
    query, key, value = (
        torch.randn(*shape, dim, generator=draw).to(own).to(device, dtype).requires_grad_()
        for dim in (module.embed_dim, module.kdim, module.vdim)
    )
    padding = torch.zeros(_BATCH, _QUERIES, dtype=torch.bool, device=device)
    padding[1, -2:] = True
    above = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool, device=device).triu(1)
    return [query, key, value], {"key_padding_mask": padding, "attn_mask": above}


def _calls(module: Any, dtype: torch.dtype, run: Any) -> list[Tensor]:
    """Outputs, weights and input gradients of two calls of `run`."""
    found = []
    with torch.inference_mode(False), torch.enable_grad():
        for options in ({"need_weights": True}, {"need_weights": False}):
            inputs, masks = _inputs(module, dtype)
            outputs = run(*inputs, **options, **({} if options["need_weights"] else masks))
            found += [x.detach() for x in outputs if x is not None]
            found += torch.autograd.grad(outputs[0].sum() + outputs[0].square().sum(), inputs)
    return found


def _results(module: Any) -> dict[str, Any]:
    """What torch's module gives, in its own dtype and in fp64 (the same rounded weights and inputs)."""
    plain = _evaluated(module, lambda: _calls(module, module.out_proj.weight.dtype, _plain(module)))
    wide = (
        plain if any(x.device.type == "mps" for x in plain) else _calls(module, torch.float64, _exact(module))
    )
    return {"plain": plain, "exact": wide}


def _plain(module: Any) -> Any:
    """The module's forward past its hooks, which may do anything."""
    return lambda *inputs, **options: type(module).forward(module, *inputs, **options)


def _evaluated(module: torch.nn.Module, compute: Any) -> Any:
    """Run with dropout off, leaving every `training` flag as it was."""
    flags = [(m, m.training) for m in module.modules()]
    for m, _ in flags:
        m.training = False
    try:
        return compute()
    finally:
        for m, training in flags:
            m.training = training


def _exact(module: Any) -> Any:
    """torch's own formula on the module's weights in fp64."""

    def wide(x: Tensor | None) -> Any:
        return None if x is None else x.detach().double()

    def run(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        if module.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        separate: dict[str, Any] = {
            f"{n}_proj_weight": wide(getattr(module, f"{n}_proj_weight")) for n in "qkv"
        }
        out, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            module.embed_dim,
            module.num_heads,
            wide(module.in_proj_weight),
            wide(module.in_proj_bias),
            wide(module.bias_k),
            wide(module.bias_v),
            module.add_zero_attn,
            0.0,
            wide(module.out_proj.weight),
            wide(module.out_proj.bias),
            training=False,
            use_separate_proj_weight=not module._qkv_same_embed_dim,
            **separate,
            **options,
        )
        return out.transpose(0, 1) if module.batch_first else out, weights

    return run


def _difference(module: torch.nn.Module, before: dict[str, Any]) -> str:
    """What is further from fp64 than torch's own results allow: four times their error, a few roundings."""
    plain = before["plain"]
    got = _evaluated(module, lambda: _calls(module, plain[0].dtype, _plain(module)))
    if len(got) != len(plain):
        return f"{len(got)} results instead of {len(plain)}"
    for new, old, exact in zip(got, plain, before["exact"], strict=True):
        if new.shape != old.shape or new.dtype != old.dtype:
            return f"{list(new.shape)} {new.dtype} instead of {list(old.shape)} {old.dtype}"
        exact = exact.double()
        error, allowed = ((x.double() - exact).abs().max().item() for x in (new, old))
        bound = 4 * allowed + 8 * torch.finfo(old.dtype).eps * exact.abs().max().item()
        if not error <= bound:  # NaN is no match either
            return f"a result of shape {list(new.shape)} is off by {error:.3g}, torch's own by {allowed:.3g}"
    return ""
