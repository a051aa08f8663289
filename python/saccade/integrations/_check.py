"""The check of a module that was changed: the same inputs before and after, judged against fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Two calls that between them use masks, padding, weights and gradients. Every row keeps a key, so that what
# torch answers to empty rows (sometimes NaN) does not matter.
_QUERIES, _BATCH = 7, 2


def difference(
    got: list[Tensor],
    plain: list[Tensor],
    exact: list[Tensor],
    least_eps: float = 0.0,
    rough: list[Tensor] | None = None,
) -> str:
    """What is further from `exact` than the plain results allow: four times their error, a few roundings.

    Empty where nothing is. `least_eps`: how exact `exact` is. `rough`: the plain results in fp32, where the
    plain ones are `exact` themselves; their error says what those of fp64 may be.
    """
    if len(got) != len(plain):
        return f"{len(got)} results instead of {len(plain)}"
    for n, (new, old, true) in enumerate(zip(got, plain, exact, strict=True)):
        if new.shape != old.shape or new.dtype != old.dtype:
            return f"{list(new.shape)} {new.dtype} instead of {list(old.shape)} {old.dtype}"
        if not new.numel():
            continue
        true = true.double()
        error, allowed = ((x.double() - true).abs().max().item() for x in (new, old))
        eps = max(torch.finfo(old.dtype).eps, least_eps)
        if rough is not None:
            allowed += (rough[n].double() - true).abs().max().item() * eps / torch.finfo(rough[n].dtype).eps
        bound = 4 * allowed + 8 * eps * true.abs().max().item()
        if not error <= bound:  # NaN is no match either
            return f"a result of shape {list(new.shape)} is off by {error:.3g}, torch's own by {allowed:.3g}"
    return ""


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def has_values(module: torch.nn.Module) -> bool:
    """Whether there is anything to compare."""
    return not any(x.is_meta for x in (*module.parameters(), *module.buffers()))


def evaluated(module: torch.nn.Module, compute: Callable[[], Any]) -> Any:
    """Run with dropout off, leaving every `training` flag as it was."""
    flags = [(m, m.training) for m in module.modules()]
    for m, _ in flags:
        m.training = False
    try:
        return compute()
    finally:
        for m, training in flags:
            m.training = training


def results(module: Any) -> dict[str, list[Tensor]]:
    """What torch's attention module gives, in its own dtype and in fp64 (the same rounded weights and
    inputs); a module in fp64 also in fp32.
    """
    own = module.out_proj.weight.dtype
    plain = evaluated(module, lambda: _calls(module, own, _plain(module)))
    if any(x.device.type == "mps" for x in plain):
        return {"plain": plain, "exact": plain}
    found = {"plain": plain, "exact": _calls(module, torch.float64, _formula(module, torch.float64))}
    if own == torch.float64:
        found["rough"] = _calls(module, torch.float32, _formula(module, torch.float32))
    return found


def compare(module: Any, before: dict[str, list[Tensor]]) -> str:
    """What is different now; empty where nothing is."""
    got = evaluated(module, lambda: _calls(module, module.out_proj.weight.dtype, _plain(module)))
    return difference(got, before["plain"], before["exact"], rough=before.get("rough"))


def _inputs(module: Any, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Query, key, value and masks, from a generator of our own."""
    draw = torch.Generator().manual_seed(0)
    device, own = module.out_proj.weight.device, module.out_proj.weight.dtype
    shape = (_BATCH, _QUERIES) if module.batch_first else (_QUERIES, _BATCH)
    query, key, value = (
        torch.randn(*shape, dim, generator=draw, device="cpu").to(own).to(device, dtype).requires_grad_()
        for dim in (module.embed_dim, module.kdim, module.vdim)
    )
    padding = torch.zeros(_BATCH, _QUERIES, dtype=torch.bool, device=device)
    padding[1, -2:] = True
    above = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool, device=device).triu(1)
    return [query, key, value], {"key_padding_mask": padding, "attn_mask": above}


def _calls(module: Any, dtype: torch.dtype, run: Any) -> list[Tensor]:
    """Outputs, weights and input gradients of two calls of `run`."""
    found = []
    device = module.out_proj.weight.device.type
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        for options in ({"need_weights": True}, {"need_weights": False}):
            inputs, masks = _inputs(module, dtype)
            outputs = run(*inputs, **options, **({} if options["need_weights"] else masks))
            found += [x.detach() for x in outputs if x is not None]
            found += torch.autograd.grad(outputs[0].sum() + outputs[0].square().sum(), inputs)
    return found


def _plain(module: Any) -> Any:
    """The module's forward past its hooks, which may do anything."""
    return lambda *inputs, **options: type(module).forward(module, *inputs, **options)


def _formula(module: Any, dtype: torch.dtype) -> Any:
    """torch's own formula on the module's weights in `dtype`."""

    def wide(x: Tensor | None) -> Any:
        return None if x is None else x.detach().to(dtype)

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
