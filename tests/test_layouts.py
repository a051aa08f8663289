"""Layouts and promises that hold for every option: packed sequences, caches, strides, poison, edges of the
size range, merging, repeatability, and torch's own entry point."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saccade
import torch
import torch.nn.functional as F
from saccade import Causal, Graph, KeyPadding, Window, ops
from saccade.testing import ORDERS, Shape, derivatives, make_inputs, poisoned
from torch import Tensor

LENGTHS = [(3, 5), (0, 4), (70, 131), (1, 1), (5, 0), (9, 2)]


def packed(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], tuple[int, int]]:
    totals = [sum(n) for n in zip(*LENGTHS, strict=True)]
    shapes = ((totals[0], 4, 8), (totals[1], 2, 8), (totals[1], 2, 6))
    tensors = [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]
    cu = [torch.tensor([0, *itertools.accumulate(n)]) for n in zip(*LENGTHS, strict=True)]
    return tensors, cu, (max(n for n, _ in LENGTHS), max(n for _, n in LENGTHS))


VARLEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window, padding": {"mask": Window(4, 1) & KeyPadding(torch.tensor([4, 4, 100, 0, 0, 2]))},
    "chunks": {"mask": saccade.Chunks(3, 1)},
    "alibi, sink": {"position": saccade.ALiBi(torch.rand(4)), "sink": torch.randn(4)},
    "t5, softcap": {"position": saccade.T5(torch.randn(8, 4)), "softcap": 2.0},
    "rope": {"position": saccade.RoPE(), "causal": True},
    "shaw": {"position": saccade.Shaw(torch.randn(5, 8))},
    "additive": {"score": saccade.Additive(torch.randn(8))},
    "relu": {"activation": "relu"},
}


def one_by_one(tensors: list[Tensor], cu: list[Tensor], options: dict[str, Any], lse: bool) -> list[Any]:
    found = []
    for b, (_, sk) in enumerate(LENGTHS):
        rows, keys = (slice(int(c[b]), int(c[b + 1])) for c in cu)
        q, k, v = (x[r].transpose(0, 1) for x, r in zip(tensors, (rows, keys, keys), strict=True))
        own = dict(options)
        mask = own.pop("mask", None)
        if mask is not None:
            parts = [own_part(part, b, sk) for part in mask.parts]
            own["mask"] = parts[0] if len(parts) == 1 else parts[0] & parts[1]
        found.append(saccade.attention(q, k, v, **own, return_lse=lse, backend="reference"))
    return found


def own_part(part: saccade.Mask, b: int, sk: int) -> saccade.Mask:
    if isinstance(part, KeyPadding) and part.lengths is not None:
        return KeyPadding(int(part.lengths[b].clamp(max=sk)))
    return saccade.Chunks(part.size, part.left, align="end") if isinstance(part, saccade.Chunks) else part


def test_a_generous_max_seqlen_costs_nothing() -> None:
    """On the CPU, where the longest sequence is known: 2^40 places would take hours."""
    cu, x = torch.tensor([0, 3, 9]), torch.randn(9, 2, 8, requires_grad=True)
    for options in ({"causal": True}, {"position": saccade.ALiBi(saccade.ALiBi.default_slopes(2))}):
        found = [
            saccade.attention_varlen(x, x, x, cu, cu, n, n, backend="cpu", **options)
            for n in (6, 1 << 40, np.int64(7))
        ]
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in found]
        assert all(torch.equal(out, found[0]) for out in found)
        assert all(torch.equal(grad, grads[0]) for grad in grads)


@pytest.mark.parametrize("name", VARLEN)
def test_varlen_is_each_sequence_by_itself(name: str, backend: str) -> None:
    tensors, cu, longest = packed()
    options = VARLEN[name]
    lse = options.get("activation") != "relu"
    try:
        got = saccade.attention_varlen(*tensors, *cu, *longest, **options, return_lse=lse, backend=backend)
    except NotImplementedError:
        pytest.skip(f"not for {backend}")
    parts = one_by_one(tensors, cu, options, lse)
    outs = [p[0] if lse else p for p in parts]
    want = torch.cat([o.transpose(0, 1) for o in outs])
    torch.testing.assert_close(got[0] if lse else got, want)
    if lse:
        torch.testing.assert_close(got[1], torch.cat([p[1] for p in parts], 1))
        want = (want, torch.cat([p[1] for p in parts], 1))
    torch.testing.assert_close(derivatives(got, tensors), derivatives(want, tensors))


@pytest.mark.parametrize("kind", ["contiguous", "pages", "beam"])
@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decode_reads_what_is_in_use(kind: str, seqlen_q: int, dtype: torch.dtype, backend: str) -> None:
    # 40 pages of `size` keys
    size = 4 if backend == "triton" else 16
    lengths = torch.tensor([600, 3, 0, 257]) * size // 16
    q, k, v = (x.detach() for x in make_inputs(Shape(4, 4, 2, seqlen_q, 40 * size, 16, 8), dtype))
    options: dict[str, Any] = {}
    caches = [k, v]
    if kind == "pages":
        table = torch.randperm(160)[: 40 * 4].view(4, 40).int()
        caches = [torch.full((160, 2, size, x.shape[-1]), float("nan"), dtype=dtype) for x in (k, v)]
        for cache, x in zip(caches, (k, v), strict=True):
            cache[table.long()] = x.unflatten(2, (40, size)).transpose(1, 2)
        options["page_table"] = table
    if kind == "beam":
        beam = torch.randint(0, 4, (4, 40 * size)).int()
        options["beam"] = beam
        k, v = (x[beam.long(), :, torch.arange(40 * size)].transpose(1, 2) for x in (k, v))
    caches = [c.clone() for c in caches]
    if kind == "contiguous":
        for b, n in enumerate(lengths.tolist()):
            caches[0][b, :, n:] = caches[1][b, :, n:] = float("nan")
    for mask, sink in ((None, None), (Causal(), torch.randn(4)), (Window(100, 0), None)):
        got = saccade.attention_decode(
            q, *caches, lengths, mask=mask, sink=sink, return_lse=True, backend=backend, **options
        )
        for b, n in enumerate(lengths.tolist()):
            want = saccade.attention(
                q[b], k[b, :, :n], v[b, :, :n], mask, sink=sink, return_lse=True, backend="reference"
            )
            # Matrix instructions take the weights rounded to bf16.
            loose = {"rtol": 2e-2, "atol": 2e-3} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close((got[0][b], got[1][b]), want, **loose)


@pytest.mark.parametrize("order", ORDERS)
def test_output_lies_in_memory_as_q(order: str, backend: str) -> None:
    q, k, v = make_inputs(Shape(2, 3, 3, 4, 5, 8, 8), order=order)
    out = saccade.attention(q, k, v, backend=backend)
    assert out.stride() == q.stride()
    wide = torch.randn(2, 3, 4, 16)[..., ::2]
    assert saccade.attention(wide, k, v, backend=backend).is_contiguous()
    offset = torch.randn(1000)[3:].as_strided((2, 3, 4, 8), (1, 60, 11, 2))
    torch.testing.assert_close(
        saccade.attention(offset, k, v, backend=backend),
        saccade.attention(offset.contiguous(), k, v, backend=backend),
    )
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]


def test_unbatched_is_a_batch_of_one(backend: str) -> None:
    q, k, v = (x[0] for x in make_inputs(Shape(1, 4, 2, 5, 7, 8, 6)))
    mask = KeyPadding(torch.tensor([True] * 5 + [False] * 2)) & Causal()
    got = saccade.attention(q, k, v, mask, bias=torch.ones(5, 1), return_lse=True, backend=backend)
    want = saccade.attention(q[None], k[None], v[None], mask, return_lse=True, backend=backend)
    assert got[0].shape == (4, 5, 6) and got[1].shape == (4, 5)
    torch.testing.assert_close((got[0][None], got[1][None] - 1), want)


@pytest.mark.parametrize("zero", ["batch", "heads", "seqlen_q", "seqlen_k"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_sizes_of_zero(zero: str, activation: str, backend: str) -> None:
    sizes = {
        "batch": 2,
        "heads": 2,
        "heads_k": 2,
        "seqlen_q": 3,
        "seqlen_k": 4,
        "head_dim": 5,
        "head_dim_v": 6,
        zero: 0,
    }
    sizes["heads_k"] = sizes["heads"]
    q, k, v = make_inputs(Shape(**sizes))
    sink = torch.ones(sizes["heads"], requires_grad=True)
    softmax = activation == "softmax"
    got = saccade.attention(
        q,
        k,
        v,
        causal=True,
        activation=activation,
        sink=sink if softmax else None,
        return_lse=softmax,
        backend=backend,
    )
    out = got[0] if softmax else got
    assert out.shape == (*q.shape[:-1], 6) and not out.any()
    if softmax:
        assert bool((got[1] == 1).all()), "the lse of a row without keys is its sink's logit"
    assert not any(
        g.any() for g in torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True) if g is not None
    )


@pytest.mark.parametrize("activation", ["softmax", "relu", "sigmoid", "softmax1"])
@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.many_calls)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_poison_that_no_row_keeps_goes_nowhere(
    activation: str, value: float, dtype: torch.dtype, backend: str
) -> None:
    q, k, v = make_inputs(Shape(2, 2, 1, 20, 90, 16, 16), dtype)
    lengths = torch.tensor([0, 50])
    unseen = (torch.arange(90) >= lengths[:, None])[:, None]
    graph = Graph.from_dense((torch.rand(20, 90) < 0.1) & (torch.arange(90) < 50))
    for mask in (KeyPadding(lengths), KeyPadding(lengths) & Causal(), graph & KeyPadding(lengths)):
        options = {"activation": activation, "backend": backend, "dropout_p": 0.2, "seed": 1}
        clean = [q, k, v]
        dirty = [
            poisoned(q, (lengths == 0)[:, None, None].expand(2, 2, 20), value),
            poisoned(k, unseen, value),
            poisoned(v, unseen, value),
        ]
        outs = [saccade.attention(*x, mask, **options) for x in (clean, dirty)]
        assert torch.equal(*outs)
        grads = [derivatives(o, x) for o, x in zip(outs, (clean, dirty), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        assert not grads[1][1][unseen].any() and not outs[0][0].any()


def test_rows_of_minus_infinity_are_empty_rows(backend: str) -> None:
    q, k, v = make_inputs(Shape(1, 2, 2, 3, 4, 8, 8))
    bias = torch.zeros(3, 4)
    bias[1] = -torch.inf
    bias.requires_grad_()
    out, lse = saccade.attention(q, k, v, bias=bias, return_lse=True, backend=backend)
    assert not out[:, :, 1].any() and bool((lse[:, :, 1] == -torch.inf).all())
    grads = torch.autograd.grad(out.sum(), (q, k, v, bias))
    assert all(g.isfinite().all() for g in grads) and not grads[0][:, :, 1].any() and not grads[3][1].any()


def test_sink_of_an_empty_row_hears_its_lse_alone(backend: str) -> None:
    q, k, v = make_inputs(Shape(2, 2, 2, 3, 4, 8, 8))
    sink = torch.tensor([0.5, -1.0], requires_grad=True)
    out, lse = saccade.attention(
        q, k, v, KeyPadding(torch.tensor([0, 0])), sink=sink, return_lse=True, backend=backend
    )
    torch.testing.assert_close(lse, sink.detach()[None, :, None].expand(2, 2, 3))
    (got,) = torch.autograd.grad((lse.sum() + out.sum()), sink)
    torch.testing.assert_close(got, torch.full((2,), 6.0))


def test_merge_joins_disjoint_keys(backend: str) -> None:
    q, k, v = make_inputs(Shape(2, 4, 2, 5, 9, 8, 8), torch.float64)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    lengths = KeyPadding(torch.tensor([2, 3]))
    whole = saccade.attention(q, k, v, sink=sink, return_lse=True, backend=backend)
    parts = [
        saccade.attention(q, k[:, :, a:b], v[:, :, a:b], sink=s, return_lse=True, backend=backend)
        for a, b, s in ((0, 3, None), (3, 3, None), (3, 9, sink))
    ]
    joined = saccade.merge(*zip(*parts, strict=True))
    torch.testing.assert_close(joined, whole)
    inputs = (q, k, v, sink)
    torch.testing.assert_close(derivatives(joined, inputs), derivatives(whole, inputs))
    nothing = saccade.attention(
        q, k[:, :, :3], v[:, :, :3], lengths & saccade.Band(-50, None), return_lse=True, backend=backend
    )
    out, lse = saccade.merge([nothing[0], nothing[0]], [nothing[1], nothing[1]])
    assert not out.any() and bool((lse == -torch.inf).all())
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.many_calls
def test_repeats_bit_for_bit_for_any_number_of_threads(backend: str) -> None:
    inputs = make_inputs(Shape(2, 4, 2, 150, 300, 32, 32))
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            out = saccade.attention(*inputs, causal=True, deterministic=True, backend=backend)
            found.append([out, *derivatives(out, inputs)])
    finally:
        torch.set_num_threads(threads)
    if backend != "reference":  # torch.matmul makes no such promise
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))


SDPA: dict[str, tuple[tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "plain": (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)), {}),
    "causal is top-left": (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)), {"is_causal": True}),
    "three dimensions": (((3, 5, 8), (3, 7, 8), (3, 7, 6)), {"is_causal": True}),
    "two dimensions": (((5, 8), (7, 8), (7, 6)), {}),
    "five dimensions": (
        ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 6)), {"attn_mask": torch.rand(2, 1, 1, 1, 7) < 0.7}
    ),
    "broadcast batch": (((2, 3, 5, 8), (1, 3, 7, 8), (2, 1, 7, 6)), {}),
    "float mask": (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)), {"attn_mask": torch.randn(5, 7)}),
    "float mask, three": (((3, 5, 8), (3, 7, 8), (3, 7, 6)),
     {"attn_mask": torch.randn(3, 5, 7)}),
    "boolean mask": (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
     {"attn_mask": torch.rand(2, 1, 5, 7) < 0.8}),
    "padding": (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
     {"attn_mask": torch.arange(7) < torch.tensor([3, 6])[:, None, None, None]}),
    "padding, one row": (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
     {"attn_mask": (torch.arange(7) < 4)[None]}),
    "gqa, scale": (((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)), {"enable_gqa": True, "scale": 0.3}),
}  # fmt: skip


@pytest.mark.parametrize("name", SDPA)
def test_scaled_dot_product_attention_is_that_of_torch(name: str) -> None:
    shapes, options = SDPA[name]
    tensors = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    options = {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()
    }
    got = saccade.scaled_dot_product_attention(*tensors, **options)
    want = F.scaled_dot_product_attention(*tensors, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(derivatives(got, tensors), derivatives(want, tensors))


@pytest.mark.skipif(
    not ops.LOADED or not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages here"
)
def test_large_results_ask_for_large_pages() -> None:
    q = torch.randn(1, 8, 8192, 64)
    out = saccade.attention(q, q, q, window=(1, 1), backend="cpu")
    middle = out.data_ptr() + out.nbytes // 2
    flags = ""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]  # an address range, or a field of the range above
        if "-" in head and not head.endswith(":"):
            low, high = (int(x, 16) for x in head.split("-"))
            inside = low <= middle < high
        elif inside and line.startswith("VmFlags"):
            flags = line
    assert " hg" in flags


DECODE: dict[str, dict[str, Any]] = {
    "dropout": {"dropout_p": 0.4, "seed": 5},
    "additive": {"score": saccade.Additive(torch.linspace(-1, 1, 32).view(4, 8))},
    "gatv2": {"score": saccade.GATv2(torch.linspace(-1, 1, 32).view(4, 8)), "softcap": 2.0},
    "window of each head": {"mask": Window(torch.tensor([3, 40, 250, 0]), 2)},
    "alibi": {"position": saccade.ALiBi(torch.tensor([0.5, 0.1, 0.0, -0.1]))},
    "segments": {"mask": saccade.Segments(torch.ones(2, 66).int(), (torch.arange(600) % 3).expand(2, -1))},
}


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("seqlen_q", [2, pytest.param(66, marks=pytest.mark.many_calls)])
def test_decode_takes_every_option(name: str, seqlen_q: int, backend: str) -> None:
    q, k, v = (x.detach() for x in make_inputs(Shape(2, 4, 2, seqlen_q, 600, 8, 6), torch.float64))
    arguments = (q, k, v, torch.tensor([600, 77]))
    want = saccade.attention_decode(*arguments, **DECODE[name], return_lse=True, backend="reference")
    got = saccade.attention_decode(*arguments, **DECODE[name], return_lse=True, backend=backend)
    torch.testing.assert_close(got, want)


def test_few_queries_over_many_keys_keep_what_their_head_keeps(backend: str) -> None:
    q, k, v = make_inputs(Shape(2, 4, 2, 2, 300, 8, 6), torch.float64)
    mask = Window(torch.tensor([3, 40, 250, 0]), torch.tensor([0, 1, 0, 0]))
    want = saccade.attention(q, k, v, mask, return_lse=True, backend="reference")
    torch.testing.assert_close(saccade.attention(q, k, v, mask, return_lse=True, backend=backend), want)


@pytest.mark.parametrize("score", ["dot", pytest.param("gatv2", marks=pytest.mark.many_calls)])
def test_poison_goes_nowhere_below_a_softcap(score: str, backend: str) -> None:
    q, k, v = make_inputs(Shape(2, 2, 1, 20, 90, 16, 16))
    unseen = (torch.arange(90) >= torch.tensor([0, 50])[:, None])[:, None]
    dirty = [q, poisoned(k, unseen), poisoned(v, unseen)]
    options: dict[str, Any] = {"softcap": 2.0, "backend": backend}
    if score == "gatv2":
        options["score"] = saccade.GATv2(torch.linspace(-1, 1, 16))
    graph = Graph.from_dense(torch.rand(20, 90) < 0.1)
    for mask in (KeyPadding(keep=~unseen[:, 0]), graph & KeyPadding(keep=~unseen[:, 0])):
        outs = [saccade.attention(*x, mask, **options) for x in ((q, k, v), dirty)]
        assert torch.equal(*outs)
        grads = [derivatives(o, x) for o, x in zip(outs, ((q, k, v), dirty), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_sequences_and_no_keys(backend: str) -> None:
    empty, cu = torch.zeros(0, 4, 8), torch.zeros(1, dtype=torch.int32)
    out, lse = saccade.attention_varlen(empty, empty, empty, cu, cu, 0, 0, return_lse=True, backend=backend)
    assert out.shape == (0, 4, 8) and lse.shape == (4, 0)
    q, k, v = make_inputs(Shape(2, 4, 2, 3, 0, 8, 6))
    keep = KeyPadding(keep=torch.zeros(2, 0, dtype=torch.bool))
    for mask in (keep, saccade.Segments(torch.zeros(2, 3).int(), torch.zeros(2, 0).int())):
        out, lse = saccade.attention(q, k, v, mask, return_lse=True, backend=backend)
        assert out.shape == (2, 4, 3, 6) and not out.any() and bool((lse == -torch.inf).all())


def test_a_trained_sink_decodes_without_gradients() -> None:
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 300, 8)
    sink, lengths = torch.nn.Parameter(torch.randn(2)), torch.tensor([300])
    with torch.no_grad():
        got = saccade.attention_decode(q, k, k, lengths, sink=sink, backend="cpu")
    torch.testing.assert_close(got, saccade.attention(q, k, k, sink=sink).detach())
    with pytest.raises(NotImplementedError, match="gradients through a key cache"):
        saccade.attention_decode(q, k, k, lengths, sink=sink, backend="cpu")


@pytest.mark.parametrize("call", ["decode", "dense", "packed"])
def test_no_heads(call: str, backend: str) -> None:
    q, k = torch.randn(1, 0, 1, 8), torch.randn(1, 0, 300, 8)
    if call == "decode":
        out = saccade.attention_decode(q, k, k, torch.tensor([300]), backend=backend)
    elif call == "dense":
        out = saccade.attention(q, k, k, backend=backend)
    else:
        ends = torch.tensor([0, 1])
        q = torch.randn(1, 0, 8)
        out = saccade.attention_varlen(q, q, q, ends, ends, 1, 1, backend=backend)
    assert out.shape == q.shape


def test_merge_leaves_out_what_empty_parts_hold() -> None:
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    empty = torch.full_like(lse, -torch.inf)
    merged = saccade.merge([out, torch.full_like(out, torch.nan)], [lse, empty])
    torch.testing.assert_close(merged, (out, lse))
    assert bool(saccade.merge([out * torch.nan] * 2, [empty] * 2)[0].eq(0).all())
