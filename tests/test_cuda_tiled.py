"""The tiled CUDA kernels, run on the host simulator, against the yardstick."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saccade import Band, Causal, Graph, KeyPadding, Segments, Window, attention_varlen
from saccade.autograd import attend
from saccade.ops import DECODE, GATHER, TILED
from saccade.packed import packed_layout
from saccade.problem import Problem
from saccade.testing import (
    ORDERS,
    Shape,
    assert_no_worse_than,
    derivatives,
    leaves,
    make_inputs,
    plain_attention,
    poisoned,
    widened,
)
from simulated import Simulated, needs_compiler

pytestmark = needs_compiler

BF16, FP16 = torch.bfloat16, torch.float16


def simulated(
    arch: int, inputs: Any, mask: Any = None, schedule: int = 0, body: int = 0, **options: Any
) -> Any:
    """`arch` 90 adds dQ up in no fixed order; -90 is its deterministic mode."""
    kernels = Simulated(abs(arch), schedule, deterministic=arch != 90)
    return attend(Problem.of(*inputs, mask, **options), body, kernels)


def check(arch: int, inputs: Any, mask: Any = None, schedule: int = 0, body: int = 0, **options: Any) -> None:
    """Output and lse of a kernel against the error of plain PyTorch."""
    with torch.no_grad():
        got = simulated(arch, inputs, mask, schedule, body, **options)
        plain = plain_attention(*inputs, mask, return_lse=True, **options)
        wide = {name: widened(value) for name, value in options.items()}
        exact = plain_attention(*widened(inputs), mask, return_lse=True, **wide)
    for name, *values in zip(("out", "lse"), got, plain, exact, strict=True):
        assert_no_worse_than(*values, name=name)


def check_gradients(
    inputs: Any, mask: Any = None, arch: int = 80, schedule: int = 0, body: int = 0, **options: Any
) -> None:
    """Output, lse and every gradient of the kernels, with a gradient of lse too."""
    tensors = [*inputs, *leaves(options)]

    def run(attention: Any, inputs: Any, options: Any) -> list[torch.Tensor]:
        outputs = attention(inputs, options)
        return [*outputs, *derivatives(outputs, [*inputs, *leaves(options)])]

    got = run(lambda x, o: simulated(arch, x, mask, schedule, body, **o), inputs, options)
    plain = run(lambda x, o: plain_attention(*x, mask, return_lse=True, **o), inputs, options)
    wide = {name: widened(value) for name, value in options.items()}
    exact = run(lambda x, o: plain_attention(*x, mask, return_lse=True, **o), widened(inputs), wide)
    names = ["out", "lse", *(f"gradient {n} {list(x.shape)}" for n, x in enumerate(tensors))]
    for name, *values in zip(names, got, plain, exact, strict=True):
        assert_no_worse_than(*values, factor=3.0 if name.startswith("gradient") else 2.0, name=name)


MASKS = {
    "dense": None,
    "causal": Causal(),
    "causal from the start": Causal(align="start"),
    "window": Window(20, 3),
    "band beyond the keys": Band(-10, 12),
    "both alignments": Band(40, 5) & Band(90, 30, align="start"),
    "per head": Band(torch.tensor([5, 70, 0, 33]), torch.tensor([0, 2, 0, 70])),
    "lengths": KeyPadding(torch.tensor([61, 130])) & Causal(),
    "no key": KeyPadding(torch.tensor([0, 1])),
}


both = pytest.mark.parametrize("arch", [80, 90])


@both
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_bands(mask: Any, dtype: torch.dtype, arch: int) -> None:
    check(arch, make_inputs(Shape(2, 4, 2, 147, 131, 32, 24), dtype), mask)


SHAPES = [
    Shape(1, 1, 1, 1, 1, 64, 64),
    Shape(1, 2, 1, 129, 65, 64, 64),
    Shape(1, 2, 2, 65, 130, 128, 128),
    Shape(1, 3, 1, 260, 390, 128, 128),
    Shape(1, 1, 1, 70, 67, 256, 256),
    Shape(1, 2, 1, 130, 200, 256, 256),
    Shape(1, 1, 1, 70, 97, 80, 96),
]


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: Shape, arch: int) -> None:
    check(arch, make_inputs(shape, BF16), Causal())


@pytest.mark.parametrize("shape", [Shape(1, 2, 1, 33, 40, 7, 5), Shape(1, 1, 1, 20, 40, 16, 129)], ids=str)
def test_any_head_dim(shape: Shape) -> None:
    check(80, make_inputs(shape, BF16), Causal())


@pytest.mark.parametrize("order", ORDERS)
def test_layouts(order: str) -> None:
    inputs = make_inputs(Shape(2, 2, 1, 40, 70, 32, 32), FP16, order)
    check(80, inputs, Window(30, 0))
    if order != "bhds":
        check(90, inputs, Window(30, 0))


TERMS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 3.0},
    "negative scale": {"scale": -0.3},
    "sink": {"sink": torch.tensor([0.5, -2.0])},
    "softmax1": {"activation": "softmax1"},
    "dropout": {"dropout_p": 0.3, "seed": 11},
    "bias": {"bias": torch.randn(2, 1, 70, 90, generator=torch.Generator().manual_seed(1))},
    "bias of 16 bits": {
        "bias": torch.randn(1, 2, 1, 90, generator=torch.Generator().manual_seed(2)).to(BF16)
    },
    "large bias": {"bias": torch.full((1, 1, 1, 1), torch.finfo(torch.float32).min)},
}


@pytest.mark.parametrize("options", TERMS.values(), ids=TERMS)
def test_terms(options: dict[str, Any]) -> None:
    check(80, make_inputs(Shape(2, 2, 1, 70, 90, 32, 32), BF16), Causal(), **options)


@pytest.mark.parametrize("name", ["softcap", "sink", "softmax1"])
def test_terms_on_hopper(name: str) -> None:
    check(90, make_inputs(Shape(2, 2, 1, 70, 90, 64, 64), BF16), Causal(), **TERMS[name])


modes = pytest.mark.parametrize("arch", [80, 90, -90])


@modes
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gradients_of_bands(mask: Any, arch: int) -> None:
    check_gradients(make_inputs(Shape(2, 4, 2, 147, 131, 32, 24), BF16), mask, arch)


@modes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_shapes(shape: Shape, arch: int) -> None:
    check_gradients(make_inputs(shape, FP16), Causal(), arch)


def test_gradients_of_any_head_dim() -> None:
    check_gradients(make_inputs(Shape(1, 2, 1, 33, 40, 7, 5), FP16), Causal())


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_of_layouts(order: str) -> None:
    check_gradients(make_inputs(Shape(2, 2, 1, 40, 70, 32, 32), BF16, order), Window(30, 0))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("options", TERMS.values(), ids=TERMS)
def test_gradients_of_terms(options: dict[str, Any], head_dim: int) -> None:
    options = {
        n: x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for n, x in options.items()
    }
    check_gradients(make_inputs(Shape(2, 2, 1, 70, 90, head_dim, head_dim), BF16), Causal(), **options)


BIASES = [(2, 2, 70, 90), (1, 2, 70, 90), (2, 1, 1, 90), (1, 1, 70, 1), (1, 2, 1, 1), (1, 1, 70, 90)]


@pytest.mark.parametrize("size", BIASES, ids=str)
def test_gradient_of_a_bias(size: tuple[int, ...]) -> None:
    bias = torch.randn(size, generator=torch.Generator().manual_seed(5)).requires_grad_()
    inputs = make_inputs(Shape(2, 2, 1, 70, 90, 32, 32), BF16)
    check_gradients(inputs, Window(30, 20), bias=bias, softcap=4.0, dropout_p=0.2, seed=3)


def irregular_masks() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    keep = torch.rand(2, 90, generator=draw) < 0.5
    keep[1, :] = False
    ids = [torch.sort(torch.randint(0, 4, (2, n), generator=draw)).values for n in (70, 90)]
    return {
        "keep": KeyPadding(keep),
        "segments": Segments(*ids),
        "both, causal": KeyPadding(keep) & Segments(*ids) & Causal(),
    }


@pytest.mark.parametrize("name", irregular_masks())
def test_irregular_masks(name: str) -> None:
    check_gradients(make_inputs(Shape(2, 2, 1, 70, 90, 64, 64), BF16), irregular_masks()[name])


@pytest.mark.parametrize("name", ["lengths", "keep", "window", "bias", "bias under a softcap"])
def test_dead_keys_are_never_read(name: str) -> None:
    """NaN in keys and values that no query keeps reaches nothing."""
    q, k, v = make_inputs(Shape(1, 2, 2, 70, 90, 32, 32), BF16)
    dead, options = torch.zeros(1, 2, 90, dtype=torch.bool), dict[str, Any]()
    dead[..., 50:60] = name not in ("lengths", "window")
    dead[..., 77:] = name == "lengths"
    dead[..., :14] = name == "window"
    mask = {
        "lengths": KeyPadding(torch.tensor([77])),
        "keep": KeyPadding(~dead[:, 0]),
        "window": Window(6, 0),
    }.get(name)
    if name.startswith("bias"):
        options = {"bias": torch.where(dead[:, :, None], -torch.inf, 0.0)}
    if name.endswith("softcap"):
        options["softcap"] = 2.0
    bad_k, bad_v = poisoned(k, dead), poisoned(v, dead)
    for arch in (80, 90) if name in ("lengths", "window") else (80,):
        got = simulated(arch, (q, bad_k, bad_v), mask, **options)
        clean = simulated(arch, (q, k, v), mask, **options)
        for a, b in zip(got, clean, strict=True):
            assert torch.equal(a, b)
        bad, good = ((q, bad_k, bad_v), (q, k, v))
        grads = [derivatives(simulated(arch, x, mask, **options), x) for x in (bad, good)]
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


APART = {
    "beyond itself": Band(-1, 0),
    "two apart": Window(3, 0) & Band(-10, 20),
    "one head's": Band(torch.tensor([-5, 60]), torch.tensor([2, -30])),
    "two heads apart": Band(torch.tensor([90, 0]), torch.tensor([-88, 5])),
}


@modes
@pytest.mark.parametrize("mask", APART.values(), ids=APART)
@pytest.mark.parametrize("queries", [10, 70])
def test_keys_that_no_band_keeps(queries: int, mask: Any, arch: int) -> None:
    """What stands there reaches nothing: not where a band passes over them in vain, nor between heads'."""
    q, k, v = make_inputs(Shape(1, 2, 1, queries, 90, 64, 64), BF16)
    dead = ~mask.materialize(queries, 90).reshape(-1, 90).any(0).expand(1, 1, 90)
    assert dead.any()
    found = []
    for inputs in ((q, k, v), (q, poisoned(k, dead), poisoned(v, dead))):
        outputs = simulated(arch, inputs, mask)
        found.append([*outputs, *derivatives(outputs, inputs)])
    for clean, got in zip(*found, strict=True):
        assert torch.equal(clean, got)


