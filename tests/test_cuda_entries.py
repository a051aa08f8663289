"""The operators' entries for CUDA tensors (csrc/cuda_ops.cpp), run here on CPU tensors over the simulated
kernels and compared with the CPU's; and, where there is a GPU, the real ones.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import saccade
import torch
from saccade import Causal, Chunks, Graph, KeyPadding, Window, ops
from saccade.autograd import attend
from saccade.problem import Problem
from saccade.testing import ORDERS, Shape, derivatives, leaves, make_inputs
from simulated import CXX, build_operators
from torch import Tensor

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = Shape(2, 4, 2, 40, 36, 16, 16)


@pytest.fixture(scope="module")
def entries() -> Iterator[Any]:
    """torch.ops.saccade_sim: the operators of csrc/cuda_ops.cpp."""
    if not ops.LOADED or shutil.which(CXX[0]) is None:
        pytest.skip("needs the operator library and a C++ compiler")
    library = build_operators()
    registry = torch.library.Library("saccade_sim", "DEF")
    for name in ("forward", "backward", "gather_forward", "gather_backward"):
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
    "chunks": {"mask": Chunks(10, 1, align="end")},
    "softmax1": {"activation": "softmax1", "softcap": 2.0, "scale": 0.7},
}


@pytest.mark.parametrize("kind", ["contiguous", "page_table", "beam"])
def test_entries_of_a_cache(kind: str, entries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.detach() for x in make_inputs(Shape(2, 4, 2, 1, 600, 16, 8), BF16))
    where = torch.zeros(2, 1).int() if kind == "page_table" else torch.ones(2, 600).int()
    options = {} if kind == "contiguous" else {kind: where}
    results = []
    for operators in (torch.ops.saccade, entries):
        monkeypatch.setattr(torch.ops.saccade.forward, "default", operators.forward.default)
        lengths = torch.tensor([550, 7])
        results.append(saccade.attention_decode(q, k, v, lengths, return_lse=True, **options, backend="cpu"))
        monkeypatch.undo()
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)


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


GRAPH_CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "edge bias of each head": {"edge_bias": torch.randn(4, 300).requires_grad_()},
    "shared edge bias": {"edge_bias": torch.randn(300).requires_grad_()},
    "dropout": {"dropout_p": 0.4, "seed": 7, "mask": KeyPadding(torch.tensor([3, 36]))},
}


@pytest.mark.parametrize("name", GRAPH_CALLS)
@pytest.mark.parametrize("order", ["bshd", "sbhd"])
def test_entries_of_a_graph(name: str, order: str, entries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.randint(0, 36, (2, 300), generator=torch.Generator().manual_seed(1))
    options, graph = dict(GRAPH_CALLS[name]), Graph.from_edge_index(index, (36, 40))
    mask = options.pop("mask", None)
    tensors = [*make_inputs(SMALL, torch.float32, order), *leaves(options)]
    results = []
    for operators in (torch.ops.saccade, entries):
        for operator in ("gather_forward", "gather_backward"):
            overload = getattr(operators, operator).default
            monkeypatch.setattr(getattr(torch.ops.saccade, operator), "default", overload)
        outputs = attend(
            Problem.of(*tensors[:3], graph if mask is None else graph & mask, **options), ops.GATHER
        )
        results.append([*outputs, *derivatives(outputs, tensors)])
        monkeypatch.undo()
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_entries_take_expanded_results(entries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vmap gives them: one forward pass for several gradients of its output."""
    problem = Problem.of(*make_inputs(Shape(1, 2, 2, 9, 7, 16, 16), BF16), Causal())
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
    problem = Problem.of(*make_inputs(SMALL))
    order = (0, 1, 2, 3)
    call = ops.call_arguments(problem.spec, None, ops.TILED)
    with pytest.raises(RuntimeError, match="forward_sm80 does not serve tensors other than bf16 or fp16"):
        entries.forward(*(x if x is None else x.detach() for x in problem.tensors[:9]), *call, order)


@pytest.mark.skipif(not ops.CUDA_ARCHS, reason="the operator library was built without CUDA")
def test_the_library_has_entries_for_cuda() -> None:
    """It loaded in this torch, whether that knows CUDA or not."""
    for name in ("forward", "backward", "gather_forward", "gather_backward"):
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


@pytest.mark.skipif("cuda" not in saccade.backends(), reason="no GPU, or kernels not compiled")
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
def test_decode_on_a_gpu(dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in make_inputs(Shape(2, 8, 2, 3, 700, 128, 128), dtype, device="cuda"))
    lengths = torch.tensor([700, 33], device="cuda")
    got, want = (
        saccade.attention_decode(q, k, v, lengths, mask=Causal(), return_lse=True, backend=name)
        for name in ("cuda", "reference")
    )
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


@pytest.mark.skipif("cuda" not in saccade.backends(), reason="no GPU, or kernels not compiled")
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
def test_graphs_on_a_gpu(dtype: torch.dtype) -> None:
    from saccade.testing import check_attention

    index = torch.randint(0, 90, (2, 900), device="cuda")
    hub = torch.stack([torch.arange(90), torch.full((90,), 7)]).cuda().repeat(1, 5)
    graph = Graph.from_edge_index(torch.cat([index, hub], 1), 90)
    options = {"edge_bias": torch.randn(4, graph.num_edges, device="cuda").requires_grad_()}
    inputs = make_inputs(Shape(2, 4, 2, 90, 90, 64, 64), dtype, device="cuda")
    check_attention(inputs, graph, "cuda", **options)
