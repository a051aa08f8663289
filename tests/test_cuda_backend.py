"""The cuda backend: what it refuses and why, which kernels a device gets, and its operators' entries, which
run here on CPU tensors over the simulated kernels.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import saccade
import torch
from saccade import Band, Causal, Chunks, Graph, KeyPadding, Segments, Window, ops
from saccade.autograd import attend
from saccade.backends import choose, cuda, reasons
from saccade.functional import attend_with_weights
from saccade.problem import Layout, Problem
from saccade.testing import ORDERS, Shape, derivatives, leaves, make_inputs
from simulated import CXX, Params, Simulated, build_operators, needs_compiler
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


def decoding() -> Problem:
    q, k, v = make_inputs(SMALL, BF16)
    return Problem.of(q, k, v, layout=Layout(seqused_k=torch.tensor([3, 36]), max_seqlen_k=36))


def packed() -> Problem:
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in make_inputs(SMALL, BF16))
    ends = torch.tensor([0, 30, 36])
    layout = Layout(cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=30, max_seqlen_k=30)
    return Problem.of(q[:36], k, v, layout=layout)


RELATIVE = torch.zeros(4)

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
    "chunks": (lambda: problem_of(mask=Chunks(8, align="end")), ("chunks",)),
    "graph": (lambda: problem_of(mask=Graph.from_dense(torch.ones(40, 36).bool())), ("graphs",)),
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
    "cache": (decoding, ("key cache",)),
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
    "name", sorted(PROBLEMS.keys() - {"trained alibi", "shaw"})
)  # no matter of a call's Params
def test_reasons_are_those_of_the_kernels(name: str) -> None:
    problem, kernels, p = PROBLEMS[name][0](), Simulated(80), Params()
    spec, tensors = problem.spec, ops.taken_tensors(problem.tensors)
    tensors = (*tensors[:3], ops.expanded_bias(spec, tensors[3]), *tensors[4:])
    kernels.fill(p, spec, tensors)
    kernels.library.saccade_sim_forget()
    some = spec.layout.seqused_k if spec.layout.seqused_k is not None else problem.q
    for field, present in (("extra_k", problem.extra_k), ("seqused_k", spec.layout.seqused_k)):
        setattr(p, field, None if present is None else some.data_ptr())
    p.mask.num_chunks = len(spec.args.chunks) // 2
    p.mask.tile_ptr = None if spec.args.graph is None else some.data_ptr()
    refuses = kernels.library.saccade_cuda_refuses
    refuses.restype = ctypes.c_char_p
    found = cuda.beyond(problem)
    assert bool(found) == (refuses(ctypes.byref(p), 80) is not None)
    if not found:
        assert cuda.takes_hopper(problem) == (refuses(ctypes.byref(p), 90) is None)


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
    } <= taken
    left = {"expanded", "columns apart", "odd head_dim", "keep", "segments", "bias", "alibi", "dropout"}
    assert not taken & (left | {"negative scale"})


def test_no_gradient_asked_for_is_no_reason() -> None:
    problem = PROBLEMS["trained alibi"][0]()
    with torch.no_grad():
        assert not cuda.beyond(problem)


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
    assert "operator library is missing" in cuda.missing()[0]
    monkeypatch.setattr(ops, "LOADED", True)
    monkeypatch.setattr(ops, "CUDA_ARCHS", ())
    assert "built without CUDA" in cuda.missing()[0]
    monkeypatch.setattr(ops, "CUDA_ARCHS", ("80",))
    assert cuda.missing() == ["no CUDA device"]
    assert "device cpu, not cuda" in cuda.unsupported(problem_of())
    assert not cuda.serves_unasked(problem_of())


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
        assert not cuda.beyond(problem) and not cuda.serves_unasked(problem)
        return saccade.attention(q, q, q, causal=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
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
        super().call(name.removesuffix("_sm90"), p, seed, *more)


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


# ---- the operators' entries ----


@pytest.fixture(scope="module")
def entries() -> Iterator[Any]:
    """torch.ops.saccade_sim: forward and backward of csrc/cuda_ops.cpp."""
    if not ops.LOADED or shutil.which(CXX[0]) is None:
        pytest.skip("needs the operator library and a C++ compiler")
    library = build_operators()
    registry = torch.library.Library("saccade_sim", "DEF")
    for name in ("forward", "backward"):
        registry.define(str(getattr(torch.ops.saccade, name).default._schema).removeprefix("saccade::"))
    torch.ops.load_library(str(library))
    everything = ctypes.CDLL(str(library))
    everything.saccade_sim_share(None, ctypes.c_int64(2**63 - 1))
    yield torch.ops.saccade_sim
    registry._destroy()


CALLS: dict[str, dict[str, Any]] = {
    "causal": {"mask": Causal()},
    "window and sink": {"mask": Window(9, 2), "sink": torch.randn(4)},
    "bias": {"bias": torch.randn(4, 1, 36)},
    "dropout": {"dropout_p": 0.4, "seed": 7},
    "lengths": {"mask": KeyPadding(torch.tensor([3, 36]))},
    "softmax1": {"activation": "softmax1", "softcap": 2.0, "scale": 0.7},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("order", ORDERS)
def test_entries(name: str, order: str, entries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between tensors and kernels: arguments, strides, workspaces and shapes agree with the CPU's entries."""
    options = dict(CALLS[name])
    tensors = [*make_inputs(SMALL, BF16, order), *leaves(options)]
    results = []
    for operators in (torch.ops.saccade, entries):
        for operator in ("forward", "backward"):
            overload = getattr(operators, operator).default
            monkeypatch.setattr(getattr(torch.ops.saccade, operator), "default", overload)
        outputs = attend(Problem.of(*tensors[:3], **options), ops.TILED)
        results.append([*outputs, *derivatives(outputs, tensors)])
        monkeypatch.undo()
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)


