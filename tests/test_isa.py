"""Every instruction set here, the emulated bf16 tiles too, on the same problems; and its machine code."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess

import pytest
import saccade
import torch
from saccade import Causal, Graph, KeyPadding, Window, ops
from saccade.testing import Shape, check_attention, make_inputs

pytestmark = pytest.mark.skipif(not ops.LOADED, reason="the operator library is not built")

# Odd sizes: tails of every vector width, of matrix tiles (16 rows, 32 columns), of blocks of 64 and 128.
SHAPES = [
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(2, 4, 2, 17, 33, 5, 7),
    Shape(1, 2, 2, 70, 131, 48, 33),
    Shape(1, 2, 1, 130, 200, 64, 64),
]


def _dtypes(isa: str) -> list[torch.dtype]:
    if isa == "emulated_bf16":  # its other dtypes are those of portable
        return [torch.bfloat16]
    return [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dense_and_causal(isa: str, shape: Shape, causal: bool) -> None:
    for dtype in _dtypes(isa):
        check_attention(make_inputs(shape, dtype), Causal() if causal else None, "cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 5.0, "dropout_p": 0.3, "seed": 7},
        {"activation": "relu"},
        {"activation": "sigmoid"},
        {"activation": "softmax1"},
    ],
    ids=str,
)
def test_options(isa: str, options: dict) -> None:
    mask = Window(20, 9) & KeyPadding(torch.tensor([33, 12]))
    for dtype in _dtypes(isa):
        check_attention(make_inputs(Shape(2, 4, 2, 17, 33, 24, 40), dtype), mask, "cpu", **options)


@pytest.mark.parametrize("reach", [(64, 64), (5, 70), (3, 1), (130, 20), (0, 250)], ids=str)
def test_edges_of_a_band(isa: str, reach: tuple[int, int]) -> None:
    """Tiles at the edge are computed in parts; what lies outside of them holds anything."""
    for dtype in _dtypes(isa):
        inputs = make_inputs(Shape(1, 2, 1, 210, 300, 20, 36), dtype)
        check_attention(inputs, Window(*reach), "cpu")
        check_attention(inputs, Window(*reach), "cpu", activation="softmax1", dropout_p=0.2, seed=3)
    check_attention(make_inputs(Shape(1, 2, 1, 210, 300, 20, 36)), Window(*reach), "cpu", activation="relu")


def test_bias_and_graph(isa: str) -> None:
    torch.manual_seed(0)
    graph = Graph.from_dense(torch.rand(70, 131) < 0.5)
    sparse = Graph.from_dense(torch.rand(70, 131) < 0.02)
    for dtype in _dtypes(isa):
        q, k, v = make_inputs(Shape(1, 2, 2, 70, 131, 32, 16), dtype)
        for mask in (graph, sparse):
            check_attention((q, k, v), mask, "cpu")
        for heads, heads_k in ((3, 3), (20, 4)):  # of one edge, beside each other in a vector, or in several
            check_attention(make_inputs(Shape(1, heads, heads_k, 70, 131, 8, 16), dtype), sparse, "cpu")
        bias = torch.randn(1, 2, 70, 131, dtype=dtype, requires_grad=True)
        check_attention((q, k, v), Causal(), "cpu", bias=bias)


def test_relative_positions(isa: str) -> None:
    for dtype in _dtypes(isa):
        inputs = make_inputs(Shape(1, 4, 2, 70, 600, 24, 16), dtype)
        table = torch.randn(31, 24).to(dtype).requires_grad_()
        check_attention(inputs, Window(300, 9), "cpu", position=saccade.Shaw(table))


def test_few_queries_over_many_keys(isa: str) -> None:
    for dtype in _dtypes(isa):
        check_attention(make_inputs(Shape(1, 4, 2, 2, 2500, 40, 24), dtype), None, "cpu")


def test_threads_change_no_bit(isa: str) -> None:
    for dtype in _dtypes(isa)[:2]:
        q, k, v = make_inputs(Shape(1, 2, 1, 200, 700, 32, 32), dtype)
        found = []
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                out, lse = saccade.attention(q, k, v, causal=True, return_lse=True, backend="cpu")
                found.append((out, lse, *torch.autograd.grad(out.float().sum() + lse.sum(), (q, k, v))))
            finally:
                torch.set_num_threads(before)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_offsets_beyond_two_to_the_31() -> None:
    """Rows that lie 2^31 elements apart; the pages between are never touched."""
    far = 2**31 + 4096
    memory = torch.empty(2 * far, dtype=torch.bfloat16)
    small = make_inputs(Shape(2, 1, 1, 64, 64, 64, 64), torch.bfloat16)
    views = []
    for n, x in enumerate(small):
        view = memory.as_strided((2, 1, 64, 64), (far, 4096, 64, 1), n * 4096)
        view.copy_(x.detach())
        views.append(view)
    got = saccade.attention(*views, causal=True, backend="cpu")
    assert torch.equal(got, saccade.attention(*small, causal=True, backend="cpu"))


@functools.lru_cache
def disassembled() -> str:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", ops.PATH]
    return subprocess.run(command, capture_output=True, text=True).stdout


# A pass over the rows of edges, or what it calls, by what the compiler puts into what.
ASKING = {
    "products": "dot_tiles",
    "products of any rows": "pair_dots",
    "sums of values": "sum_values|gather_forward_item",
    "sums by column": "add_rows|gather_columns_item",
    "features": "gather_joint_item",
}


def test_rows_of_edges_are_asked_for() -> None:
    """gcc had dropped prefetches that stood in functions of their own: nothing but time showed it."""
    from saccade import _C

    code = disassembled()
    asking: dict[str, set[str]] = {}
    for function in re.split(r"\n(?=[0-9a-f]+ <)", code):
        name, _, body = function.partition("\n")
        found = re.search(r"saccade::(\w+)::\(anonymous namespace\)::", name)
        if found and re.search(r"\b(prefetch|prfm)", body):
            asking.setdefault(found[1], set()).add(name)
    for isa in {"avx512", "avx2", "portable"} & set(_C.instruction_sets):
        for what, functions in ASKING.items():
            assert any(re.search(rf"\b({functions})\b", n) for n in asking[isa]), f"{isa}: {what}"


def test_rows_are_written_past_the_caches() -> None:
    """Sums that go to large results: such stores are compiled, which no result shows (nor that they run)."""
    from saccade import _C

    streaming = {
        found[1]
        for function in re.split(r"\n(?=[0-9a-f]+ <)", disassembled())
        if (found := re.search(r"saccade::(\w+)::\(anonymous namespace\)::edge_sum", function.split("\n")[0]))
        and re.search(r"\bv?movnt", function)
    }
    assert {"avx512", "avx2"} & set(_C.instruction_sets) <= streaming


def test_the_instructions_meant_are_there() -> None:
    from saccade import _C

    code = disassembled()
    wanted = {"amx": "tdpbf16ps", "avx512bf16": "vdpbf16ps", "avx512": "%zmm", "avx2": "%ymm"}
    for name in _C.instruction_sets:
        if name in wanted:
            assert wanted[name] in code, f"{name} was compiled without {wanted[name]}"


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no instruction set"):
        torch.ops.saccade.cpu_isa("abacus")
