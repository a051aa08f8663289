"""The structures of csrc/params.h, as the launchers of csrc/cuda take them."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

_KINDS: dict[str, Any] = {
    "p": ctypes.c_void_p, "l": ctypes.c_int64, "d": ctypes.c_double, "i": ctypes.c_int32, "u": ctypes.c_uint64
}  # fmt: skip


def _fields(text: str) -> list[tuple[str, Any]]:
    """Words `name:kind` or `name:kind*count`, in the order of csrc/params.h."""
    found = []
    for name, kind in (field.split(":") for field in text.split()):
        base, _, count = kind.partition("*")
        found.append((name, _KINDS[base] * int(count) if count else _KINDS[base]))
    return found


class Rows(ctypes.Structure):
    _fields_ = _fields("data:p dtype:i batch:l head:l row:l col:l")


class MaskParams(ctypes.Structure):
    _fields_ = _fields("""
        band:l*4 head_bounds:p chunks:p num_chunks:l lengths:p keep:p keep_batch:l q_ids:p k_ids:p
        q_ids_batch:l k_ids_batch:l tile_ptr:p tile_col:p tile_bits:p""")


_KINDS |= {"rows": Rows, "mask": MaskParams}


class Params(ctypes.Structure):
    _fields_ = _fields("""
        batch:l heads:l heads_k:l seqlen_q:l seqlen_k:l head_dim:l head_dim_v:l
        q:rows k:rows v:rows out:rows lse:p lse_batch:l lse_head:l bias:p bias_dtype:i bias_stride:l*4
        rel_bias:p rel_size:l rel_center:l rel_batch:l rel_head:l rel_row:l
        weight:p sink:p extra_k:p extra_v:p
        cu_seqlens_q:p cu_seqlens_k:p seqused_k:p page_table:p page_table_batch:l page_size:l beam:p
        beam_batch:l mask:mask score:i activation:i scale:d softcap:d slope:d dropout_p:d seed:u""")


class GradParams(Params):
    _fields_ = _fields("""
        dout:rows dq:rows dk:rows dv:rows dlse:p dbias:p dbias_size:l*4 drel_bias:p dweight:p dextra_k:p
        dextra_v:p needs:l""")


class GatherParams(GradParams):
    _fields_ = _fields("""
        indptr:p indices:p edge_ids:p edges:l num_edges:l t_indptr:p t_rows:p t_edges:p edge_bias:p
        edge_bias_head:l edge_q:rows edge_x:rows out_edge:rows edge_dim:l joint_dim:l dout_edge:rows
        dedge_q:rows dedge_bias:p dedge_x:p""")


DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def rows(t: Tensor) -> Rows:
    packed = t.dim() == 3
    batch = 0 if packed else t.stride(0)
    return Rows(t.data_ptr(), DTYPES[t.dtype], batch, t.stride(1), t.stride(0 if packed else 2), t.stride(-1))


def set_lse(p: Params, lse: Tensor) -> None:
    p.lse = lse.data_ptr()
    p.lse_batch = lse.stride(0) if lse.dim() == 3 else 0
    p.lse_head = lse.stride(-2)
