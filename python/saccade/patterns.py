"""Masks from the literature, built on bands and `Graph`: sparse patterns over positions.

A pattern that a band expresses is a band; the others are graphs, made from the kept pairs alone, so that
building and running one costs what it keeps. Each function states its dense definition; queries and keys are
the same `seqlen` positions.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor

from .checks import int_at_least
from .graph import MAKING, Graph
from .maskbase import Mask, untraced
from .masks import Window

__all__ = ["bigbird", "dilated", "grid2d", "longformer", "strided"]


@untraced(MAKING)
def strided(seqlen: int, stride: int, *, causal: bool = True) -> Graph:
    """The strided pattern of the Sparse Transformer (Child et al., 1904.10509), its two heads joined.

    Keeps (i, j) iff |i - j| < stride or |i - j| is a multiple of stride; with `causal` also j <= i.
    """
    _check_sizes(0, seqlen=seqlen)
    _check_sizes(1, stride=stride)
    stride = min(stride, max(seqlen, 1))  # no pair is further apart
    i = torch.arange(seqlen)
    near = _spans(i, i - (stride - 1), i + (1 if causal else stride))
    columns = _spans(i, i % stride, i + 1 if causal else torch.full_like(i, seqlen), stride)
    return _joined(seqlen, near, columns)


@untraced(MAKING)
def dilated(seqlen: int, window: int, dilation: int = 1, *, causal: bool = False) -> Mask:
    """A window with gaps, as in dilated convolution (van den Oord et al., 1609.03499; also 2004.05150).

    Keeps (i, j) iff |i - j| <= window * dilation and |i - j| is a multiple of dilation; with `causal` also
    j <= i. `window` counts the keys on each side. Without gaps this is `Window`.
    """
    _check_sizes(0, seqlen=seqlen, window=window)
    _check_sizes(1, dilation=dilation)
    if dilation == 1:
        return Window(window, 0 if causal else window)
    i = torch.arange(seqlen)
    return _joined(seqlen, _around(i, window, 0 if causal else window, dilation))


@untraced(MAKING)
def longformer(seqlen: int, window: int, global_tokens: Iterable[int] = (), *, dilation: int = 1) -> Mask:
    """A window and tokens that see and are seen by all (Beltagy, Peters, Cohan: 2004.05150).

    Keeps (i, j) iff |i - j| <= window * dilation and |i - j| is a multiple of dilation, or i or j is one of
    `global_tokens`. `window` counts the keys on each side: half of the paper's. Without global tokens this is
    `dilated`. Raises ValueError for a token outside 0 <= token < seqlen.
    """
    _check_sizes(0, seqlen=seqlen, window=window)
    _check_sizes(1, dilation=dilation)
    if not isinstance(global_tokens, Iterable):
        raise TypeError(f"global_tokens: expected positions, as in (0,), got {type(global_tokens).__name__}")
    tokens = sorted({_token(t, seqlen) for t in global_tokens})
    if not tokens:
        return dilated(seqlen, window, dilation)
    i, seen = torch.arange(seqlen), torch.tensor(tokens)
    columns = (i.repeat_interleave(len(tokens)), seen.repeat(seqlen))
    rows = (seen.repeat_interleave(seqlen), i.repeat(len(tokens)))
    return _joined(seqlen, _around(i, window, window, dilation), columns, rows)


@untraced(MAKING)
def bigbird(  # noqa: PLR0913  the sizes of the paper's pattern
    seqlen: int,
    block_size: int,
    *,
    num_window_blocks: int = 3,
    num_global_blocks: int = 1,
    num_random_blocks: int = 3,
    seed: int = 0,
) -> Graph:
    """Window, global and random blocks (Zaheer et al., 2007.14062, the ITC form).

    With block(i) = i // block_size, keeps (i, j) iff of the blocks a = block(i) and b = block(j): |a - b| <=
    num_window_blocks // 2, or a or b is one of the first num_global_blocks, or b is among R[a]. R[a] are
    num_random_blocks of the blocks that a does not keep otherwise (all where there are fewer), drawn in the
    order of a with `random.Random(seed).sample`.
    """
    _check_sizes(0, seqlen=seqlen, num_global_blocks=num_global_blocks, num_random_blocks=num_random_blocks)
    _check_sizes(1, block_size=block_size, num_window_blocks=num_window_blocks)
    block_size = min(block_size, max(seqlen, 1))
    count, draw, reach = -(-seqlen // block_size), random.Random(seed), num_window_blocks // 2
    pairs: list[tuple[int, int]] = []
    for a in range(count):
        if a < num_global_blocks:
            pairs += ((a, b) for b in range(count))
            continue
        first, end = max(a - reach, num_global_blocks), min(a + reach + 1, count)
        kept = [*range(num_global_blocks), *range(first, end)]
        free = count - len(kept)
        # The free blocks are those between the global ones and the window, then those after it.
        before = first - num_global_blocks
        for place in draw.sample(range(free), min(num_random_blocks, free)):
            kept.append(num_global_blocks + place if place < before else end + place - before)
        pairs += ((a, b) for b in kept)
    block, other = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    # Every pair of blocks for every row of its query block; the last block may be short.
    i = (block[:, None] * block_size + torch.arange(block_size)).reshape(-1)
    first_key = (other * block_size).repeat_interleave(block_size)
    i, first_key = i[i < seqlen], first_key[i < seqlen]
    return _joined(seqlen, _spans(i, first_key, first_key + block_size, seqlen=seqlen))


@untraced(MAKING)
def grid2d(
    height: int, width: int, radius: int | tuple[int, int], *, dilation: int = 1, causal: bool = False
) -> Graph:
    """Neighbourhoods of an image: position i is the pixel (i // width, i % width).

    Keeps (i, j) iff in both directions the pixels are at most radius * dilation apart, by a multiple of
    dilation; `radius` is one int or (rows, columns). At the border a neighbourhood is cut off (in
    2204.07143 it is shifted inwards). With `causal` also j <= i.
    """
    _check_sizes(0, height=height, width=width)
    down, across = check_radius(radius)
    _check_sizes(1, dilation=dilation)
    y, other_y = _around(torch.arange(height), down, down, dilation)  # [R]: kept pairs of rows
    x, other_x = _around(torch.arange(width), across, across, dilation)  # [C]: of columns
    inside_y, inside_x = other_y.clamp(0, height - 1) == other_y, other_x.clamp(0, width - 1) == other_x
    y, other_y, x, other_x = y[inside_y], other_y[inside_y], x[inside_x], other_x[inside_x]
    i = (y[:, None] * width + x).reshape(-1)
    j = (other_y[:, None] * width + other_x).reshape(-1)
    if causal:
        i, j = i[j <= i], j[j <= i]
    return _joined(height * width, (i, j))


def check_radius(radius: object) -> tuple[int, int]:
    """(rows, columns) of the radius of a neighbourhood."""
    pair = tuple(radius) if isinstance(radius, tuple | list) else (radius, radius)
    if len(pair) != 2:
        raise ValueError(f"radius: expected an int or (rows, columns), got {radius!r}")
    down, across = (int_at_least("radius", reach, 0) for reach in pair)
    return down, across


def _check_sizes(least: int, **sizes: object) -> None:
    for name, value in sizes.items():
        int_at_least(name, value, least)


def _token(token: int, seqlen: int) -> int:
    index = int(token)
    if not 0 <= index < seqlen:
        raise ValueError(f"global_tokens: expected 0 <= token < {seqlen}, got {index}")
    return index


def _spans(
    i: Tensor, first: Tensor, end: Tensor, step: int = 1, seqlen: int | None = None
) -> tuple[Tensor, Tensor]:
    """The pairs (i, j) with j = first, first + step, ... < end, of the positions there are."""
    bound = i.numel() if seqlen is None else seqlen
    first, end = first.clamp(min=0), end.clamp(max=bound)
    counts = ((end - first + step - 1) // step).clamp(min=0)
    rows = torch.repeat_interleave(torch.arange(i.numel()), counts)
    place = torch.arange(rows.numel()) - (counts.cumsum(0) - counts)[rows]
    return i[rows], first[rows] + place * step


def _around(i: Tensor, before: int, after: int, dilation: int) -> tuple[Tensor, Tensor]:
    """The pairs (i, i + n * dilation) with -before <= n <= after; some may lie outside."""
    # No offset reaches further than there are positions.
    dilation = min(dilation, max(i.numel(), 1))
    most = -(-i.numel() // dilation)
    steps = torch.arange(-min(before, most), min(after, most) + 1) * dilation
    return i.repeat_interleave(steps.numel()), (i[:, None] + steps).reshape(-1)


def _joined(seqlen: int, *parts: tuple[Tensor, Tensor]) -> Graph:
    """The graph of the pairs (i, j) inside [0, seqlen), each once."""
    numbers = [i * seqlen + j for i, j in (_inside(part, seqlen) for part in parts)]
    pairs = torch.unique(torch.cat(numbers))
    i, j = (pairs // seqlen, pairs % seqlen) if seqlen else (pairs, pairs)
    indptr = torch.searchsorted(i, torch.arange(seqlen + 1))
    kind = torch.int32 if seqlen <= torch.iinfo(torch.int32).max else torch.int64
    return Graph(indptr, j.to(kind), None, seqlen, pairs.numel())


def _inside(part: tuple[Tensor, Tensor], seqlen: int) -> tuple[Tensor, Tensor]:
    i, j = part
    kept = (j >= 0) & (j < seqlen)
    return i[kept], j[kept]