def test_entries_take_expanded_results(entries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vmap gives them: one forward pass for several gradients of its output."""
    problem = problem_of(Shape(1, 2, 2, 9, 7, 16, 16), mask=Causal())
    outputs = attend(problem, ops.TILED)
    heads = [torch.randn(3, *x.shape).to(x.dtype) for x in outputs]
    results = []
    for operators in (torch.ops.saccade, entries):
        monkeypatch.setattr(torch.ops.saccade.backward, "default", operators.backward.default)
        pull = torch.func.vmap(lambda *h: torch.autograd.grad(outputs, (problem.q, problem.k), h, True))
        results.append(pull(*heads))
        monkeypatch.undo()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)


def test_entries_refuse_by_name(entries: Any) -> None:
    problem = problem_of(dtype=torch.float32)
    order = (0, 1, 2, 3)
    call = ops.call_arguments(problem.spec, None, ops.TILED)
    with pytest.raises(RuntimeError, match="forward_sm80 does not serve tensors other than bf16 or fp16"):
        entries.forward(*(x if x is None else x.detach() for x in problem.tensors[:9]), *call, order)


@pytest.mark.skipif(not ops.CUDA_ARCHS, reason="the operator library was built without CUDA")
def test_the_library_has_entries_for_cuda() -> None:
    """It loaded in this torch, whether that knows CUDA or not."""
    for name in ("forward", "backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"saccade::{name}", "CUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("saccade::weights", "CUDA")


@pytest.mark.skipif("cuda" not in saccade.backends(), reason="no GPU, or kernels not compiled")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    from saccade.testing import check_attention

    options = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in CALLS[name].items()}
    mask = options.pop("mask", None)
    mask = None if mask is None else mask.to("cuda")
    check_attention(
        make_inputs(Shape(2, 4, 2, 147, 131, 64, 64), dtype, device="cuda"), mask, "cuda", **options
    )
