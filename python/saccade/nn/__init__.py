"""Modules with torch's and PyTorch Geometric's constructors, parameters and results, over
`saccade.attention`.
"""

from .attention import MultiheadAttention
from .gat_conv import GATConv, GATv2Conv
from .transformer_conv import TransformerConv

__all__ = ["GATConv", "GATv2Conv", "MultiheadAttention", "TransformerConv"]
