"""Modules with torch's and PyTorch Geometric's constructors, parameters and results, over
`saccade.attention`.
"""

from .attention import MultiheadAttention
from .conformer import Conformer, ConformerConvolution, ConformerLayer, MaskedBatchNorm
from .decoding import DecoderState, KVCache
from .functional import multi_head_attention_forward
from .gat_conv import GATConv, GATv2Conv
from .generation import Hypotheses, beam_search, greedy_search, length_penalty
from .graph import GraphMultiheadAttention, GraphTransformerLayer
from .graph_encodings import laplacian_encoding, random_walk_encoding
from .guided import GuidedAttentionLoss, diagonal_penalty
from .nonautoregressive import LengthPredictor, NonAutoregressiveDecoder, ignore_after_end, uniform_copy
from .pixels import ConvolutionalAttention, PixelAttention
from .pooling import AdditiveMarginSoftmax, SelfAttentionPooling
from .positions import LearnedPosition, SinusoidalPosition, TransformerXLPosition, sinusoidal_encoding
from .streaming import EncoderStream
from .training import scheduled_sampling, shift_right
from .transformer import Transformer, TransformerDecoder, TransformerEncoder, layer_outputs
from .transformer_conv import TransformerConv
from .transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer
from .vision import PatchEmbedding, VisionTransformer

__all__ = [
    "AdditiveMarginSoftmax",
    "Conformer",
    "ConformerConvolution",
    "ConformerLayer",
    "ConvolutionalAttention",
    "DecoderState",
    "EncoderStream",
    "GATConv",
    "GATv2Conv",
    "GraphMultiheadAttention",
    "GraphTransformerLayer",
    "GuidedAttentionLoss",
    "Hypotheses",
    "KVCache",
    "LearnedPosition",
    "LengthPredictor",
    "MaskedBatchNorm",
    "MultiheadAttention",
    "NonAutoregressiveDecoder",
    "PatchEmbedding",
    "PixelAttention",
    "SelfAttentionPooling",
    "SinusoidalPosition",
    "Transformer",
    "TransformerConv",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "TransformerXLPosition",
    "VisionTransformer",
    "beam_search",
    "diagonal_penalty",
    "greedy_search",
    "ignore_after_end",
    "laplacian_encoding",
    "layer_outputs",
    "length_penalty",
    "multi_head_attention_forward",
    "random_walk_encoding",
    "scheduled_sampling",
    "shift_right",
    "sinusoidal_encoding",
    "uniform_copy",
]
