"""Position modules against their formulas, written out in plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import saccade
import torch
from saccade.nn import LearnedPosition, SinusoidalPosition, TransformerXLPosition, sinusoidal_encoding
from torch import nn


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_sinusoid_is_the_papers(dim: int) -> None:
    found = sinusoidal_encoding(torch.arange(7), dim, dtype=torch.float64)
    for p in range(7):
        for c in range(dim):
            angle = p / 10000 ** (c // 2 * 2 / dim)
            assert found[p, c] == pytest.approx(math.cos(angle) if c % 2 else math.sin(angle), abs=1e-12)


def test_sinusoid_far_away_keeps_its_digits() -> None:
    found = sinusoidal_encoding(torch.tensor([10_000_019]), 2)
    assert found[0, 0].item() == pytest.approx(math.sin(10_000_019), abs=1e-6)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_layouts_and_offsets(kind: str, batch_first: bool) -> None:
    options: dict[str, Any] = {"batch_first": batch_first}
    module: Any = (
        SinusoidalPosition(6, **options) if kind == "sinusoidal" else LearnedPosition(20, 6, **options)
    )
    table = module(torch.zeros(20, 6))
    x = torch.randn(3, 5, 6)
    given = x if batch_first else x.transpose(0, 1)

    def call(offset: Any = 0) -> torch.Tensor:
        out = module(given, offset)
        return out if batch_first else out.transpose(0, 1)

    assert torch.equal(call(), x + table[:5])
    assert torch.equal(call(4), x + table[4:9])
    each = torch.tensor([0, 7, 15])
    assert torch.equal(call(each), x + torch.stack([table[n : n + 5] for n in each.tolist()]))
    assert module(x.bfloat16()[0]).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="offset"):
        module(given, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[\.\.\., 6\]"):
        module(torch.zeros(5, 7))


def test_sequences_may_have_more_than_one_dimension_after_them() -> None:
    """Rows of time steps, [S, N, P, d], as those of sequences [S, N, d]."""
    x, position = torch.randn(7, 2, 7, 8), SinusoidalPosition(8)
    torch.testing.assert_close(position(x), torch.stack([position(x[:, :, n]) for n in range(7)], 2))
    first = SinusoidalPosition(8, batch_first=True)
    torch.testing.assert_close(first(x), torch.stack([first(x[n]) for n in range(7)]))


def test_sinusoid_needs_no_length() -> None:
    module = SinusoidalPosition(5)
    assert not list(module.state_dict())
    long = module(torch.zeros(129, 5))
    assert torch.equal(long[:128], module(torch.zeros(128, 5)))


def test_learned_ends_where_it_says() -> None:
    module = LearnedPosition(8, 4, batch_first=True)
    out = module(torch.zeros(2, 8, 4))
    out.sum().backward()
    assert module.weight.grad is not None and bool((module.weight.grad == 2).all())
    for x, offset in (
        (torch.zeros(2, 9, 4), 0),
        (torch.zeros(2, 3, 4), 6),
        (torch.zeros(2, 3, 4), torch.tensor([0, 6])),
        (torch.zeros(2, 3, 4), -1),
    ):
        with pytest.raises(ValueError, match="positions 0 to 7, got"):
            module(x, offset)


def test_learned_rows_are_loaded_and_resized() -> None:
    module, other = LearnedPosition(8, 4), LearnedPosition(8, 4)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module.weight, other.weight) and list(module.state_dict()) == ["weight"]
    longer = module.resize(15)
    torch.testing.assert_close(longer.weight[::2], module.weight)
    torch.testing.assert_close(longer.weight[1::2], (module.weight[1:] + module.weight[:-1]) / 2)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (4, 4), (3, 7), (7, 3)])
def test_transformer_xl_is_its_formula(seqlen_q: int, seqlen_k: int) -> None:
    heads, dim = 2, 3
    position = TransformerXLPosition(6, heads, dim, dtype=torch.float64)
    q, k, v = (torch.randn(1, heads, n, dim).double() for n in (seqlen_q, seqlen_k, seqlen_k))
    logits = torch.zeros(heads, seqlen_q, seqlen_k).double()
    for h in range(heads):
        for i in range(seqlen_q):
            for j in range(seqlen_k):
                far = torch.tensor(i + seqlen_k - seqlen_q - j)
                r = sinusoidal_encoding(far, 6, dtype=torch.float64) @ position.linear.weight.t()
                r = r.view(heads, dim)[h]
                logits[h, i, j] = (q[0, h, i] + position.u[h]) @ k[0, h, j] + (q[0, h, i] + position.v[h]) @ r
    expected = torch.softmax(logits * dim**-0.5, -1) @ v[0]
    found = saccade.attention(q, k, v, position=position(seqlen_q, seqlen_k))[0]
    torch.testing.assert_close(found, expected)


def test_transformer_xl_in_a_module_trains() -> None:
    position = TransformerXLPosition(8, 2)
    attention = saccade.nn.MultiheadAttention(8, 2, batch_first=True, position=position)
    x = torch.randn(2, 5, 8)
    attention(x, x, x, need_weights=False)[0].square().sum().backward()
    assert {"position_term.u", "position_term.v", "position_term.linear.weight"} <= set(
        attention.state_dict()
    )
    assert all(p.grad is not None and bool(p.grad.any()) for p in position.parameters())


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: SinusoidalPosition(0), ValueError, "d_model"),
        (lambda: LearnedPosition(0, 4), ValueError, "max_len"),
        (lambda: LearnedPosition(2.0, 4), TypeError, "max_len"),  # type: ignore[arg-type]
        (lambda: TransformerXLPosition(7, 2), ValueError, "num_heads"),
    ],
)
def test_errors(make: Any, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        make()


def test_compiles() -> None:
    module = nn.Sequential(SinusoidalPosition(4))
    x = torch.randn(3, 2, 4)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("d_model", [6, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_transformer_xl_as_a_longer_dot_product(d_model: int, masked: bool) -> None:
    """What modules run: the same logits from ordinary products, gradients included, and no N x N tensor."""
    position = TransformerXLPosition(d_model, 4, 3, dtype=torch.float64)
    q = torch.randn(2, 4, 5, 3).double().requires_grad_()
    k, v = (torch.randn(2, 2, 9, 3).double().requires_grad_() for _ in range(2))
    mask = saccade.Causal() & saccade.KeyPadding(torch.tensor([9, 6])) if masked else None
    term: Any = position(5, 9)
    expected = saccade.attention(q, k, v, mask, position=term)
    found = saccade.attention(*term.expand(q, k), v, mask, scale=3**-0.5)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    inputs = (q, k, v, *position.parameters())
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_modules_with_transformer_xl_make_nothing_of_size_n_by_n() -> None:
    attention = saccade.nn.MultiheadAttention(
        8, 2, batch_first=True, position=TransformerXLPosition(8, 2), dropout=0.1
    )
    x, saved = torch.randn(1, 1500, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        attention(x, x, x, need_weights=False)[0].sum().backward()
    assert max(saved) < 1500 * 100


@pytest.mark.parametrize("interleaved", [False, True])
def test_hidden_keys_reach_no_frequency(interleaved: bool) -> None:
    frequencies = torch.tensor([1.0, 0.01], requires_grad=True)
    position = saccade.RoPE(inv_freq=frequencies, interleaved=interleaved)
    q, k = torch.randn(1, 1, 3, 4, requires_grad=True), torch.randn(1, 1, 4, 4)
    clean = saccade.attention(q, k, k, saccade.KeyPadding(torch.tensor([3])), position=position)
    expected = torch.autograd.grad(clean.square().sum(), (frequencies, q))
    k[:, :, 3] = torch.nan
    out = saccade.attention(q, k, k, saccade.KeyPadding(torch.tensor([3])), position=position)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (frequencies, q)), expected)
    turned = position.rotate(k, torch.arange(4))
    assert bool(turned[:, :, 3].isnan().all()) and bool(turned[:, :, :3].isfinite().all())
