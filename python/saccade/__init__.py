"""saccade: attention kernels for PyTorch."""

from typing import Any

from . import nn, op_gradients, patterns, position, reference  # noqa: F401 (op_gradients registers itself)
from .accelerate import accelerate, restore
from .dropout import dropout_mask
from .explain import Explanation, explain
from .explain import list_backends as backends
from .functional import (
    attention,
    attention_decode,
    attention_varlen,
    merge,
    scaled_dot_product_attention,
)
from .graph import Graph
from .masks import Band, Causal, Chunks, KeyPadding, Mask, Segments, Window
from .position import T5, ALiBi, RoPE, Shaw, TransformerXL
from .scores import Additive, GATv2

__version__: str  # read from the installed package when asked for

__all__ = [
    "ALiBi",
    "Additive",
    "Band",
    "Causal",
    "Chunks",
    "Explanation",
    "GATv2",
    "Graph",
    "KeyPadding",
    "Mask",
    "RoPE",
    "Segments",
    "Shaw",
    "T5",
    "TransformerXL",
    "Window",
    "accelerate",
    "attention",
    "attention_decode",
    "attention_varlen",
    "backends",
    "dropout_mask",
    "explain",
    "merge",
    "nn",
    "patterns",
    "position",
    "reference",
    "restore",
    "scaled_dot_product_attention",
]


def __getattr__(name: str) -> Any:
    if name == "testing":
        from importlib import import_module

        return import_module("saccade.testing")
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version(__name__)
    except PackageNotFoundError:  # a folder on sys.path
        found = "0+unknown"
    return globals().setdefault("__version__", found)


def __dir__() -> list[str]:
    """The public names, without the modules that make them."""
    own = [name for name in globals() if name.startswith("__")]
    return sorted({*__all__, *own, "__version__", "integrations", "testing"})