@pytest.mark.parametrize("body", [TILED, DECODE, GATHER])
def test_dropout_of_everything(body: int) -> None:
    inputs = make_inputs(Shape(1, 2, 1, 20, 33, 32, 32), BF16)
    mask = Graph.from_dense(torch.ones(20, 33, dtype=torch.bool)) if body == GATHER else None
    out, lse = simulated(80, inputs, mask, body=body, dropout_p=1.0, seed=3)
    assert not out.any()
    torch.testing.assert_close(lse, simulated(80, inputs, mask, body=body)[1])
    assert not any(x.any() for x in derivatives(out, inputs))


@pytest.mark.parametrize("softcap", [30.0, 50.0, 1e5, 1e6])
@pytest.mark.parametrize(("arch", "body"), [(80, TILED), (90, TILED), (80, DECODE), (80, GATHER)])
def test_softcaps_that_hardly_bend(softcap: float, arch: int, body: int) -> None:
    """A cap is as exact as plain PyTorch's where tanh is nearly its argument."""
    shape, dtype = Shape(1, 2, 1, 40, 40, 64, 64), BF16 if body == TILED else torch.float32
    inputs = make_inputs(shape, dtype)
    if body == DECODE:  # fp32 has no gradient there
        return check(arch, inputs, body=body, softcap=softcap)
    graph = Graph.from_dense(torch.rand(40, 40, generator=torch.Generator().manual_seed(1)) < 0.2)
    check_gradients(inputs, graph if body == GATHER else None, arch, body=body, softcap=softcap)


