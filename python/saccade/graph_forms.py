"""The arrays that kernels read of a graph, each built from its CSR by query: `rows` [E] the query and
`indices` [E] the key of every edge. What they hold is said where `Graph` gives them out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE = 64  # rows and columns of a tile: one 64-bit word per row


def rows_of(indptr: Tensor, num_edges: int) -> Tensor:
    """[E] int64: the row of every entry of a CSR matrix."""
    rows = torch.arange(indptr.numel() - 1, device=indptr.device)
    return torch.repeat_interleave(rows, indptr.diff(), output_size=num_edges)


def columns(indices: Tensor, rows: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """`Graph.columns`."""
    keys, order = torch.sort(indices, stable=True)
    ends = torch.arange(num_keys + 1, device=keys.device, dtype=keys.dtype)
    return torch.searchsorted(keys, ends), rows[order].int(), order


def work(indptr: Tensor, limit: int) -> list[Tensor]:
    """`Graph.work` of the rows of a CSR matrix."""
    sizes = indptr.diff()
    pieces = ((sizes + limit - 1) // limit).clamp(min=1)
    row = torch.repeat_interleave(torch.arange(sizes.numel(), device=indptr.device), pieces)
    nth = torch.arange(row.numel(), device=indptr.device) - (pieces.cumsum(0) - pieces)[row]
    first = indptr[row] + nth * limit
    last = torch.minimum(first + limit, indptr[row + 1])
    is_cut = pieces > 1
    slot = torch.where(is_cut[row], is_cut[row].cumsum(0) - 1, -1)
    cut = is_cut.nonzero().squeeze(1)
    ends = pad(pieces[cut].cumsum(0), (1, 0))
    order = torch.argsort(first - last, stable=True)
    return [row[order].int(), first[order], last[order], slot[order].int(), cut.int(), ends.int()]


def num_tiles(rows: Tensor, indices: Tensor, num_keys: int) -> int:
    """How many tiles hold an edge."""
    return torch.unique(_tile_numbers(rows, indices, num_keys)).numel()


def tiles(rows: Tensor, indices: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """`Graph.tiles` for (queries, keys); no pair may stand twice."""
    keys = indices.long()
    down, across = (-(-n // TILE) for n in size)
    tile, slot = torch.unique(_tile_numbers(rows, indices, size[1]), return_inverse=True)
    bits = torch.zeros(tile.numel() * TILE, dtype=torch.int64, device=keys.device)
    # No pair stands twice, so adding its bit is setting it.
    bits.index_add_(0, slot * TILE + rows % TILE, torch.ones_like(keys) << (keys % TILE))
    first = torch.arange(down + 1, device=keys.device) * max(across, 1)
    ptr = torch.searchsorted(tile, first)
    return ptr, (tile % max(across, 1)).int(), bits.view(-1, TILE)


def tile_lists(tiles: tuple[Tensor, Tensor, Tensor], num_keys: int, whole: bool) -> list[Tensor]:
    """`Graph.tile_lists` of what `tiles` gives."""
    ptr, cols, bits = tiles
    rows = rows_of(ptr, cols.numel())
    full = (bits == -1).all(1) if whole else torch.zeros_like(rows, dtype=torch.bool)
    found = [bits]
    down, across = ptr.numel() - 1, -(-num_keys // TILE)
    for of, other, count in ((rows, cols, down), (cols.long(), rows, across)):
        # By row (or column), then the whole ones, then in the order of the other coordinate.
        order = torch.sort(of * 2 + ~full, stable=True).indices
        sizes, wholes = (torch.bincount(x, minlength=count) for x in (of, of[full]))
        ends = pad(sizes.cumsum(0), (1, 0))
        found += [x.int() for x in (ends, ends[:-1] + wholes, other[order], order)]
    return found


def _tile_numbers(rows: Tensor, indices: Tensor, num_keys: int) -> Tensor:
    return (rows // TILE) * max(-(-num_keys // TILE), 1) + indices // TILE
