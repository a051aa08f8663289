"""Objects with tensors (positions, scores) as submodules: the tensors move, train and are saved with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Held(nn.Module):
    """Parameters of `value` become parameters here, its other tensors buffers; `forward()` gives it back."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.kind = type(value)
        names = vars(value) if hasattr(value, "__dict__") else value.__slots__
        self.fields: dict[str, Any] = {}
        self.tensors: list[str] = []  # by name: a parametrized tensor is not among the parameters
        for name in names:
            field = getattr(value, name)
            if isinstance(field, nn.Parameter):
                self.register_parameter(name, field)
            elif isinstance(field, Tensor):
                self.register_buffer(name, field)
            else:
                self.fields[name] = field
                continue
            self.tensors.append(name)

    def forward(self) -> Any:
        value = object.__new__(self.kind)
        for name, field in self.fields.items():
            setattr(value, name, field)
        for name in self.tensors:
            setattr(value, name, getattr(self, name))
        return value

    def extra_repr(self) -> str:
        shapes = {n: list(getattr(self, n).shape) for n in self.tensors}
        fields = {n: x for n, x in self.fields.items() if x is not None}
        return ", ".join([self.kind.__name__, *(f"{n}={x}" for n, x in {**shapes, **fields}.items())])
