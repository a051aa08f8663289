"""Checks of plain numbers, for everything that takes them."""

from __future__ import annotations

import operator
from numbers import Integral, Real
from typing import Any

import torch

_LARGEST = torch.finfo(torch.float32).max


def is_int(value: Any) -> bool:
    """Whether `value` is an int, numpy's too; a bool is none."""
    return isinstance(value, int | torch.SymInt | Integral) and not isinstance(value, bool)


def as_int(value: Any) -> Any:
    """What `is_int` as an int; a traced one stays one."""
    return value if isinstance(value, int | torch.SymInt) else operator.index(value)


def int_at_least(name: str, value: Any, least: int) -> int:
    """`value` as an int, if it is one from `least` on."""
    if not is_int(value):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    number: int = as_int(value)
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def finite(name: str, value: Any) -> float:
    """`value`, if it is a number that fp32 holds; a traced one is not looked at."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt | Real):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    number: Any = value
    if not isinstance(value, torch.SymFloat | torch.SymInt) and not -_LARGEST <= number <= _LARGEST:
        raise ValueError(f"{name}: expected a finite number that fp32 holds, got {value}")
    return float(value)


def probability(name: str, value: Any) -> float:
    """`value`, if it is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float | Real):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{name}: expected 0 to 1, got {value}")
    return float(value)
