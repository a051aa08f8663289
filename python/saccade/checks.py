"""Checks of plain numbers, for everything that takes them."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch

_LARGEST = torch.finfo(torch.float32).max


def int_at_least(name: str, value: Any, least: int) -> int:
    """`value`, if it is an int from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def finite(name: str, value: Any) -> float:
    """`value`, if it is a number that fp32 holds; a traced one is not looked at."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt | Real):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    number: Any = value
    if not isinstance(value, torch.SymFloat | torch.SymInt) and not -_LARGEST <= number <= _LARGEST:
        raise ValueError(f"{name}: expected a finite number that fp32 holds, got {value}")
    return float(value)
