"""The cuda backend: what it refuses and why, and which kernels a device gets."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import saccade
import torch
from saccade import Band, Causal, Chunks, Graph, KeyPadding, Segments, ops
from saccade.autograd import attend
from saccade.backends import choose, cuda, reasons
from saccade.functional import attend_with_weights
from saccade.problem import Layout, Problem
from saccade.testing import Shape, derivatives, make_inputs
from simulated import Params, Simulated, needs_compiler
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = Shape(2, 4, 2, 40, 36, 16, 16)


def problem_of(shape: Shape = SMALL, dtype: torch.dtype = BF16, mask: Any = None, **options: Any) -> Problem:
    return Problem.of(*make_inputs(shape, dtype), mask, **options)


def expanded() -> Problem:
    q, k, v = make_inputs(SMALL, BF16)
    return Problem.of(q, k[:, :1].expand(-1, 2, -1, -1), v)


def transposed_columns() -> Problem:
    q, k, v = make_inputs(SMALL, BF16)
    return Problem.of(q, k.mT.contiguous().mT, v)


def decoding(trained: bool = False, dtype: torch.dtype = BF16) -> Problem:
    q, k, v = (x.requires_grad_(trained) for x in make_inputs(SMALL, dtype))
    return Problem.of(q, k, v, layout=Layout(seqused_k=torch.tensor([3, 36]), max_seqlen_k=36))


def packed() -> Problem:
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in make_inputs(SMALL, BF16))
    ends = torch.tensor([0, 30, 36])
    layout = Layout(cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=30, max_seqlen_k=30)
    return Problem.of(q[:36], k, v, layout=layout)


RELATIVE = torch.zeros(4)
GRAPH = Graph.from_dense(torch.ones(40, 36).bool())

# Name -> the problem and a word of each reason against it.
PROBLEMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "plain": (problem_of, ()),
    "fp16": (lambda: problem_of(dtype=FP16), ()),
    "fp32": (lambda: problem_of(dtype=torch.float32), ("float32",)),
    "fp64": (lambda: problem_of(dtype=torch.float64), ("float64",)),
    "wide": (lambda: problem_of(Shape(1, 1, 1, 2, 2, 264, 8)), ("head_dim",)),
    "wide values": (lambda: problem_of(Shape(1, 1, 1, 2, 2, 8, 264)), ("head_dim",)),
    "values wider than keys": (lambda: problem_of(Shape(1, 1, 1, 2, 2, 8, 64)), ()),
    "odd head_dim": (lambda: problem_of(Shape(1, 1, 1, 2, 2, 7, 8)), ()),
    "expanded": (expanded, ()),
    "columns apart": (transposed_columns, ()),
    "packed": (packed, ()),
    "causal": (lambda: problem_of(mask=Causal()), ()),
    "per head": (lambda: problem_of(mask=Band(torch.tensor([1, 2, 3, 4]), 0)), ()),
    "lengths": (lambda: problem_of(mask=KeyPadding(torch.tensor([3, 9]))), ()),
    "keep": (lambda: problem_of(mask=KeyPadding(torch.ones(2, 36).bool())), ()),
    "segments": (lambda: problem_of(mask=Segments(torch.zeros(40).int(), torch.zeros(36).int())), ()),
    "chunks": (lambda: problem_of(mask=Chunks(8, align="end")), ()),
    "causal chunks": (lambda: problem_of(mask=Chunks(8, 1, align="end") & Causal()), ()),
    "chunks and a gap": (lambda: problem_of(mask=Chunks(8, align="end") & Band(9, -2)), ()),
    "several chunks": (
        lambda: problem_of(mask=Chunks(8, align="end") & Chunks(6, align="end")),
        ("several masks of chunks",),
    ),
    "chunks of a graph": (lambda: problem_of(mask=GRAPH & Chunks(8, align="end")), ()),
    "graph": (lambda: problem_of(mask=GRAPH), ()),
    "fp32 graph": (lambda: problem_of(dtype=torch.float32, mask=GRAPH), ()),
    "fp64 graph": (lambda: problem_of(dtype=torch.float64, mask=GRAPH), ("nor float32",)),
    "edge bias": (lambda: problem_of(mask=GRAPH, edge_bias=torch.zeros(1440)), ()),
    "edge features": (
        lambda: problem_of(
            mask=GRAPH, edge_attr=(torch.zeros(1440, 3).bfloat16(), torch.zeros(4, 16, 3).bfloat16())
        ),
        ("edge_attr",),
    ),
    "graph and bias": (lambda: problem_of(mask=GRAPH, bias=torch.zeros(40, 36)), ("a bias, a relative",)),
    "relu graph": (lambda: problem_of(mask=GRAPH, activation="relu"), ("activations",)),
    "bias": (lambda: problem_of(bias=torch.zeros(40, 36)), ()),
    "fp64 bias": (lambda: problem_of(bias=torch.zeros(40, 36).double()), ("float64 bias",)),
    "alibi": (lambda: problem_of(position=saccade.ALiBi(torch.ones(4))), ()),
    "trained alibi": (
        lambda: problem_of(position=saccade.ALiBi(torch.ones(4).requires_grad_())),
        ("gradient of a relative bias",),
    ),
    "shaw": (lambda: problem_of(position=saccade.Shaw(torch.zeros(3, 16))), ("Shaw",)),
    "additive": (lambda: problem_of(score=saccade.Additive(torch.zeros(4, 16))), ("scores",)),
    "relu": (lambda: problem_of(activation="relu"), ("activations",)),
    "sigmoid": (lambda: problem_of(activation="sigmoid"), ("activations",)),
    "softmax1": (lambda: problem_of(activation="softmax1"), ()),
    "sink": (lambda: problem_of(sink=torch.zeros(4)), ()),
    "dropout": (lambda: problem_of(dropout_p=0.5), ()),
    "softcap": (lambda: problem_of(softcap=3.0), ()),
    "negative scale": (lambda: problem_of(scale=-1.0), ()),
    "extra key": (
        lambda: problem_of(extra_k=torch.zeros(4, 16).bfloat16(), extra_v=torch.zeros(4, 16).bfloat16()),
        ("extra_k",),
    ),
    "cache": (decoding, ()),
    "trained cache": (lambda: decoding(True), ("gradients through a key cache",)),
    "fp32 cache": (lambda: decoding(dtype=torch.float32), ()),
    "fp64 cache": (lambda: decoding(dtype=torch.float64), ("nor float32",)),
    "trained fp32 cache": (lambda: decoding(True, torch.float32), ("gradients through a key cache",)),
    "trained fp32 query": (
        lambda: problem_of(Shape(2, 4, 2, 1, 300, 16, 16), torch.float32),
        ("float32 gradients",),
    ),
    "one query": (lambda: problem_of(Shape(2, 4, 2, 1, 300, 16, 16)), ()),
    "two reasons": (lambda: problem_of(dtype=torch.float32, activation="relu"), ("float32", "activations")),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_reasons_are_named(name: str) -> None:
    make, words = PROBLEMS[name]
    found = cuda.beyond(make())
    assert len(found) == len(words)
    assert all(word in reason for word, reason in zip(words, found, strict=True))


@needs_compiler
@pytest.mark.parametrize(
    "name", sorted(name for name in PROBLEMS if not name.startswith("trained"))
)  # no matter of a call's Params
def test_reasons_are_those_of_the_kernels(name: str) -> None:
    problem, kernels, p = PROBLEMS[name][0](), Simulated(80), Params()
    spec, tensors = problem.spec, ops.taken_tensors(problem.tensors)
    tensors = (*tensors[:3], ops.expanded_bias(spec, tensors[3]), *tensors[4:])
    if spec.args.graph is not None:
        p = kernels.graph(spec, tensors, (problem.edge_bias, None, (problem.edge_attr or (None,))[0]))
    else:
        kernels.fill(p, spec, tensors)
    kernels.library.saccade_sim_forget()
    some = spec.layout.seqused_k if spec.layout.seqused_k is not None else problem.q
    for field, present in (("extra_k", problem.extra_k), ("seqused_k", spec.layout.seqused_k)):
        setattr(p, field, None if present is None else some.data_ptr())
    names = ("saccade_cuda_refuses", "saccade_cuda_decode_refuses", "saccade_cuda_gather_refuses")
    tiled, *others = (getattr(kernels.library, name) for name in names)
    for refuses in (tiled, *others):
        refuses.restype = ctypes.c_char_p
    found = cuda.beyond(problem)
    if chosen := cuda.body(problem):
        assert bool(found) == (others[chosen - 1](ctypes.byref(p)) is not None)
        return
    assert bool(found) == (tiled(ctypes.byref(p), 80) is not None)
    if not found:
        assert cuda.takes_hopper(problem) == (tiled(ctypes.byref(p), 90) is None)


def test_what_hopper_takes() -> None:
    taken = {name for name, (make, words) in PROBLEMS.items() if not words and cuda.takes_hopper(make())}
    assert {
        "plain",
        "fp16",
        "packed",
        "causal",
        "per head",
        "lengths",
        "sink",
        "softmax1",
        "softcap",
        "chunks",
        "causal chunks",
    } <= taken
    left = {"expanded", "columns apart", "odd head_dim", "keep", "segments", "bias", "alibi", "dropout"}
    assert not taken & (left | {"negative scale", "chunks and a gap"})


def test_no_gradient_asked_for_is_no_reason() -> None:
    problem = PROBLEMS["trained alibi"][0]()
    with torch.no_grad():
        assert not cuda.beyond(problem) and not cuda.beyond(PROBLEMS["trained fp32 query"][0]())


@pytest.mark.parametrize(
    ("archs", "capability", "word"),
    [
        ("80 90a", (7, 5), "sm_75; the kernels need sm_80"),
        ("80 90a", (8, 0), ""),
        ("80 90a", (8, 9), ""),
        ("80 90a", (9, 0), ""),
        ("80 90a", (10, 0), ""),
        ("90a", (9, 0), ""),
        ("90a", (8, 0), "compiled for 90a alone"),
        ("90a", (10, 0), "compiled for 90a alone"),
        ("86", (8, 0), "compiled for 86 alone"),
    ],
)
def test_gpus(archs: str, capability: tuple[int, int], word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "CUDA_ARCHS", tuple(archs.split()))
    found = cuda.against_gpu(capability)
    assert bool(found) == bool(word) and word in found


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ops, "LOADED", False)
    monkeypatch.setattr(ops, "WHY_NOT", "the operator library is missing")
    assert cuda.missing() == ["the operator library is missing"]
    monkeypatch.setattr(ops, "LOADED", True)
    monkeypatch.setattr(ops, "CUDA_ARCHS", ())
    assert "built without CUDA" in cuda.missing()[0]
    monkeypatch.setattr(ops, "CUDA_ARCHS", ("80",))
    assert cuda.missing() == ["no CUDA device"]
    assert "device cpu, not cuda" in cuda.unsupported(problem_of())


@pytest.mark.skipif(
    torch.backends.cuda.is_built() and not torch.cuda.is_available(), reason="this torch asks for a driver"
)
def test_a_gpu_call_gets_this_backend_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that only say that they lie on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(ops, "CUDA_ARCHS", ("80", "90a"))
    with FakeTensorMode():
        q = torch.empty(1, 2, 5, 16, dtype=BF16, device="cuda")
        half, single = Problem.of(q, q, q), Problem.of(*[q.float()] * 3)
        assert choose(half) is cuda and cuda.kernel(half) == "tiled sm_80"
        out, lse = cuda.run(half)
        assert out.shape == q.shape and out.device == q.device and lse.shape == (1, 2, 5)
        assert choose(single) is not cuda and reasons(single)["cuda"][0].startswith("torch.float32")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
        assert reasons(half)["cuda"] == ["T4 is sm_75; the kernels need sm_80 or later (Ampere)"]


def test_reasons_can_be_traced() -> None:
    """torch.compile looks at them where it chooses a backend; lengths stay open."""

    def run(q: Tensor) -> Tensor:
        problem = Problem.of(q, q, q, causal=True)
        assert not cuda.beyond(problem) and cuda.serves_unasked(problem)
        return saccade.attention(q, q, q, causal=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 12):  # with few queries and a length that is known, the CPU takes another kernel
        q = torch.randn(1, 2, length, 16).bfloat16()
        torch.testing.assert_close(compiled(q), run(q))


@needs_compiler
def test_weights_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights by PyTorch beside a kernel's output, with the derivatives of both."""
    monkeypatch.setattr(cuda.ops_triton, "FOUND", False)
    kernels = Simulated(80)
    monkeypatch.setattr(cuda, "attend", lambda problem, body: attend(problem, body, kernels))
    inputs = make_inputs(SMALL, BF16)
    outputs = cuda.run_with_weights(Problem.of(*inputs, Causal()), True)
    expected = attend_with_weights(Problem.of(*inputs, Causal()), True, "reference")
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)
    for a, b in zip(*(derivatives(x, inputs) for x in (outputs, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


class Chosen(Simulated):
    """By the launchers that choose between the kernels for a device."""

    def __init__(self, device: int) -> None:
        super().__init__(90)
        self.device = device

    def call(self, name: str, p: Params, seed: Tensor | None, *more: Any) -> None:
        counter = [None] if name == "saccade_cuda_forward_sm90" else []
        super().call(name.removesuffix("_sm90"), p, seed, *more, *counter)


@needs_compiler
@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [(80, {}, 80), (86, {}, 80), (90, {}, 90), (90, {"bias": torch.randn(40, 200)}, 80), (100, {}, 80)],
)
def test_a_device_gets_its_kernels(device: int, options: dict[str, Any], expected: int) -> None:
    inputs = make_inputs(Shape(1, 2, 1, 40, 200, 64, 64), BF16)
    results = []
    for kernels in (Chosen(device), Simulated(expected)):
        outputs = attend(Problem.of(*inputs, Causal(), **options), 0, kernels)
        results.append([*outputs, *torch.autograd.grad(outputs[0].float().sin().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    if not options:  # the other kernels add up in another order
        other = attend(Problem.of(*inputs, Causal()), 0, Simulated(170 - expected))[1]
        assert not torch.equal(results[0][1], other)


def test_dense_graphs_are_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless this backend is named, or Triton is missing."""
    dense, sparse = torch.ones(64, 64).bool(), torch.eye(64).bool()
    for pairs, unasked in ((dense, False), (sparse, True)):
        problem = problem_of(Shape(1, 2, 2, 64, 64, 16, 16), mask=Graph.from_dense(pairs))
        assert not cuda.beyond(problem) and cuda.kernel(problem) == "gather"
        monkeypatch.setattr(cuda.ops_triton, "FOUND", True)
        assert cuda.serves_unasked(problem) == unasked
        monkeypatch.setattr(cuda.ops_triton, "FOUND", False)
        assert cuda.serves_unasked(problem)
