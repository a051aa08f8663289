"""Relative positions that multiply the query (Shaw) inside the kernels, against a dense bias."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade import Causal, Graph, KeyPadding, Segments, Shaw, Window, ops
from saccade.backends import run as run_problem
from saccade.functional import attend_with_weights
from saccade.problem import Problem
from saccade.testing import Shape, check_attention, derivatives, make_inputs, poisoned
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = Shape(2, 4, 2, 21, 34, 6, 5)
# Query blocks, runs of keys and tiles begin and end inside.
LARGE = Shape(2, 4, 2, 150, 700, 16, 8)
MASKS: dict[str, Any] = {
    "none": lambda s: None,
    "causal": lambda s: Causal(),
    "window and padding": lambda s: Window(s.seqlen_k // 3, 2) & KeyPadding(torch.tensor([s.seqlen_k, 9])),
    "keep": lambda s: KeyPadding(torch.rand(s.batch, s.seqlen_k) < 0.6),
    "segments": lambda s: Segments(*(torch.randint(0, 3, (s.batch, n)) for n in (s.seqlen_q, s.seqlen_k))),
    "chunks": lambda s: saccade.Chunks(8, 1, align="end"),
    "graph": lambda s: Graph.from_dense(torch.rand(s.seqlen_q, s.seqlen_k) < 0.5),
}


def by_bias(q: Tensor, k: Tensor, v: Tensor, mask: Any, table: Tensor, **options: Any) -> Any:
    """The term as its definition says, laid out for every pair."""
    sq, sk, reach = q.shape[-2], k.shape[-2], table.shape[-2] // 2
    at = [[max(-reach, min(reach, j - (i + sk - sq))) + reach for j in range(sk)] for i in range(sq)]
    vectors = table[..., torch.tensor(at).view(sq, sk), :]  # [Sq, Sk, D] or [H, Sq, Sk, D]
    scale = options.get("scale", q.shape[-1] ** -0.5)
    bias = scale * (q[..., None, :] * vectors).sum(-1)
    return saccade.attention(q, k, v, mask, bias=bias, backend="reference", **options)


def check(shape: Shape, table: Tensor, mask: Any, backend: str, **options: Any) -> None:
    inputs = make_inputs(shape, torch.float64)
    table.requires_grad_()
    got = saccade.attention(*inputs, mask, position=Shaw(table), backend=backend, **options)
    want = by_bias(*inputs, mask, table, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(derivatives(got, (*inputs, table)), derivatives(want, (*inputs, table)))


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Any:
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reach", [0, 1, 4, 20, 33, 50])  # 33: as far as keys are; 50: farther
@pytest.mark.parametrize("seqlens", [(21, 34), (34, 21), (1, 34), (34, 1), (16, 16)], ids=str)
def test_every_reach(reach: int, seqlens: tuple[int, int], backend: str) -> None:
    shape = Shape(2, 4, 2, *seqlens, 6, 5)
    check(shape, torch.randn(2 * reach + 1, 6).double(), None, backend, return_lse=True)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, backend: str) -> None:
    check(SMALL, torch.randn(4, 7, 6).double(), MASKS[name](SMALL), backend, return_lse=True)


@pytest.mark.parametrize(
    "options",
    [
        {"dropout_p": 0.3, "seed": 5, "softcap": 2.0},
        {"activation": "relu", "scale": 0.7},
        {"activation": "softmax1", "scale": -0.4},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], backend: str) -> None:
    check(SMALL, torch.randn(9, 6).double(), Window(9, 4), backend, **options)


@pytest.mark.many_calls
@pytest.mark.parametrize("reach", [0, 3, 70, 300])
@pytest.mark.parametrize("name", MASKS)
def test_tiles_and_runs(name: str, reach: int, backend: str) -> None:
    check(LARGE, torch.randn(2 * reach + 1, 16).double(), MASKS[name](LARGE), backend)


@pytest.mark.parametrize("name", ["none", "graph"])
def test_several_tiles(name: str, backend: str) -> None:
    shape = Shape(2, 2, 1, 70, 150, 8, 8)
    check(shape, torch.randn(2, 81, 8).double(), MASKS[name](shape), backend)


@pytest.mark.many_calls
def test_dtypes(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        table = torch.randn(4, 41, 16).to(dtype).requires_grad_()
        check_attention(make_inputs(LARGE, dtype), Window(200, 30), backend, position=Shaw(table))


def test_beside_a_bias_and_an_extra_key(backend: str) -> None:
    inputs, table = make_inputs(SMALL, torch.float64), torch.randn(5, 6).double().requires_grad_()
    bias = torch.randn(4, 1, 34).double().requires_grad_()
    extra = {"extra_k": torch.randn(4, 6).double(), "extra_v": torch.randn(4, 5).double()}
    outs = []
    for name in (backend, "reference"):
        problem = Problem.of(*inputs, Causal(), bias=bias, position=Shaw(table), **extra)
        outs.append(run_problem(problem, name)[0])
    wanted = (*inputs, bias, table)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(derivatives(out, wanted) for out in outs))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_weights(average: bool, trains: bool, backend: str) -> None:
    inputs, position = make_inputs(SMALL, torch.float64), Shaw(torch.randn(9, 6).double())
    found = []
    with torch.set_grad_enabled(trains):
        for name in (backend, "reference"):
            problem = Problem.of(*inputs, Causal(), position=position)
            found.append(attend_with_weights(problem, average, name))
    torch.testing.assert_close(*found)


def test_packed_sequences_train(backend: str) -> None:
    lengths = torch.tensor([[5, 9], [0, 3], [17, 17], [4, 0], [11, 2]])
    cu = [torch.cat([torch.zeros(1, dtype=torch.int64), x.cumsum(0)]) for x in lengths.t()]
    q, k, v = (torch.randn(int(cu[n][-1]), h, 6).double() for n, h in ((0, 4), (1, 2), (1, 2)))
    tensors = [x.requires_grad_() for x in (q, k, v, torch.randn(4, 7, 6).double())]
    got = saccade.attention_varlen(*tensors[:3], *cu, 17, 17, position=Shaw(tensors[3]), backend=backend)
    parts = []
    for b in range(len(lengths)):
        rows, keys = (slice(int(c[b]), int(c[b + 1])) for c in cu)
        own = (x[s].transpose(0, 1) for x, s in zip(tensors, (rows, keys, keys), strict=False))
        parts.append(saccade.attention(*own, position=Shaw(tensors[3]), backend="reference").transpose(0, 1))
    torch.testing.assert_close(got, torch.cat(parts))
    torch.testing.assert_close(derivatives(got, tensors), derivatives(torch.cat(parts), tensors))


@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_caches(seqlen_q: int, backend: str) -> None:
    lengths = torch.tensor([40, 3, 0, 29])
    q, k, v = (x.detach() for x in make_inputs(Shape(4, 4, 2, seqlen_q, 40, 8, 8), torch.float64))
    position = Shaw(torch.randn(4, 11, 8).double())
    out = saccade.attention_decode(q, k, v, lengths, position=position, backend=backend)
    for b, n in enumerate(lengths.tolist()):
        want = saccade.attention(q[b], k[b, :, :n], v[b, :, :n], position=position, backend="reference")
        torch.testing.assert_close(out[b], want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_without_keys_stay_untouched(value: float, backend: str) -> None:
    inputs, table = make_inputs(Shape(2, 4, 2, 20, 30, 8, 8)), torch.randn(7, 8).requires_grad_()
    mask = KeyPadding(torch.tensor([30, 0]))
    hidden = torch.tensor([False, True])[:, None, None].expand(2, 4, 20)
    found = []
    for q in (inputs[0], poisoned(inputs[0], hidden, value)):
        tensors = (q, *inputs[1:], table)
        out = saccade.attention(*tensors[:3], mask, position=Shaw(table), backend=backend)
        found.append((out, *derivatives(out, tensors)))
    assert found[0][0][0].all() and not found[0][0][1].any()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast_leaves_the_products_wide() -> None:
    q, k, v = (x.detach() for x in make_inputs(SMALL))
    position = Shaw(100 * torch.randn(9, 6))
    with torch.autocast("cpu", torch.bfloat16):
        got = saccade.attention(q, k, v, position=position)
    rounded = (x.bfloat16() for x in (q, k, v))
    assert torch.equal(got, saccade.attention(*rounded, position=position))


def test_explain_names_the_kernels() -> None:
    if not ops.LOADED:
        pytest.skip("no operator library")
    q, k, v = make_inputs(SMALL)
    assert saccade.explain(q, k, v, position=Shaw(torch.randn(9, 6))).backend == "cpu"


@pytest.mark.skipif(not ops.LOADED, reason="the operator library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_repeats_for_any_number_of_threads(dtype: torch.dtype) -> None:
    """Of the operator: the small products around it are torch's."""
    q, k, v = (x.detach() for x in make_inputs(LARGE, dtype))
    bias = torch.randn(2, 4, 150, 41)
    problem = Problem.of(q, k, v, Window(300, 50), position=Shaw(torch.randn(41, 16).to(dtype)))
    tensors = (*problem.tensors[:4], bias, *problem.tensors[5:])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, lse = ops.forward(problem.spec, tensors, None, ops.TILED)
            heads, needs = (out, None, out, lse), 1 | 2 | 4 | 16  # of q, k, v, rel_bias
            grads = ops.backward(problem.spec, heads, tensors, None, (ops.TILED, needs))
            found.append((out, lse, *grads))
    finally:
        torch.set_num_threads(before)
    assert found[0][6].shape == bias.shape and found[0][6].isfinite().all()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(not ops.LOADED, reason="the operator library is not built")
