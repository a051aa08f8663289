"""What was changed on a module, kept on the module itself, so that copies and pickles can be restored too."""

from __future__ import annotations

from typing import Any, Protocol

import torch

KEY = "_saccade_undo"  # in the __dict__ of every module that was touched: the steps, oldest first


class Step(Protocol):
    """One change; `swaps` where the module itself now runs on saccade."""

    @property
    def swaps(self) -> bool: ...
    def undo(self, module: Any) -> None: ...


class ClassChange:
    """A module was given class `now` in place of `before`."""

    def __init__(self, module: torch.nn.Module, before: type, now: type, swaps: bool) -> None:
        self.before, self.now, self.swaps = before, now, swaps
        module.__class__ = rebased(type(module), before, now)
        steps(module).append(self)

    def undo(self, module: Any) -> None:
        # A parametrization may have come or gone since: its class stands on ours, or stood on torch's.
        if isinstance(module, self.now):
            module.__class__ = rebased(type(module), self.now, self.before)


class AttributeChange:
    """A module's attribute was given another value."""

    swaps = False

    def __init__(self, module: torch.nn.Module, name: str, value: Any) -> None:
        self.name, self.before = name, getattr(module, name)
        setattr(module, name, value)
        steps(module).append(self)

    def undo(self, module: Any) -> None:
        setattr(module, self.name, self.before)


def steps(module: torch.nn.Module) -> list[Step]:
    return module.__dict__.setdefault(KEY, [])


def is_changed(module: torch.nn.Module) -> bool:
    return KEY in module.__dict__


def undo_last(module: torch.nn.Module) -> None:
    """Undo the last change of a module: what its check refused."""
    done = module.__dict__[KEY]
    done.pop().undo(module)
    if not done:
        del module.__dict__[KEY]


def undo(module: torch.nn.Module) -> bool:
    """Undo all that was changed on a module; whether it ran on saccade."""
    done = module.__dict__.pop(KEY, [])
    for step in reversed(done):
        step.undo(module)
    return any(step.swaps for step in done)


def rebased(cls: type, old: type, new: type) -> type:
    """`cls` with its base `old` replaced by `new`: torch puts a class of its own on a parametrized module."""
    if cls is old:
        return new
    bases = tuple(rebased(base, old, new) if issubclass(base, old) else base for base in cls.__bases__)
    space = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, space)
