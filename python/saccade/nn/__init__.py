"""Modules with torch's and PyTorch Geometric's constructors, parameters and results, over
`saccade.attention`.
"""

from .attention import MultiheadAttention
from .gat_conv import GATConv, GATv2Conv
from .graph import GraphMultiheadAttention, GraphTransformerLayer
from .graph_encodings import laplacian_encoding, random_walk_encoding
from .transformer import Transformer, TransformerDecoder, TransformerEncoder
from .transformer_conv import TransformerConv
from .transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GATConv",
    "GATv2Conv",
    "GraphMultiheadAttention",
    "GraphTransformerLayer",
    "MultiheadAttention",
    "Transformer",
    "TransformerConv",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "laplacian_encoding",
    "random_walk_encoding",
]
