"""Output and weights in one pass, on every instruction set: the truth, and what two passes give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saccade import Causal, Graph, KeyPadding, Window, ops
from saccade.backends import reference
from saccade.functional import attend_with_weights
from saccade.problem import Problem
from saccade.scores import Additive
from saccade.testing import Shape, assert_no_worse_than, make_inputs, poisoned, widened
from torch import Tensor

pytestmark = pytest.mark.skipif(not ops.LOADED, reason="the operator library is not built")

# Eight sequences of two blocks: as many items as one pass asks for.
SHAPE = Shape(8, 4, 2, 70, 300, 24, 20)
LENGTHS = torch.tensor([300, 1, 64, 129, 0, 200, 128, 257])
_DRAW = torch.Generator().manual_seed(0)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_DRAW)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": Causal(), "softcap": 3.0},
    "padded": {"mask": Window(90, 5) & KeyPadding(LENGTHS)},
    "graph": {"mask": Graph.from_dense(_random(70, 300) < -0.5)},
    "bias": {"bias": _random(4, 70, 300).masked_fill(_random(4, 70, 300) < -1, -torch.inf)},
    "sink": {"sink": _random(4)},
    "extra key": {"extra_k": _random(4, 24), "extra_v": _random(4, 20), "dropout_p": 0.3, "seed": 3},
    "softmax1": {"activation": "softmax1", "dropout_p": 0.3, "seed": 3},
    "relu": {"activation": "relu"},
    "sigmoid": {"activation": "sigmoid", "mask": Causal()},
    "additive": {"score": Additive(_random(4, 24))},
}


def _dtypes(isa: str) -> list[torch.dtype]:
    return [torch.bfloat16] if isa == "emulated_bf16" else [torch.float32, torch.bfloat16]


def _problem(name: str, dtype: torch.dtype, inputs: tuple[Tensor, Tensor, Tensor] | None = None) -> Problem:
    q, k, v = make_inputs(SHAPE, dtype) if inputs is None else inputs
    options = dict(CASES[name])
    for term in ("extra_k", "extra_v"):
        if term in options:
            options[term] = options[term].to(dtype)
    return Problem.of(q.detach(), k.detach(), v.detach(), **options)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_against_the_truth(isa: str, name: str, average: bool) -> None:
    for dtype in _dtypes(isa):
        problem = _problem(name, dtype)
        out, weights = attend_with_weights(problem, average, "cpu")
        wide = Problem.of(*widened(problem.tensors[:3]), **_wide_options(problem, name))
        exact = attend_with_weights(wide, average, "reference")
        found = reference.weigh(problem.spec, problem.tensors, problem.position, wide=dtype)
        plain = found[0], found[2].mean(1) if average else found[2]
        assert_no_worse_than(out, plain[0], exact[0])
        assert_no_worse_than(weights, plain[1], exact[1], name="weights")


def _wide_options(problem: Problem, name: str) -> dict[str, Any]:
    """The case's options in fp64; what was rounded, as it was rounded."""
    options = dict(CASES[name])
    if problem.extra_k is not None:
        options |= {"extra_k": problem.extra_k, "extra_v": problem.extra_v}
    return {n: widened(x) for n, x in options.items()}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_as_two_passes_for_any_threads(isa: str, name: str, average: bool) -> None:
    for dtype in _dtypes(isa):
        problem = _problem(name, dtype)
        spec, tensors = problem.spec, problem.tensors
        out, lse = ops.forward(spec, tensors, spec.seed, ops.TILED)
        weights = ops.weights(spec, lse, tensors, spec.seed, average)
        before = torch.get_num_threads()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                found = ops.forward_weights(spec, tensors, spec.seed, average)
            finally:
                torch.set_num_threads(before)
            assert torch.equal(found[0], out) and torch.equal(found[1], lse)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(found[2], weights, rtol=4 * eps, atol=4 * eps * 2**-6)
            if threads == 1:
                alone = found[2]
        assert torch.equal(alone, found[2])


def test_masked_keys_are_never_touched(isa: str) -> None:
    hidden = (torch.arange(300) >= LENGTHS[:, None])[:, None].expand(8, 2, 300)
    for dtype in _dtypes(isa):
        q, k, v = make_inputs(SHAPE, dtype)
        dirty_inputs = q, poisoned(k, hidden), poisoned(v, hidden)
        clean, dirty = (
            attend_with_weights(_problem("padded", dtype, x), True, "cpu") for x in ((q, k, v), dirty_inputs)
        )
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a, b)


def test_few_blocks_use_every_core() -> None:
    """One sequence of two blocks: averaging in one pass would leave two items, so two passes run."""
    problem = Problem.of(*(x.detach() for x in make_inputs(Shape(1, 4, 2, 70, 300, 24, 20))))
    spec, tensors = problem.spec, problem.tensors
    out, lse, weights = ops.forward_weights(spec, tensors, None, True)
    want, want_lse = ops.forward(spec, tensors, None, ops.TILED)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert torch.equal(weights, ops.weights(spec, lse, tensors, None, True))