@modes
def test_varlen(arch: int) -> None:
    lengths_q, lengths_k = torch.tensor([0, 70, 3, 40]), torch.tensor([5, 90, 0, 64])
    cu_q, cu_k = (torch.cat([torch.zeros(1, dtype=torch.int64), n.cumsum(0)]) for n in (lengths_q, lengths_k))
    draw = torch.Generator().manual_seed(4)
    sizes = (113, 2), (159, 1), (159, 1)
    q, k, v = (torch.randn(*size, 64, generator=draw).to(BF16).requires_grad_() for size in sizes)
    found: list[Any] = []
    for inputs in ((q, k, v), widened((q, k, v))):
        options = {"causal": True, "return_lse": True, "backend": "reference"}
        outputs = attention_varlen(*inputs, cu_q, cu_k, 70, 90, **options)
        found.append([*outputs, *derivatives(outputs, inputs)])
    layout = packed_layout(q, k, cu_q, cu_k, 70, 90)
    outputs = simulated(arch, (q, k, v), causal=True, layout=layout)
    got = [*outputs, *derivatives(outputs, (q, k, v))]
    for name, *values in zip(("out", "lse", "dq", "dk", "dv"), got, *found, strict=True):
        assert_no_worse_than(*values, factor=3.0 if name[0] == "d" else 2.0, name=name)


