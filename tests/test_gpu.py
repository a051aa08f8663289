"""Results on a GPU, of every backend that serves it: a small grid, which the sanitizers run too. Streams,
graphs and compilation are in test_gpu_runtime.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade.testing import Shape, assert_no_worse_than, check_attention, make_inputs, pairwise, tensor_map
from torch import Tensor

if not torch.cuda.is_available() or saccade.ops_triton.INTERPRETED:
    pytest.skip("needs a CUDA device and TRITON_INTERPRET=0", allow_module_level=True)

from gpu_calls import GENERAL, HOPPERS, call_of
from test_attention import AXES, arrange, label

BACKENDS = [name for name in saccade.backends() if name in ("cuda", "triton")]
MASKS: dict[str, Any] = {"none": None, "causal": saccade.Causal(), "window": saccade.Window(40, 10)}


DEVICE = "cuda"
on_backends = pytest.mark.parametrize("backend", BACKENDS)


def inputs(dim: int, dtype: torch.dtype = torch.bfloat16, seqlen: int = 190) -> list[Tensor]:
    return [torch.randn(2, 4, seqlen, dim, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)]


def both(run: Any, tensors: list[Tensor]) -> list[Tensor]:
    out = run(*tensors)
    return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]


def on_gpu(x: Tensor) -> Tensor:
    return x.detach().to(DEVICE).requires_grad_(x.requires_grad)


@on_backends
@pytest.mark.parametrize("case", pairwise(AXES), ids=label)
def test_pairwise(case: dict[str, Any], backend: str) -> None:
    cpu, mask, options = arrange(case)
    tensors = tensor_map(on_gpu, cpu)
    options = {name: tensor_map(on_gpu, value) for name, value in options.items()}
    mask = None if mask is None else mask.to(DEVICE)
    try:
        saccade.explain(*tensors, mask, backend=backend, **options)
    except NotImplementedError:
        pytest.skip(f"not for {backend}")
    check_attention(tensors, mask, backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads_k", "dim", "features"), [(2, 32, 16), (1, 19, 3), (2, 1, 8)])
def test_edge_features_join_scores(heads_k: int, dim: int, features: int, dtype: torch.dtype) -> None:
    """Triton's, with a hub; every gradient, and the same bits again."""
    index = torch.cat(
        [torch.randint(300, (2, 5000)), torch.stack([torch.arange(300), torch.full((300,), 7)])], 1
    )
    graph = saccade.Graph.from_edge_index(index, 300).to(DEVICE)
    sizes = ((2, dim), (5300, features), (2, dim, features))
    weight, e, w = (torch.randn(size, device=DEVICE, requires_grad=True) for size in sizes)
    score = saccade.GATv2(weight, edge_attr=(e, w))
    q, k, v = map(on_gpu, make_inputs(Shape(1, 2, heads_k, 300, 300, dim, 32), dtype))
    check_attention((q, k, v), graph, "triton", score=score)
    runs = [
        both(lambda *x: saccade.attention(*x[:3], graph, score=score), [q, k, v, weight, e, w])
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@on_backends
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_results_are_the_references(backend: str, mask: str, dim: int) -> None:
    q, k, v = inputs(dim)
    got = both(lambda *x: saccade.attention(*x, MASKS[mask], backend=backend), [q, k, v])
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = both(lambda *x: saccade.attention(*x, MASKS[mask], backend="reference"), wide)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2)


@on_backends
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_more_items_than_multiprocessors(backend: str, mask: str, dim: int) -> None:
    """Blocks that stay take a second item, with the rings as the first one left them."""
    shape = (4, 16, 601, dim)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    got = both(lambda *x: saccade.attention(*x, MASKS[mask], backend=backend), [q, k, v])
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = both(lambda *x: saccade.attention(*x, MASKS[mask], backend="reference"), wide)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2)


