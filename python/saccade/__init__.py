"""saccade: attention kernels for PyTorch."""

from . import nn, patterns, position, reference
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