@modes
@pytest.mark.parametrize("schedule", range(4))
def test_any_schedule(schedule: int, arch: int) -> None:
    check_gradients(make_inputs(Shape(1, 2, 1, 200, 330, 64, 64), BF16), Causal(), arch, schedule)


def test_offsets_beyond_31_bits() -> None:
    q, k, v = make_inputs(Shape(1, 2, 2, 20, 20, 32, 32), FP16)
    far = torch.empty_strided(k.shape, (0, 2**31 + 8, 32, 1), dtype=FP16).copy_(k.detach())
    for arch in (80, 90):
        check(arch, (q, far, v), Causal())


def test_expanded_tensors() -> None:
    """TMA cannot read a head that stands for several; the sm_80 kernels take any strides, of dO too."""
    q, k, v = make_inputs(Shape(2, 2, 2, 40, 70, 64, 64), BF16)
    one = k[:, :1].detach().expand(-1, 2, -1, -1)
    check(80, (q, one, v), Causal())
    with pytest.raises(RuntimeError, match="forward_sm90 does not serve tensors that are expanded"):
        simulated(90, (q, one, v))
    for arch in (80, 90):
        outputs = simulated(arch, (q, k, v), Causal())
        (dv,) = torch.autograd.grad(outputs[0].sum(), v)
        (exact,) = torch.autograd.grad(plain_attention(q, k, v, Causal()).sum(), v)
        torch.testing.assert_close(dv, exact, rtol=0.05, atol=0.05)


def test_what_is_not_served_is_named() -> None:
    inputs = make_inputs(Shape(1, 1, 1, 4, 4, 16, 16), torch.float32)
    with pytest.raises(RuntimeError, match="forward_sm80 does not serve tensors other than bf16 or fp16"):
        simulated(80, inputs)
