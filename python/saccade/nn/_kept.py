"""What is found from the values of a tensor, kept with the tensor until it is written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_Found = TypeVar("_Found")


class Kept:
    """By tensor, and by what else was asked. An entry lives as long as its tensor; nothing in it may keep the
    tensor alive. Writing into a tensor, as far as torch sees it, discards what was found from it.
    """

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._known)

    def of(self, x: Tensor, asked: Any, find: Callable[[], _Found]) -> _Found:
        """What `find` gives, now or earlier."""
        if x.is_inference():  # its values may change without a trace
            return find()
        entry: dict[Any, tuple[int, Any]] = self._known.setdefault(x, {})
        version, found = entry.get(asked, (-1, None))
        if version != x._version:
            found = find()
            entry[asked] = (x._version, found)
        return found
