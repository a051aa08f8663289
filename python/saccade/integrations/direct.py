"""Modules that call `F.scaled_dot_product_attention` themselves, such as timm's: that call goes to saccade.

Such a module gets a class derived from its own whose forward is the same one, run while a function mode
listens for this function alone. Nothing global changes, other modules keep torch's, and `torch.compile` and
`torch.export` see the mode and trace what it chose.
"""

from __future__ import annotations

import copyreg
import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..functional import scaled_dot_product_attention
from ..nn.attention import _redefines_torch
from ._check import difference, first_line, has_values
from ._undo import rebased, steps

_NAME = "scaled_dot_product_attention"
_PLAIN = (Tensor, torch.nn.Parameter)


class UsesSaccade(TorchFunctionMode):
    """Inside `with UsesSaccade():`, `F.scaled_dot_product_attention` is saccade's twin of it.

    Calls with nested tensors, DTensors and other subclasses that have operators of their own stay torch's.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and _is_served(args, kwargs or {}):
            func = scaled_dot_product_attention
        elif func is Tensor.unflatten:  # torch.compile knows it as a method only
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_served(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    others = [x for x in tensors if type(x) not in _PLAIN]
    return not (
        any(x.is_nested for x in tensors)
        or any(_redefines_torch(x) or is_traceable_wrapper_subclass(x) for x in others)
    )


def calls_sdpa(module: torch.nn.Module) -> bool:
    """Whether a method of the module's own class names the function."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        return False
    cls: Any = type(module)
    return _names_sdpa(cls)


@functools.cache
def _names_sdpa(cls: Any) -> bool:
    classes = [c for c in cls.__mro__ if c.__module__.split(".")[0] not in ("torch", "saccade", "builtins")]
    methods = [f for c in classes for f in vars(c).values() if isinstance(f, types.FunctionType)]
    return any(_NAME in method.__code__.co_names for method in methods)


@functools.cache
def accelerated(cls: Any) -> Any:
    """`cls` with its forward run inside `UsesSaccade`."""

    class Accelerated(cls):
        _runs_on_saccade = True

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with UsesSaccade():
                return super().forward(*args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            # No pickle finds this class by its name; it is made again from the one it stands on.
            made = super().__reduce_ex__(protocol)
            if made[0] is copyreg.__newobj__ and made[1] == (Accelerated,):  # type: ignore[attr-defined]
                return (_new, (cls,), *made[2:])
            return made

    Accelerated.__name__, Accelerated.__qualname__ = cls.__name__, cls.__qualname__
    Accelerated.__doc__ = cls.__doc__
    return Accelerated


def _new(cls: type) -> Any:
    own = accelerated(cls)
    return own.__new__(own)


class _Change:
    """The step of `_undo`: names the class before alone, because no pickle finds the other."""

    swaps = True

    def __init__(self, module: torch.nn.Module) -> None:
        before: Any = type(module)
        self.before = before
        module.__class__ = accelerated(before)
        steps(module).append(self)

    def undo(self, module: Any) -> None:
        own = accelerated(self.before)
        if isinstance(module, own):
            module.__class__ = rebased(type(module), own, self.before)


def swap(module: torch.nn.Module, verify: bool) -> str:
    """Give a module its accelerated class; returns why not, or nothing."""
    if hasattr(type(module), "_runs_on_saccade"):
        return "runs on saccade already"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "parametrized itself: accelerate the model before"
    if verify and has_values(module):
        weight = next((x for x in module.parameters() if x.is_floating_point()), torch.empty(0))
        head_dim = getattr(module, "head_dim", None)
        fault = _fault(head_dim if isinstance(head_dim, int) else 32, weight.dtype, weight.device)
        if fault:
            return f"check failed: {fault}"
    _Change(module)
    return ""


@functools.lru_cache(maxsize=64)
def _fault(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """The function compared with torch's on random inputs: a module's own inputs are not known, but its
    dtype, device and head_dim are.
    """
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel for {dtype}"
    exact = torch.float64 if device.type != "mps" else dtype
    try:
        torchs = F.scaled_dot_product_attention
        plain, true = (_calls(torchs, head_dim, dtype, d, device) for d in (dtype, exact))
        rough = _calls(torchs, head_dim, dtype, torch.float32, device) if dtype == torch.float64 else None
        got = _calls(scaled_dot_product_attention, head_dim, dtype, dtype, device)
        return difference(got, plain, true, rough=rough)
    except Exception as error:
        return first_line(error)


def _calls(
    run: Any, head_dim: int, own: torch.dtype, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Outputs and gradients: plain, causal, with a boolean mask of which every row keeps a key."""
    draw = torch.Generator().manual_seed(0)
    keep = torch.ones(7, 7, dtype=torch.bool, device=device).tril(2)
    found = []
    with torch.inference_mode(False), torch.enable_grad():
        for options in ({}, {"is_causal": True}, {"attn_mask": keep}):
            qkv = [
                torch.randn(2, 3, 7, head_dim, generator=draw, device="cpu").to(own).to(device, dtype)
                for _ in range(3)
            ]
            for x in qkv:
                x.requires_grad_()
            out = run(*qkv, **options)
            found += [out.detach(), *torch.autograd.grad(out.sum() + out.square().sum(), qkv)]
    return found