@on_backends
def test_results_repeat(backend: str) -> None:
    tensors = inputs(64)
    runs = [
        both(lambda *x: saccade.attention(*x, causal=True, deterministic=True, backend=backend), tensors)
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@on_backends
@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_general_calls(backend: str, name: str, dim: int) -> None:
    """What Hopper's own kernels leave to those of sm_80. racecheck runs whatever is called general here."""
    tensors, mask, options = call_of(name, dim, DEVICE)
    check_attention(tensors, mask, backend, **options)


@on_backends
@pytest.mark.parametrize("name", HOPPERS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_calls_beside_bands(backend: str, name: str, dim: int) -> None:
    """What Hopper's own kernels take too."""
    tensors, mask, options = call_of(name, dim, DEVICE)
    check_attention(tensors, mask, backend, **options)


@on_backends
@pytest.mark.parametrize("kind", ["rows", "pages", "beam"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_general_decode(backend: str, kind: str, dim: int) -> None:
    batch, capacity, page = 3, 1040, 16
    rows = (batch * capacity // page, 2, page) if kind == "pages" else (batch, 2, capacity)
    q = torch.randn(batch, 8, 2, dim, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(*rows, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    lengths = torch.tensor([1040, 1, 517], device=DEVICE)
    options: dict[str, Any] = {}
    if kind == "pages":
        options["page_table"] = torch.randperm(rows[0]).view(batch, -1).int().to(DEVICE)
    if kind == "beam":
        options["beam"] = torch.randint(batch, (batch, capacity)).int().to(DEVICE)
    got, plain, exact = (
        saccade.attention_decode(*tensors, lengths, backend=name, **options)
        for name, tensors in (
            (backend, (q, k, v)),
            ("reference", (q, k, v)),
            ("reference", tuple(x.double() for x in (q, k, v))),
        )
    )
    assert_no_worse_than(got, plain, exact, factor=3.0)


def edges(nodes: int, count: int) -> saccade.Graph:
    """A quarter of the edges end at one node; some stand twice."""
    index = torch.randint(nodes, (2, count))
    index[1, : count // 4] = 7
    return saccade.Graph.from_edge_index(index.to(DEVICE), nodes).prepare()


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_general_graph(backend: str, dtype: torch.dtype, dim: int) -> None:
    graph = edges(600, 9000)
    tensors = tuple(
        torch.randn(2, 600, dim, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    bias = torch.randn(2, graph.num_edges, device=DEVICE, requires_grad=True)
    check_attention(tensors, graph, backend, edge_bias=bias)  # type: ignore[arg-type]


@on_backends
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_packed_sequences(backend: str, dim: int) -> None:
    ends = torch.tensor([0, 0, 130, 131, 400], device=DEVICE)
    packed = [
        torch.randn(400, 4, dim, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]
    wide = [x.detach().double().requires_grad_() for x in packed]

    def run(name: str) -> Any:
        return lambda *x: saccade.attention_varlen(*x, ends, ends, 269, 269, causal=True, backend=name)

    for a, b in zip(both(run(backend), packed), both(run("reference"), wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2)


@on_backends
@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)], ids=str)
def test_empty_tensors(backend: str, sizes: tuple[int, ...]) -> None:
    batch, heads, sq, sk = sizes
    shapes = ((batch, heads, sq, 64), (batch, heads, sk, 64), (batch, heads, sk, 64))
    tensors = [torch.randn(s, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    results = both(lambda *x: saccade.attention(*x, causal=True, backend=backend), tensors)
    assert not any(x.any() for x in results)


@on_backends
def test_far_rows(backend: str) -> None:
    """Tensors of more than 2^31 elements."""
    heads, rows, dim = 18, (1 << 20) + 77, 128
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB")
    q, k, v = (torch.randn(1, heads, rows, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    out = saccade.attention(q, k, v, saccade.Window(63, 0), backend=backend)
    last = [x[:, -1:, -200:].double() for x in (q, k, v)]
    want = saccade.attention(*last, saccade.Window(63, 0), backend="reference")[:, :, 64:]
    torch.testing.assert_close(out[:, -1:, -136:].double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="no CUDA kernels")
def test_hoppers_kernel_is_chosen() -> None:
    kernel = saccade.explain(*inputs(128), saccade.Causal(), backend="cuda").kernel
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert kernel == ("tiled sm_90" if hopper else "tiled sm_80")


@pytest.mark.skipif("triton" not in BACKENDS, reason="no triton")
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
