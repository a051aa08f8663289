"""The backends, best first. Each module has NAME, unsupported(problem) -> reasons, kernel(problem),
run(problem).
"""

from __future__ import annotations

import warnings
from types import ModuleType

from torch import Tensor

from ..problem import Problem
from . import cpu, cuda, reference, triton

_MODULES: dict[str, ModuleType] = {m.NAME: m for m in (cuda, triton, cpu, reference)}
NAMES = tuple(_MODULES)
# By type of device: those that serve its tensors unasked. Triton serves a CPU's in its interpreter, for who
# names it.
_UNASKED: dict[str, tuple[ModuleType, ...]] = {"cpu": (cpu, reference), "cuda": (cuda, triton, reference)}
_REFERENCE_KEYS = 4096
_warned = False


def available() -> list[str]:
    """The names of the backends this machine has, best first."""
    found = [name for name in NAMES if not getattr(_MODULES[name], "missing", list)()]
    return sorted(found, key=lambda name: name == triton.NAME and triton.is_interpreted())


def named(name: object) -> ModuleType:
    """The backend of this name. TypeError or ValueError for what is not a name of one."""
    if not isinstance(name, str):
        raise TypeError(f"backend: expected a name, got {type(name).__name__}")
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {list(NAMES)}, got {name!r}")
    return _MODULES[name]


def reasons(problem: Problem) -> dict[str, list[str]]:
    """Why not, for every backend; an empty list where it can."""
    return {name: module.unsupported(problem) for name, module in _MODULES.items()}


def choose(problem: Problem, name: str | None = None) -> ModuleType:
    """The backend for a problem: the first that can, or the one asked for, which never falls back."""
    if name is not None:
        module = named(name)
        if module.unsupported(problem):
            raise NotImplementedError(_refusal(name, problem))
        return module
    for module in _UNASKED.get(problem.q.device.type, (reference,)):
        if module is cuda and not cuda.serves_unasked(problem):
            continue
        if not module.unsupported(problem):
            if module is reference:
                _warn_of_size(problem)
            return module
    raise NotImplementedError(_refusal(None, problem))


def _refusal(name: str | None, problem: Problem) -> str:
    head = (
        "no backend can run this problem:" if name is None else f"backend {name!r} cannot run this problem:"
    )
    lines = [f"  {n}: {'; '.join(why) or 'can'}" for n, why in reasons(problem).items()]
    return "\n".join([head, *lines])


def _warn_of_size(problem: Problem) -> None:
    global _warned
    if _warned or problem.spec.seqlen_k <= _REFERENCE_KEYS:
        return
    _warned = True
    why = "; ".join(f"{n}: {', '.join(r)}" for n, r in reasons(problem).items() if r)
    warnings.warn(
        f"saccade: the reference backend was chosen for {problem.spec.seqlen_k} keys; "
        f"it keeps every weight in memory ({why})",
        UserWarning,
        stacklevel=4,
    )


def run(problem: Problem, name: str | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) from the chosen backend."""
    return choose(problem, name).run(problem)
