"""The readable naive twin of the public functions: same arguments, plain PyTorch. `backends/reference.py` is
its text.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import functional


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> Any:
    """`saccade.attention` on the reference backend."""
    return functional.attention(q, k, v, mask, **{**options, "backend": "reference"})


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **options: Any) -> Any:
    """`saccade.attention_varlen` on the reference backend."""
    return functional.attention_varlen(q, k, v, *lengths, **{**options, "backend": "reference"})


def attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, **options: Any) -> Any:
    """`saccade.attention_decode` on the reference backend."""
    return functional.attention_decode(q, k_cache, v_cache, lengths, **{**options, "backend": "reference"})