def test_no_tensor_of_all_pairs() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            for x in found if isinstance(found, tuple | list) else (found,):
                self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
            return found

    n, reach = 4096, 16
    q, k, v = make_inputs(Shape(1, 2, 1, n, n, 16, 16))
    table = torch.randn(2 * reach + 1, 16, requires_grad=True)
    with Largest() as seen:
        out = saccade.attention(q, k, v, Window(100, 0), position=Shaw(table))
        torch.autograd.grad(out.sum(), (q, k, v, table))
    assert seen.numel == 2 * n * (2 * reach + 1)


def test_compiles_in_one_graph(backend: str) -> None:
    inputs, table = make_inputs(SMALL), torch.randn(9, 6, requires_grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return saccade.attention(q, k, v, causal=True, position=Shaw(t), backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    outs = [f(*inputs, table) for f in (run, compiled)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(derivatives(out, (*inputs, table)) for out in outs))


@pytest.mark.skipif(not ops.LOADED, reason="the operator library is not built")
def test_operator_contracts() -> None:
    inputs, table = make_inputs(SMALL), torch.randn(9, 6)
    seen: dict[str, Any] = {}

    class Capture(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "saccade":
                seen[func._schema.name] = (func, args)
            return func(*args, **(kwargs or {}))

    with Capture():
        out = saccade.attention(*inputs, position=Shaw(table), backend="cpu")
        torch.autograd.grad(out.sum(), inputs)
    assert set(seen) == {"saccade::forward", "saccade::backward"}
    for operator, args in seen.values():
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
