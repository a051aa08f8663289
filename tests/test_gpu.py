"""What only a GPU can show, on every backend that serves it: a small grid, which the sanitizers run too."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade.testing import check_attention, pairwise, tensor_map

if not torch.cuda.is_available() or saccade.ops_triton.INTERPRETED:
    pytest.skip("needs a CUDA device and TRITON_INTERPRET=0", allow_module_level=True)

from test_attention import AXES, arrange, label

BACKENDS = [name for name in saccade.backends() if name in ("cuda", "triton")]
MASKS: dict[str, Any] = {"none": None, "causal": saccade.Causal(), "window": saccade.Window(40, 10)}


def inputs(dim: int, dtype: torch.dtype = torch.bfloat16, seqlen: int = 190) -> list[torch.Tensor]:
    return [torch.randn(2, 4, seqlen, dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]


def both(run: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    out = run(*tensors)
    return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    return x.detach().cuda().requires_grad_(x.requires_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", pairwise(AXES), ids=label)
def test_pairwise(case: dict[str, Any], backend: str) -> None:
    cpu, mask, options = arrange(case)
    tensors = tensor_map(on_gpu, cpu)
    options = {name: tensor_map(on_gpu, value) for name, value in options.items()}
    mask = None if mask is None else mask.to("cuda")
    try:
        saccade.explain(*tensors, mask, backend=backend, **options)
    except NotImplementedError:
        pytest.skip(f"not for {backend}")
    check_attention(tensors, mask, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_results_are_the_references(backend: str, mask: str, dim: int) -> None:
    q, k, v = inputs(dim)
    got = both(lambda *x: saccade.attention(*x, MASKS[mask], backend=backend), [q, k, v])
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = both(lambda *x: saccade.attention(*x, MASKS[mask], backend="reference"), wide)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_repeat(backend: str) -> None:
    tensors = inputs(64)
    runs = [
        both(lambda *x: saccade.attention(*x, causal=True, deterministic=True, backend=backend), tensors)
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_are_captured_in_a_graph(backend: str) -> None:
    q, k, v = (x.detach() for x in inputs(64))
    want = saccade.attention(q, k, v, causal=True, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = saccade.attention(q, k, v, causal=True, backend=backend)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_are_respected(backend: str) -> None:
    q, k, v = (x.detach() for x in inputs(64, seqlen=2000))
    want = saccade.attention(q * 2, k, v, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        doubled = q * 2
        got = saccade.attention(doubled, k, v, backend=backend)
    stream.synchronize()
    assert torch.equal(got, want)


def test_new_lengths_compile_nothing() -> None:
    from saccade.kernels.forward import tiled_forward

    def compiled() -> int:
        return sum(len(cache[0]) for cache in tiled_forward.device_caches.values())

    for n in (130, 131):  # head strides that 16 divides, and that it does not
        saccade.attention(*(x.detach() for x in inputs(64, seqlen=n)), causal=True, backend="triton")
    before = compiled()
    for n in (1, 17, 64, 200, 333, 1024):
        saccade.attention(*(x.detach() for x in inputs(64, seqlen=n)), causal=True, backend="triton")
    assert compiled() == before
