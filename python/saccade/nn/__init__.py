"""Modules with torch's constructors, parameters and results, over `saccade.attention`."""

from .attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
