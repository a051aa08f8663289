"""The oracle itself, against loops over single pairs in NumPy's long double."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import saccade
import torch
from saccade.testing import Shape, make_inputs
from torch import Tensor

SHAPE = Shape(2, 4, 2, 5, 7, 6, 3)


def wide(x: Tensor) -> Any:
    return x.detach().numpy().astype(np.longdouble)


def by_loops(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, term: Any = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """One pair at a time. `term(b, h, i, j)` is added to the logit; `score(q_i, k_j, h)` replaces the dot
    product.
    """
    (batch, heads, sq, dim), (heads_k, dim_v) = q.shape, (k.shape[1], v.shape[-1])
    query, key, value = wide(q), wide(k), wide(v)
    score = options.get("score", lambda a, b, h: a @ b / np.sqrt(np.longdouble(dim)))
    softcap, sink = options.get("softcap"), options.get("sink")
    out = np.zeros((batch, heads, sq, dim_v), np.longdouble)
    lse = np.full((batch, heads, sq), -np.inf, np.longdouble)
    keep = keep.expand(batch, heads, sq, k.shape[2])
    for b, h, i in np.ndindex(batch, heads, sq):
        kept = keep[b, h, i].nonzero().squeeze(1).tolist()
        logits = [score(query[b, h, i], key[b, h // (heads // heads_k), j], h) for j in kept]
        if softcap:
            logits = [softcap * np.tanh(x / softcap) for x in logits]
        if term is not None:
            logits = [x + term(b, h, i, j) for x, j in zip(logits, kept, strict=True)]
        denominators = logits + ([wide(sink)[h]] if sink is not None else [])
        if not denominators:
            continue
        peak = max(denominators)
        total = sum(np.exp(x - peak) for x in denominators)
        lse[b, h, i] = peak + np.log(total)
        for x, j in zip(logits, kept, strict=True):
            out[b, h, i] += np.exp(x - peak) / total * value[b, h // (heads // heads_k), j]
    return torch.from_numpy(out.astype(np.float64)), torch.from_numpy(lse.astype(np.float64))


def check(
    mask: saccade.Mask | None, reference_options: dict[str, Any], shape: Shape = SHAPE, **options: Any
) -> None:
    q, k, v = make_inputs(shape, torch.float64)
    keep = torch.ones(shape.seqlen_q, shape.seqlen_k, dtype=torch.bool)
    if mask is not None:
        keep = mask.materialize(shape.seqlen_q, shape.seqlen_k)
        keep = keep[:, None] if mask.num_batch and mask.num_heads is None else keep
    got = saccade.reference.attention(q, k, v, mask, return_lse=True, **reference_options)
    want = by_loops(q, k, v, keep, **options)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_masks() -> None:
    check(None, {})
    check(saccade.Causal() & saccade.Window(2, None), {})
    check(saccade.Band(None, -4), {})
    check(saccade.KeyPadding(torch.tensor([0, 4])), {})
    check(saccade.Window(torch.tensor([0, 1, 2, 9]), 0), {})
    check(saccade.Graph.from_dense(torch.rand(5, 7) < 0.4) & saccade.Causal(), {})


def test_terms() -> None:
    bias = torch.randn(2, 1, 5, 7, dtype=torch.float64)
    sink = torch.randn(4, dtype=torch.float64)
    check(None, {"bias": bias, "softcap": 0.8}, softcap=0.8, term=lambda b, h, i, j: wide(bias)[b, 0, i, j])
    check(saccade.Band(None, -4), {"sink": sink}, sink=sink)
    check(None, {"activation": "softmax1"}, sink=torch.zeros(4))


def test_minus_infinity_in_a_bias_masks() -> None:
    q, k, v = make_inputs(SHAPE, torch.float64)
    keep = torch.rand(2, 4, 5, 7) < 0.5
    keep[0, 1] = False
    bias = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    got = saccade.reference.attention(q, k, v, bias=bias, return_lse=True)
    torch.testing.assert_close(got, by_loops(q, k, v, keep), rtol=1e-13, atol=1e-14)


def test_positions() -> None:
    slopes, table = torch.randn(4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    scale = 6**-0.5
    q, _, _ = make_inputs(SHAPE, torch.float64)

    def shaw(b: int, h: int, i: int, j: int) -> Any:
        return scale * wide(q)[b, h, i] @ wide(table)[min(max(j - (i + 2), -2), 2) + 2]

    check(
        None, {"position": saccade.ALiBi(slopes)}, term=lambda b, h, i, j: -wide(slopes)[h] * abs(j - (i + 2))
    )
    check(None, {"position": saccade.Shaw(table)}, term=shaw)

    r, u, v = (torch.randn(n, 6, dtype=torch.float64) for n in (11, 4, 4))

    def transformer_xl(b: int, h: int, i: int, j: int) -> Any:
        # The key term of u is the caller's k; the distances run from the farthest past key.
        key = wide(make_inputs(SHAPE, torch.float64)[1])[b, h // 2, j]
        return scale * (wide(u)[h] @ key + (wide(q)[b, h, i] + wide(v)[h]) @ wide(r)[j - (i + 2) + 6])

    check(None, {"position": saccade.TransformerXL(r, u, v)}, term=transformer_xl)


def test_t5_buckets_are_those_of_the_paper() -> None:
    table = torch.arange(32.0)[:, None]
    delta = torch.tensor([0, -1, -7, -8, -15, -16, -127, -128, -500, 1, 7, 8, 200])
    both = saccade.T5(table).bucket(delta).tolist()
    assert both == [0, 1, 7, 8, 9, 10, 15, 15, 15, 17, 23, 24, 31]
    one = saccade.T5(table, bidirectional=False).bucket(delta).tolist()
    assert one == [0, 1, 7, 8, 15, 16, 31, 31, 31, 0, 0, 0, 0]


def test_rope_depends_on_the_distance_alone_and_keeps_lengths() -> None:
    for rope in (
        saccade.RoPE(),
        saccade.RoPE(interleaved=True),
        saccade.RoPE(dim=4),
        saccade.RoPE(inv_freq=torch.rand(3)),
    ):
        x, y = torch.randn(2, 6, dtype=torch.float64)
        at = torch.arange(50)
        turned = rope.rotate(x.expand(50, 6), at)
        torch.testing.assert_close(turned.norm(dim=-1), x.norm().expand(50))
        assert torch.equal(turned[0], x)
        products = turned @ rope.rotate(y.expand(50, 6), at).t()
        for distance in (-3, 0, 5):
            line = products.diagonal(distance)
            torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-9, atol=1e-9)
    first = saccade.RoPE().rotate(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    torch.testing.assert_close(first, torch.tensor([[math.cos(1), math.sin(1)]]))


def test_rope_positions_are_aligned_with_the_end_of_the_keys() -> None:
    q, k, v = make_inputs(Shape(1, 1, 1, 6, 6, 4, 4), torch.float64)
    whole = saccade.reference.attention(q, k, v, causal=True, position=saccade.RoPE())
    last = saccade.reference.attention(q[:, :, 4:], k, v, causal=True, position=saccade.RoPE())
    torch.testing.assert_close(last, whole[:, :, 4:])


def test_scores() -> None:
    w = torch.randn(4, 6, dtype=torch.float64)
    check(None, {"score": saccade.Additive(w)}, score=lambda a, b, h: wide(w)[h] @ np.tanh(a + b))
    check(
        None,
        {"score": saccade.GATv2(w[0], 0.1), "softcap": 1.2},
        score=lambda a, b, h: wide(w)[0] @ np.where(a + b > 0, a + b, np.longdouble(0.1) * (a + b)),
        softcap=1.2,
    )


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_activations_without_a_sum(activation: str) -> None:
    q, k, v = make_inputs(Shape(2, 2, 2, 5, 7, 6, 3), torch.float64)
    logits = q @ k.transpose(-1, -2) * 6**-0.5
    weights = getattr(torch, activation)(logits) * saccade.Causal().materialize(5, 7)
    got = saccade.reference.attention(q, k, v, causal=True, activation=activation)
    torch.testing.assert_close(got, weights @ v)


def edges_by_loops(
    q: Tensor, k: Tensor, v: Tensor, edges: Tensor, edge_bias: Tensor, features: Tensor
) -> Tensor:
    """[H, Sq, D] for edge_bias [H, E] and features W e [H, E, D]; every edge is a term of its own."""
    out = torch.zeros_like(q)
    for h in range(q.shape[0]):
        for i in range(q.shape[1]):
            mine = (edges[1] == i).nonzero().squeeze(1)
            if not len(mine):
                continue
            keys, values = k[h, edges[0, mine]] + features[h, mine], v[h, edges[0, mine]] + features[h, mine]
            weights = (keys @ q[h, i] * q.shape[-1] ** -0.5 + edge_bias[h, mine]).softmax(0)
            out[h, i] = weights @ values
    return out


def test_edges_are_terms_of_their_own(backend: str) -> None:
    edges = torch.tensor([[3, 0, 2, 0, 2, 3], [1, 0, 0, 0, 2, 1]])  # (3, 1) and (0, 0) stand twice
    graph = saccade.Graph.from_edge_index(edges, (5, 4))
    q, k, v = (x.detach().squeeze(0) for x in make_inputs(Shape(1, 2, 2, 4, 5, 3, 3), torch.float64))
    bias, e, w = (torch.randn(n, dtype=torch.float64) for n in ((2, 6), (6, 2), (2, 3, 2)))
    nothing = torch.zeros(2, 6, 3, dtype=torch.float64)
    got = saccade.attention(q, k, v, graph, backend=backend)
    torch.testing.assert_close(got, edges_by_loops(q, k, v, edges, torch.zeros_like(bias), nothing))
    got = saccade.attention(q, k, v, graph, edge_bias=bias, backend=backend)
    torch.testing.assert_close(got, edges_by_loops(q, k, v, edges, bias, nothing))
    got = saccade.attention(q, k, v, graph, edge_bias=bias[0], edge_attr=(e, w), backend=backend)
    features = torch.einsum("ed,hcd->hec", e, w)
    torch.testing.assert_close(got, edges_by_loops(q, k, v, edges, bias[0].expand(2, 6), features))


def test_accumulates_in_fp32_and_rounds_once() -> None:
    q, k, v = make_inputs(SHAPE, torch.bfloat16)
    out, lse = saccade.reference.attention(q, k, v, return_lse=True)
    wide_out, wide_lse = saccade.reference.attention(q.float(), k.float(), v.float(), return_lse=True)
    assert torch.equal(out, wide_out.bfloat16()) and torch.equal(lse, wide_lse) and lse.dtype == torch.float32


def test_chosen_for_many_keys_it_warns_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    from saccade.backends import choose
    from saccade.problem import Problem

    monkeypatch.setitem(choose.__globals__, "_warned", False)
    q, k = torch.randn(1, 1, 4), torch.randn(1, 4097, 4)
    u, v = torch.randn(2, 1, 4)
    options = {"position": saccade.TransformerXL(torch.randn(4097, 4), u, v)}
    for _ in range(2):
        saccade.attention(q, k, k, **options)
    saccade.attention(q, k, k, **options, backend="reference")
    assert len([w for w in recwarn if "reference" in str(w.message)]) == 1
    assert choose(Problem.of(q, k, k, **options)).NAME == "reference"
