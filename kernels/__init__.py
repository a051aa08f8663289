"""Triton kernel bodies, installed as ``saccade.kernels``: they know tiles and pointers, never a module."""
