"""Triton's CPU interpreter, mended for tests, with every address checked.

What is mended (Triton 3.6): NumPy 2.4 refuses `range` over a tensor; bf16 is stored as bits, on which `dot`
and arithmetic work as if they were numbers; fp32 to bf16 cuts instead of rounding. Most of the time went into
patching the language at every call of a device function, working out the type of every tuple, building a new
table of dtypes for every number, and checking sums for overflow in five more steps; these are done more
simply. What is added: a load or a store outside of every tensor argument of the launch is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_ARITHMETIC = {np.add, np.subtract, np.multiply, np.divide, np.maximum, np.minimum}
_ARITHMETIC |= {np.less, np.greater, np.less_equal, np.greater_equal}
_allowed: list[tuple[int, int]] = []  # memory of the launch under way
_patched: set[frozenset[int]] = set()  # which parts of the language it has patched


def install() -> None:
    """Mend the interpreter of this process."""
    _mend_ranges()
    _mend_bfloat16()
    _mend_calls()
    _mend_types()
    _mend_overflow()
    _check_addresses()


def _mend_ranges() -> None:
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patched


def _round_to_bfloat16(x: Any) -> Any:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 0x40, rounded).astype(np.uint16).reshape(np.shape(x))


def _widen_bfloat16(x: Any) -> Any:
    return (np.asarray(x).astype(np.uint32) << 16).view(np.float32)


def _mend_bfloat16() -> None:
    convert, dot, binary = interpreter._convert_float, _Builder.create_dot, _Builder.binary_op

    def convert_float(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return _round_to_bfloat16(np.asarray(x).view(np.float32))
        if source == tl.bfloat16 and target == tl.float32:
            return _widen_bfloat16(x).view(np.uint32)
        return convert(x, source, target, rounding)

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_widen_bfloat16(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        if op in _ARITHMETIC and a.dtype.scalar == tl.bfloat16:
            raise TypeError(f"{op.__name__} of bf16 works on bits in the interpreter: widen first")
        return binary(self, a, b, op)

    def get_bf16(self: Any, value: float) -> Any:
        return interpreter.TensorHandle(_round_to_bfloat16(np.array([value], np.float32)), tl.bfloat16)

    interpreter._convert_float = convert_float
    _Builder.create_dot, _Builder.binary_op, _Builder.get_bf16 = create_dot, binary_op, get_bf16


def _mend_calls() -> None:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        parts = frozenset(id(x) for x in self.fn.__globals__.values() if x is tl or x is tl.core)
        if parts not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(parts)
        try:
            return self.rewrite()(*args, **kwargs)
        except interpreter.InterpreterError:
            raise
        except Exception as error:
            raise interpreter.InterpreterError(f"{self.fn.__name__}: {error!r}") from error

    interpreter.InterpretedFunction.__call__ = call


def _mend_types() -> None:
    find, numpy_types = interpreter._get_np_dtype, {}
    typed = tl.core.tuple.__init__

    def numpy_type(kind: Any) -> Any:
        scalar = kind.scalar
        if scalar.is_ptr():
            return find(scalar)
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = find(scalar)
        return numpy_types[scalar.name]

    def untyped(self: Any, args: Any, kind: Any = None) -> None:
        if kind is not None:
            typed(self, args, kind)
        else:
            self.values = list(args)

    def type_of(self: Any) -> Any:
        if "_type" not in self.__dict__:
            self._type = tl.core._type_for_tuple_values(self.values)
        return self._type

    interpreter._get_np_dtype = numpy_type
    tl.core.tuple.__init__ = untyped
    tl.core.tuple.type = property(type_of, lambda self, kind: self.__dict__.__setitem__("_type", kind))


def _mend_overflow() -> None:
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        pair = (np.asarray(x.handle.data).astype(np.int64) for x in (lhs, rhs))
        found = operations[binary_op.__name__](*pair)
        if found.size and (found.min() < kind.get_int_min_value() or found.max() > kind.get_int_max_value()):
            raise OverflowError(f"{kind} overflow in {binary_op.__name__}")

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _extents(arg: Any) -> None:
    """Adds the memory of every tensor among the arguments to what may be touched."""
    if isinstance(arg, tuple | list):
        for x in arg:
            _extents(x)
    elif hasattr(arg, "data_ptr") and arg.numel():
        last = sum((n - 1) * stride for n, stride in zip(arg.shape, arg.stride(), strict=True))
        _allowed.append((arg.data_ptr(), arg.data_ptr() + (last + 1) * arg.element_size()))


def _check(pointers: Any, mask: Any, what: str) -> None:
    at = np.asarray(pointers.data).astype(np.uint64).reshape(-1)
    if mask is not None:
        at = at[np.broadcast_to(np.asarray(mask.data).astype(bool), np.shape(pointers.data)).reshape(-1)]
    if not at.size:
        return
    size = np.uint64(max(pointers.get_element_ty().primitive_bitwidth // 8, 1))
    inside = np.zeros(at.shape, bool)
    for low, high in _allowed:
        inside |= (at >= np.uint64(low)) & (at + size <= np.uint64(high))
    if not inside.all():
        raise IndexError(f"{what} outside of every argument: {int((~inside).sum())} of {at.size} lanes")


def _check_addresses() -> None:
    init = interpreter.GridExecutor._init_args_hst
    load, store = _Builder.create_masked_load, _Builder.create_masked_store

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        found = init(self, args, kwargs)
        _allowed.clear()
        _patched.clear()
        _extents(tuple(found[0]))
        _extents(tuple(found[1].values()))
        return found

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        _check(pointers, mask, "load")
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest)

    interpreter.GridExecutor._init_args_hst = init_args
    _Builder.create_masked_load, _Builder.create_masked_store = masked_load, masked_store
