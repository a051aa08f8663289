"""Triton kernel bodies, installed as ``saccade.kernels``: they know tiles and pointers, never a module.

Reading order: `mask` (which keys a query keeps), `tile` (load, score, drop), `softmax` (logits to weights and
back), `forward`, `backward`, `bias`, `weights`; `config` holds the tile shapes, `call` and `launch` the
host's half.
"""
