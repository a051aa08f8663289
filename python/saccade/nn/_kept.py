"""What is found from the values of a tensor, kept with the tensor until they change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..maskbase import has_modes, plainly, unwatched

_Found = TypeVar("_Found")
_MANY = 1 << 16  # words that take longer to compare, 50 us, than to sum


class Kept:
    """By tensor, and by what else was asked. An entry lives as long as its tensor; nothing in it may keep the
    tensor alive.

    On the CPU values are compared at each use, so that writing through `.data`, numpy or another process
    counts too. On other devices that would wait for them: there only what torch counts as writing does, and
    other memory (`x.data = y`). Nothing is kept where a compiler, a tracer or a transform looks on.
    """

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._known)

    def of(self, x: Tensor, asked: Any, find: Callable[[], _Found]) -> _Found:
        """What `find` gives, now or earlier."""
        if not unwatched(x):
            return find()
        with plainly(x) if has_modes() else nullcontext():  # what counts or saves must not see the reading
            found = self._found(x)
            if asked not in found:
                found[asked] = find()
            return found[asked]

    def known(self, x: Tensor, asked: Any, default: _Found) -> _Found:
        """What was found earlier."""
        return self._found(x).get(asked, default) if unwatched(x) else default

    def _found(self, x: Tensor) -> dict[Any, Any]:
        if x.is_inference() and x.device.type != "cpu":  # nothing counts writes to those
            return {}
        entry: _Entry | None = self._known.get(x)
        if entry is None or not entry.holds(x):
            entry = self._known[x] = _Entry(x)
        return entry.found


class _Entry:
    """What was found from `x`, and what tells whether it still has those values."""

    def __init__(self, x: Tensor) -> None:
        self.found: dict[Any, Any] = {}
        self.state = _state(x)
        self.values = [y.clone() for y in _values(x)]

    def holds(self, x: Tensor) -> bool:
        return self.state == _state(x) and all(map(torch.equal, self.values, _values(x)))


def _parts(x: Tensor) -> list[Tensor]:
    """What holds the values: of a sparse tensor, those that say which there are."""
    x = x.detach()
    if x.layout == torch.sparse_csr:
        return [x.crow_indices(), x.col_indices()]
    if x.layout == torch.sparse_coo:
        return [x._indices()]
    return [x] if x.layout == torch.strided else []


def _state(x: Tensor) -> tuple[Any, ...]:
    places = [(y.data_ptr(), y.shape, y.stride()) for y in _parts(x)]
    return None if x.is_inference() else x._version, x.device, x.dtype, x.shape, places


def _values(x: Tensor) -> list[Tensor]:
    """What tells the values from others; empty where reading would wait.

    Those themselves, or of many integers sums: laid out 16 wide, along rows and columns. Only changes of four
    words or more can pass unseen, those that leave each of these sums as it was. Masks have too few different
    values for that.
    """
    found: list[Tensor] = []
    for y in _parts(x) if x.device.type == "cpu" else ():
        words = _words(y)
        if y.dtype.is_floating_point or y.dtype == torch.bool or words is None or words.numel() < _MANY:
            found.append(y if words is None else words)
        else:
            end = words.numel() // 16 * 16
            rows = words[:end].view(-1, 16)
            found += [rows.sum(0), rows.sum(1), words[end:]]
    return found


def _words(x: Tensor) -> Tensor | None:
    """The values as 64-bit words, the fastest to compare, and NaN is NaN; None where they do not lie so."""
    each = 8 // min(x.element_size(), 8)
    if not x.is_contiguous() or x.is_neg() or x.numel() % each or x.storage_offset() % each:
        return None
    return x.view(-1).view(torch.int64)


of_masks = Kept()  # what dense masks are
