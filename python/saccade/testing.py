"""What tests and benchmarks share: inputs, the yardstick, poison, pairwise cases."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import reference
from .functional import attention
from .layout import in_order, memory_order
from .problem import Problem

ORDERS = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3), "bhds": (0, 1, 3, 2)}


@dataclass(frozen=True)
class Shape:
    """The sizes of a call."""

    batch: int = 2
    heads: int = 4
    heads_k: int = 4
    seqlen_q: int = 17
    seqlen_k: int = 33
    head_dim: int = 16
    head_dim_v: int = 16


def make_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, order: str = "bhsd", device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a shape, drawn from N(0, 1), laid out in one of `ORDERS`. They require gradients."""
    draw = torch.Generator(device).manual_seed(seed)
    sizes = (
        (shape.batch, shape.heads, shape.seqlen_q, shape.head_dim),
        (shape.batch, shape.heads_k, shape.seqlen_k, shape.head_dim),
        (shape.batch, shape.heads_k, shape.seqlen_k, shape.head_dim_v),
    )
    q, k, v = (
        in_order(torch.randn(size, generator=draw, device=device).to(dtype), ORDERS[order]).requires_grad_()
        for size in sizes
    )
    return q, k, v


def tensor_map(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`fn` on every tensor inside options: tensors, tuples, and the objects of positions and scores."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple):
        return tuple(tensor_map(fn, x) for x in value)
    if type(value).__module__ in ("saccade.position", "saccade.scores"):
        copy = object.__new__(type(value))
        names = vars(value) if hasattr(value, "__dict__") else value.__slots__
        for name in names:
            setattr(copy, name, tensor_map(fn, getattr(value, name)))
        return copy
    return value


def leaves(value: Any) -> list[Tensor]:
    """The tensors inside options that require gradients, in a fixed order."""
    found: list[Tensor] = []

    def visit(x: Tensor) -> Tensor:
        if x.requires_grad:
            found.append(x)
        return x

    tensor_map(visit, tuple(value.values()) if isinstance(value, Mapping) else value)
    return found


def widened(value: Any) -> Any:
    """The same numbers in fp64, as new leaves."""

    def widen(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    return tensor_map(widen, value)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> Any:
    """Naive PyTorch with every operation in q's own dtype: what the yardstick allows errors against."""
    return_lse = options.get("return_lse", False)
    problem = Problem.of(q, k, v, mask, **options)
    out, lse, _ = reference.weigh(problem.spec, problem.tensors, problem.position, wide=q.dtype)
    out = in_order(out, memory_order(problem.q))
    return (out, lse) if return_lse else out


def derivatives(outputs: Any, inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of `inputs` under random cotangents of the outputs (the same numbers in every dtype)."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    draw = torch.Generator().manual_seed(seed)
    cotangents = [
        torch.randn(x.shape, generator=draw).to(torch.bfloat16).to(x.dtype).to(x.device) for x in outputs
    ]
    # An empty row has lse -inf, whose derivative is nothing.
    cotangents = [torch.where(x.detach().isinf(), 0.0, c) for x, c in zip(outputs, cotangents, strict=True)]
    found = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def assert_no_worse_than(
    got: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0, name: str = "out"
) -> None:
    """The error of `got` is at most `factor` times that of `plain`, plus a rounding of the largest value."""
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}"
    if not got.numel():
        return
    infinite = exact.isinf()
    assert torch.equal(got.isinf(), infinite), f"{name}: infinities differ"
    got64, plain64, exact = (torch.where(infinite, 0.0, x.detach().double()) for x in (got, plain, exact))
    assert got64.isfinite().all(), f"{name}: not finite"
    error, allowed = (got64 - exact).abs().max().item(), (plain64 - exact).abs().nan_to_num(0.0).max().item()
    rounding = torch.finfo(got.dtype).eps * exact.abs().max().item()
    bound = factor * allowed + rounding
    assert error <= bound, f"{name}: error {error:.3e}, plain PyTorch {allowed:.3e}, bound {bound:.3e}"


def check_attention(inputs: tuple[Tensor, Tensor, Tensor], mask: Any, backend: str, **options: Any) -> None:
    """Output, lse and every gradient of a backend against the yardstick."""
    got = _named(lambda q, k, v, **o: attention(q, k, v, mask, backend=backend, **o), inputs, options)
    plain, exact = _plain_and_exact(inputs, mask, options)
    scale = 1.0
    if inputs[0].dtype == torch.float64:
        # No wider plain PyTorch: what it costs in fp32, in units of fp64's rounding, and the oracle's own
        # error on top.
        rounded = tensor_map(lambda x: _rounded(x, torch.float32), (inputs, *options.values()))
        narrow = _plain_and_exact(rounded[0], mask, dict(zip(options, rounded[1:], strict=True)))
        scale = 2.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        plain = {
            n: exact[n] + scale * (x.double() - narrow[1][n]).nan_to_num(0.0) for n, x in narrow[0].items()
        }
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_no_worse_than(
            value, plain[name], exact[name], 3.0 if name.startswith("gradient") else 2.0, name
        )


def _plain_and_exact(
    inputs: Any, mask: Any, options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    wide = {n: widened(x) for n, x in options.items()}
    plain = _named(lambda q, k, v, **o: plain_attention(q, k, v, mask, **o), inputs, options)
    exact = _named(
        lambda q, k, v, **o: attention(q, k, v, mask, backend="reference", **o), widened(inputs), wide
    )
    return plain, exact


def _named(run: Callable[..., Any], inputs: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients by name; a gradient has the dtype of its tensor."""
    outputs = run(*inputs, **options)
    named = dict(zip(("out", "lse"), outputs if isinstance(outputs, tuple) else (outputs,), strict=False))
    tensors = [*inputs, *leaves(options)]
    for n, (x, grad) in enumerate(zip(tensors, derivatives(outputs, tensors), strict=True)):
        assert grad.dtype == x.dtype
        named[f"gradient {n} {list(x.shape)}"] = grad
    return named


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x


def poisoned(x: Tensor, rows: Tensor, value: float = float("nan")) -> Tensor:
    """`x` [..., S, D] with `value` in the rows where `rows` [..., S] is True, as a new leaf."""
    return torch.where(rows[..., None], value, x.detach()).to(x.dtype).requires_grad_()


def pairwise(axes: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Few cases in which every value of every axis meets every value of every other axis at least once."""
    draw, names = random.Random(seed), list(axes)
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(axes[a]))
        for y in range(len(axes[b]))
    }
    cases = []
    while missing:
        a, x, b, y = min(missing)
        fixed = {a: x, b: y}
        tries = [
            {n: fixed[n] if n in fixed else draw.randrange(len(axes[n])) for n in names} for _ in range(40)
        ]
        best = max(tries, key=lambda case: len(_pairs(case, names) & missing))
        missing -= _pairs(best, names)
        cases.append({n: axes[n][i] for n, i in best.items()})
    return cases


def _pairs(case: Mapping[str, int], names: list[str]) -> set[tuple[str, int, str, int]]:
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}
