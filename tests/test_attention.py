"""Every option on every backend against fp64, by the yardstick; pairwise by default."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import saccade
import torch
from saccade.testing import Shape, check_attention, make_inputs, pairwise
from torch import Tensor

SIZES = [(1, 1), (1, 147), (17, 33), (53, 29), (113, 203), (128, 128), (65, 64)]
MASKS = [
    "none", "causal", "causal-start", "window", "window-start", "band", "empty-band", "head-window",
    "lengths", "keep", "segments", "chunks", "graph", "causal&lengths", "graph&causal&keep", "all-empty",
]  # fmt: skip
AXES: dict[str, list[Any]] = {
    "size": SIZES,
    "mask": MASKS,
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "heads": [(4, 4), (4, 2), (3, 1)],
    "dims": [(16, 16), (5, 7), (1, 1), (64, 64), (33, 20)],
    "order": ["bhsd", "bshd", "sbhd", "bhds"],
    "bias": [None, (0, 1, 2, 3), (1, 3), (3,), "-inf", "float32"],
    "position": [None, "alibi", "t5", "rope", "shaw", "transformer-xl"],
    "score": ["dot", "additive", "gatv2"],
    "activation": ["softmax", "relu", "sigmoid", "softmax1"],
    "sink": [False, True],
    "softcap": [None, 2.0],
    "dropout_p": [0.0, 0.3],
    "scale": [None, 0.5],
}


def make_mask(name: str, shape: Shape) -> saccade.Mask | None:
    sq, sk, batch = shape.seqlen_q, shape.seqlen_k, shape.batch
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, sk + 1, (batch,), generator=draw)
    keep = torch.rand(batch, sk, generator=draw) < 0.7
    ids = [torch.randint(0, 3, (batch, n), generator=draw) for n in (sq, sk)]
    graph = saccade.Graph.from_dense(torch.rand(sq, sk, generator=draw) < 0.3)
    bounds = torch.randint(0, 20, (shape.heads,), generator=draw)
    masks: dict[str, Any] = {
        "none": None,
        "causal": saccade.Causal(),
        "causal-start": saccade.Causal(align="start"),
        "window": saccade.Window(7, 3),
        "window-start": saccade.Window(5, None, align="start"),
        "band": saccade.Band(20, -2),
        "empty-band": saccade.Band(-30, None),
        "head-window": saccade.Window(bounds, 2),
        "lengths": saccade.KeyPadding(lengths),
        "keep": saccade.KeyPadding(keep),
        "segments": saccade.Segments(*ids),
        "chunks": saccade.Chunks(8, 1, align="end"),
        "graph": graph,
        "causal&lengths": saccade.Causal() & saccade.KeyPadding(lengths),
        "graph&causal&keep": graph & saccade.Causal(align="start") & saccade.KeyPadding(keep),
        "all-empty": saccade.KeyPadding(torch.zeros(batch, dtype=torch.int64)),
    }
    return masks[name]


def make_position(name: str | None, shape: Shape) -> Any:
    def draw(*size: int) -> Tensor:
        return torch.randn(size).requires_grad_()

    heads, dim = shape.heads, shape.head_dim
    return {
        None: lambda: None,
        "alibi": lambda: saccade.ALiBi((draw(heads) / 16).detach().requires_grad_()),
        "t5": lambda: saccade.T5(draw(8, heads), max_distance=40),
        "rope": lambda: saccade.RoPE(dim=dim - dim % 2) if dim > 1 else None,
        "shaw": lambda: saccade.Shaw(draw(9, dim)),
        "transformer-xl": lambda: saccade.TransformerXL(
            draw(shape.seqlen_q + shape.seqlen_k - 1, dim), draw(heads, dim), draw(heads, dim)
        ),
    }[name]()


def make_score(name: str, shape: Shape) -> Any:
    weight = torch.randn(shape.heads, shape.head_dim) / shape.head_dim**0.5
    weight.requires_grad_()
    return {"dot": "dot", "additive": saccade.Additive(weight), "gatv2": saccade.GATv2(weight, 0.1)}[name]


def make_bias(kind: Any, shape: Shape, dtype: torch.dtype) -> Tensor | None:
    if kind is None:
        return None
    full = (shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k)
    dims = kind if isinstance(kind, tuple) else (0, 1, 2, 3)
    bias = torch.randn([n if d in dims else 1 for d, n in enumerate(full)][min(dims) :])
    if kind == "-inf":
        bias.masked_fill_(torch.rand(bias.shape) < 0.3, -torch.inf)
    return bias.to(torch.float32 if kind == "float32" else dtype).requires_grad_()


def arrange(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Tensor, Tensor, Tensor], Any, dict[str, Any]]:
    """A case of the axes as arguments; what does not go together is left out."""
    case = dict(case)
    if case["score"] != "dot" and case["position"] in ("shaw", "transformer-xl"):
        case["position"] = None
    if case["activation"] == "relu" and case["position"] == "rope" and case["dtype"].itemsize == 2:
        case["position"] = None  # turned in 16 bits, a logit may cross 0, where relu's slope jumps
    # The yardstick compares two largest errors: few numbers would make that a matter of luck.
    pairs = case["size"][0] * case["size"][1]
    batch = 2 if pairs > 1000 else 64 if pairs == 1 else 16
    if "interpreted" in case:
        batch = 1 if pairs > 1000 else 4
    shape = Shape(batch, *case["heads"], *case["size"], *case["dims"])
    softmax = case["activation"] in ("softmax", "softmax1")
    options = {
        "bias": make_bias(case["bias"], shape, case["dtype"]),
        "position": make_position(case["position"], shape),
        "score": make_score(case["score"], shape),
        "activation": case["activation"],
        "sink": torch.randn(shape.heads).requires_grad_()
        if case["sink"] and case["activation"] == "softmax"
        else None,
        "softcap": case["softcap"],
        "dropout_p": case["dropout_p"],
        "seed": 1234567890123,
        "scale": case["scale"],
        "return_lse": softmax,
    }
    inputs = make_inputs(shape, case["dtype"], case["order"], seed=seed)
    return inputs, make_mask(case["mask"], shape), options


def run_case(case: dict[str, Any], backend: str, seed: int = 0) -> None:
    inputs, mask, options = arrange(case, seed)
    try:
        saccade.explain(*inputs, mask, backend=backend, **options)
    except NotImplementedError:
        pytest.skip(f"not for {backend}")
    check_attention(inputs, mask, backend, **options)


def label(case: dict[str, Any]) -> str:
    return "-".join(str(x).replace(" ", "").replace("torch.", "") for x in case.values())


CASES = pairwise(AXES)
# An interpreter takes its milliseconds for every tile, and for every column of an additive score.
INTERPRETED: dict[str, list[Any]] = {
    **AXES,
    "size": [(1, 1), (1, 70), (17, 33), (53, 29), (70, 90)],
    "dims": [(16, 16), (5, 7), (1, 1), (20, 10)],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "position": [None, "alibi", "t5", "rope"],
    "interpreted": [True],
}
# The oracle against itself in fp64 says little: a few cases, for its fp32 sums.
SOME = {"reference": CASES[::12]}
if "triton" in saccade.backends():
    SOME["triton"] = pairwise(INTERPRETED)
    dots = [case for case in SOME["triton"] if case["score"] == "dot" and case["position"] == "alibi"]
    # One pair, or a table of nine numbers, would be a matter of luck again.
    SOME["triton"] += [
        {**case, "position": "shaw"} for case in dots if (1, 1) not in (case["size"], case["dims"])
    ]


@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, name) for name in saccade.backends() for case in SOME.get(name, CASES)],
    ids=lambda x: x if isinstance(x, str) else label(x),
)
def test_pairwise(case: dict[str, Any], backend: str) -> None:
    run_case(case, backend)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 6))
def test_pairwise_more(seed: int, backend: str) -> None:
    axes = INTERPRETED if backend == "triton" else AXES
    for case in pairwise(axes, seed):
        if case["size"] == (1, 1):  # of one pair's softmax the gradient is 0, and what is left of it luck
            continue
        # The gradient of a few numbers may be worse than plain PyTorch's by luck; not in three draws.
        for draw in range(3):
            try:
                with contextlib.suppress(pytest.skip.Exception):
                    run_case(case, backend, draw)
                break
            except AssertionError:
                if draw == 2:
                    raise


EDGE_AXES: dict[str, list[Any]] = {
    "edges": [0, 60, 1000],
    "dtype": [torch.float32, torch.bfloat16, torch.float64],
    "heads": [(4, 4), (4, 2)],
    "dims": [(16, 16), (5, 5), (33, 20)],
    "bias": [None, "shared", "per head", "-inf"],
    "features": [False, True],
    "score": ["dot", "gatv2", "additive"],
    "activation": ["softmax", "relu", "softmax1"],
    "sink": [False, True],
    "dropout_p": [0.0, 0.3],
    "mask": ["none", "causal&lengths", "keep", "head-window"],
    "order": ["bhsd", "bshd", "bhds"],
}


@pytest.mark.parametrize("case", pairwise(EDGE_AXES), ids=label)
def test_edges_with_terms_and_repeats(case: dict[str, Any], backend: str) -> None:
    # An interpreter takes its milliseconds for every row.
    shrink = 5 if backend == "triton" else 1
    sq, sk, count = 70 // shrink, 90 // shrink, case["edges"] // shrink
    shape = Shape(4 if shrink == 1 else 2, *case["heads"], sq, sk, *case["dims"])
    edges = torch.stack([torch.randint(0, n, (count,)) for n in (sk, sq // 2)])  # half of the rows are empty
    mask: Any = saccade.Graph.from_edge_index(edges, (sk, sq))
    if case["mask"] != "none":
        mask = mask & make_mask(case["mask"], shape)
    options: dict[str, Any] = {
        "activation": case["activation"],
        "dropout_p": case["dropout_p"],
        "seed": 77,
        "return_lse": case["activation"] != "relu",
    }
    if case["score"] != "dot":
        options["score"] = make_score(case["score"], shape)
    if case["sink"] and case["activation"] == "softmax":
        options["sink"] = torch.randn(shape.heads).requires_grad_()
    if case["bias"]:
        bias = torch.randn(count) if case["bias"] == "shared" else torch.randn(shape.heads, count)
        if case["bias"] == "-inf":
            bias.masked_fill_(torch.rand(bias.shape) < 0.3, -torch.inf)
        options["edge_bias"] = bias.requires_grad_()
    if case["features"] and case["score"] == "dot" and shape.head_dim == shape.head_dim_v:
        e, w = torch.randn(count, 3), torch.randn(shape.heads, shape.head_dim, 3) / 2
        options["edge_attr"] = tuple(x.to(case["dtype"]).requires_grad_() for x in (e, w))
    check_attention(make_inputs(shape, case["dtype"], case["order"]), mask, backend, **options)


def test_meta_tensors_have_shapes_and_gradients() -> None:
    q = torch.empty(2, 4, 5, 8, device="meta", requires_grad=True)
    k = torch.empty(2, 2, 7, 8, device="meta")
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    out, lse = saccade.attention(
        q, k, k, saccade.KeyPadding(lengths), causal=True, dropout_p=0.5, return_lse=True
    )
    out.sum().backward()
    assert out.shape == (2, 4, 5, 8) and lse.shape == (2, 4, 5) and out.is_meta
    assert q.grad is not None and q.grad.shape == q.shape


def test_packed_and_cached_meta_tensors_have_shapes() -> None:
    q = torch.empty(7, 4, 8, device="meta", requires_grad=True)
    k, ends = torch.empty(9, 2, 8, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    options: dict[str, Any] = {"mask": saccade.Window(2, 0, align="end"), "return_lse": True}
    out, lse = saccade.attention_varlen(q, k, k, ends, ends, 4, 5, **options)
    out.sum().backward()
    assert out.shape == q.shape and lse.shape == (4, 7) and out.is_meta
    assert q.grad is not None and q.grad.shape == q.shape
    query, pages = torch.empty(2, 4, 1, 8, device="meta"), torch.empty(6, 2, 16, 8, device="meta")
    lengths, table = (torch.empty(size, dtype=torch.int32, device="meta") for size in ((2,), (2, 3)))
    assert saccade.attention_decode(query, pages, pages, lengths, table).shape == query.shape
    cache = pages[:2]
    assert saccade.attention_decode(query, cache, cache, lengths, beam=table).shape == query.shape


def test_numbers_that_are_not_pythons() -> None:
    """torch's function takes a tensor of one number for a float; numpy's floats are floats."""
    import numpy

    x = torch.randn(1, 2, 5, 8)
    want = saccade.scaled_dot_product_attention(x, x, x, scale=0.5)
    assert torch.equal(saccade.scaled_dot_product_attention(x, x, x, scale=torch.tensor(0.5)), want)
    assert torch.equal(saccade.attention(x, x, x, scale=numpy.float32(0.5)), want)
    with pytest.raises(TypeError, match="scale: expected a float"):
        saccade.scaled_dot_product_attention(x, x, x, scale=torch.tensor(0.5, requires_grad=True))
