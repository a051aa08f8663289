"""The layouts of packed sequences and of key caches, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import as_int, is_int
from .maskbase import UNBOUNDED, values_are_known
from .problem import Layout


def packed_layout(q: Any, k: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any) -> Layout:
    """The layout of `attention_varlen`."""
    _check_ndim("q", q, 3, "[total, H, D]")
    _check_ndim("k", k, 3, "[total, Hk, D]")
    found, most = [], []
    for name, cu, x, longest in (("q", cu_q, q, max_q), ("k", cu_k, k, max_k)):
        cu = _ints(f"cu_seqlens_{name}", cu, 1, q.device, torch.int64)
        if not is_int(longest):
            raise TypeError(f"max_seqlen_{name}: expected an int, got {type(longest).__name__}")
        longest = as_int(longest)
        if isinstance(longest, int) and not 0 <= longest <= UNBOUNDED:
            raise ValueError(f"max_seqlen_{name}: expected 0 to {UNBOUNDED}, got {longest}")
        if cu.shape[0] == 0:
            raise ValueError(f"cu_seqlens_{name}: expected shape [B + 1], got [0]")
        if _readable(cu):
            longest = _check_packed(name, cu, x.shape[0], longest)
        found.append(cu)
        most.append(longest)
    if found[0].shape != found[1].shape:
        raise ValueError(
            f"cu_seqlens_k: expected shape {list(found[0].shape)} as cu_seqlens_q, got {list(found[1].shape)}"
        )
    return Layout(cu_seqlens_q=found[0], cu_seqlens_k=found[1], max_seqlen_q=most[0], max_seqlen_k=most[1])


def _check_ndim(name: str, value: Any, ndim: int, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dim() != ndim:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")


def _check_packed(name: str, cu: Tensor, total: int, longest: int | torch.SymInt) -> int:
    """The length of the longest sequence: kernels look at no more places than there are."""
    steps = cu.tolist()
    if steps[0] != 0 or steps[-1] != total:
        raise ValueError(
            f"cu_seqlens_{name}: expected values from 0 to {total}, got {steps[0]} to {steps[-1]}"
        )
    lengths = [b - a for a, b in zip(steps, steps[1:], strict=False)]
    if lengths and min(lengths) < 0:
        raise ValueError(f"cu_seqlens_{name}: expected values that do not fall, got a step of {min(lengths)}")
    if lengths and max(lengths) > longest:
        raise ValueError(
            f"max_seqlen_{name}: expected at least {max(lengths)} (the longest sequence), got {longest}"
        )
    return max(lengths, default=0)


def cache_layout(q: Any, k_cache: Any, lengths: Any, page_table: Any, beam: Any) -> Layout:
    """The layout of `attention_decode`."""
    _check_ndim("q", q, 4, "[B, H, Sq, D]")
    _check_ndim("k_cache", k_cache, 4, "[B, Hk, S, D] or [num_pages, Hk, page_size, D]")
    if page_table is not None and beam is not None:
        raise ValueError("beam: expected no page_table beside it")
    batch, rows, capacity = q.shape[0], k_cache.shape[0], k_cache.shape[2]
    used = _ints("lengths", lengths, 1, q.device, torch.int64)
    if used.shape[0] != batch:
        raise ValueError(f"lengths: expected shape [{batch}], got {list(used.shape)}")
    entries = used
    if page_table is not None:
        page_table = _table("page_table", page_table, q, f"[{batch}, pages]")
        entries = -(-used // max(capacity, 1))
        capacity = page_table.shape[1] * capacity
    if beam is not None:
        beam = _table("beam", beam, q, f"[{batch}, at most {capacity}]", capacity)
        capacity = beam.shape[1]
    if _readable(used) and batch:
        least, most = int(used.min()), int(used.max())
        if least < 0 or most > capacity:
            plain = page_table is None and beam is None
            read = f" (k_cache is {list(k_cache.shape)}, read as [B, Hk, S, D])" if plain else ""
            raise ValueError(f"lengths: expected values from 0 to {capacity}, got {least} to {most}{read}")
        for name, table in (("page_table", page_table), ("beam", beam)):
            if table is not None:
                _check_rows(name, table, entries, rows)
    page_table, beam = _narrow(page_table), _narrow(beam)
    return Layout(
        seqused_k=used, page_table=page_table, beam=beam, max_seqlen_q=q.shape[2], max_seqlen_k=capacity
    )


def _table(name: str, value: Any, q: Tensor, shape: str, widest: int | None = None) -> Tensor:
    table = _ints(name, value, 2, q.device)
    if table.shape[0] != q.shape[0] or (widest is not None and table.shape[1] > widest):
        raise ValueError(f"{name}: expected shape {shape}, got {list(table.shape)}")
    return table


def _narrow(table: Tensor | None) -> Tensor | None:
    """In int32; what does not fit stays out of range."""
    if table is None or table.dtype == torch.int32:
        return table
    return table.clamp(-1, torch.iinfo(torch.int32).max).int()


def _check_rows(name: str, table: Tensor, used: Tensor, rows: int) -> None:
    """Entries in use name rows that exist; the others are never read."""
    columns = torch.arange(table.shape[1], device=table.device)
    wrong = ((table < 0) | (table >= rows)) & (columns < used[:, None])
    if bool(wrong.any()):
        raise ValueError(f"{name}: expected 0 <= entry < {rows}, got {int(table[wrong][0])}")


def _ints(name: str, value: Any, ndim: int, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an integer tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int64, torch.int32) or value.dim() != ndim or value.device != device:
        want = f"an int32 or int64 tensor of {ndim} dimension{'s' if ndim > 1 else ''} on {device}"
        raise ValueError(f"{name}: expected {want}, got {value.dtype} {list(value.shape)} on {value.device}")
    value = value.to(dtype).contiguous()
    # The backward pass reads them again: it must find those that were checked, whatever the caller writes.
    return value.clone() if torch.is_grad_enabled() else value


def _readable(x: Tensor) -> bool:
    """Values are read on the CPU only, and not while a graph is traced."""
    return x.device.type == "cpu" and values_are_known(x)
