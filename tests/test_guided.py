"""Guided attention against its formula with the weights laid out."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade.nn import GuidedAttentionLoss, diagonal_penalty
from torch import Tensor


def penalty_matrix(rows: int, keys: int, sigma: float) -> Tensor:
    i, j = torch.arange(rows).double() / rows, torch.arange(keys).double() / keys
    return 1 - torch.exp(-((i[:, None] - j) ** 2) / (2 * sigma**2))


def by_hand(q: Tensor, k: Tensor, rows: Tensor, keys: Tensor, sigma: float, **options: Any) -> Tensor:
    """[B, H, Sq] from dense weights, one sentence at a time."""
    out = []
    for b in range(q.shape[0]):
        n, t = int(rows[b]), int(keys[b])
        eye = torch.eye(t, dtype=q.dtype).expand(1, k.shape[1], t, t)
        # A row's weights are what it makes of the unit vectors; the padding is cut off beforehand.
        weights = saccade.reference.attention(q[b : b + 1, :, :n], k[b : b + 1, :, :t], eye, **options)[0]
        r = (weights * penalty_matrix(n, t, sigma)).sum(-1)
        out.append(torch.nn.functional.pad(r, (0, q.shape[2] - n)))
    return torch.stack(out)


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.4, 3.0])
@pytest.mark.parametrize("heads_k", [4, 2])
def test_the_series_is_the_formula(sigma: float, heads_k: int) -> None:
    q = torch.randn(3, 4, 13, 5).double().requires_grad_()
    k = torch.randn(3, heads_k, 19, 5).double().requires_grad_()
    rows, keys = torch.tensor([13, 5, 1]), torch.tensor([19, 1, 11])
    found = diagonal_penalty(q, k, rows, keys, sigma=sigma)
    expected = by_hand(q, k, rows, keys, sigma)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    weight = torch.randn(found.shape).double()
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), (q, k)),
        torch.autograd.grad((expected * weight).sum(), (q, k)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_single_and_half_precision() -> None:
    q, k = torch.randn(2, 2, 40, 8), torch.randn(2, 2, 30, 8)
    all_rows, all_keys = torch.tensor([40, 40]), torch.tensor([30, 30])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = q.to(dtype), k.to(dtype)
        found = diagonal_penalty(a, b, sigma=0.2)
        assert found.dtype == torch.float32
        exact = by_hand(a.double(), b.double(), all_rows, all_keys, 0.2)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)


def test_a_diagonal_costs_nothing_and_its_opposite_much() -> None:
    place = torch.linspace(0, 1, 50)[None, None, :, None]
    q = torch.cat([place, torch.ones_like(place)], -1)
    k = torch.cat([2 * place, -(place**2)], -1) * 5000  # -5000 (x - y)^2 and a constant of the row
    assert diagonal_penalty(q, k, sigma=0.4, scale=1.0).max() < 1e-3
    assert diagonal_penalty(q.flip(2), k, sigma=0.4, scale=1.0).mean() > 0.4


def test_rows_without_keys_and_masks() -> None:
    q, k = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4, requires_grad=True)
    found = diagonal_penalty(q, k, mask=saccade.Band(-4, 9, align="start"))
    assert bool((found[0, 0, 2:] == 0).all()) and bool((found[0, 0, :2] > 0).all())
    found = diagonal_penalty(q, k, torch.tensor([6]), torch.tensor([0]))
    found.sum().backward()
    assert bool((found == 0).all()) and bool((k.grad == 0).all())


def test_it_keeps_nothing_of_size_n_by_n() -> None:
    q, k = (torch.randn(1, 2, 3000, 8, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        diagonal_penalty(q, k, sigma=0.4).mean().backward()
    assert max(saved) < 3000 * 300


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_loss_of_a_decoder(batch_first: bool) -> None:
    layer = saccade.nn.TransformerDecoderLayer(16, 2, 16, 0.0, batch_first=batch_first, dtype=torch.float64)
    decoder = saccade.nn.TransformerDecoder(layer, 2)
    x, memory = torch.randn(2, 7, 16).double(), torch.randn(2, 9, 16).double()
    rows, keys = torch.tensor([7, 4]), torch.tensor([9, 6])
    padding = torch.arange(9) >= keys[:, None]
    given = (x, memory) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1))
    guide, seen = GuidedAttentionLoss(0.3), []
    attentions: list[Any] = [layer.multihead_attn for layer in decoder.layers]

    def see(module: Any, args: Any) -> None:
        seen.append((module, args))

    hooks = [m.register_forward_pre_hook(see) for m in attentions]
    with guide.watch(attentions):
        decoder(*given, memory_key_padding_mask=padding)
    for hook in hooks:
        hook.remove()
    loss = guide(rows, keys)
    total = torch.zeros(()).double()
    for module, (query, key, *_) in seen:
        _, weights = module(query, key, key, key_padding_mask=padding, average_attn_weights=False)
        for b in range(2):
            n, t = int(rows[b]), int(keys[b])
            total = total + (weights[b, :, :n, :t] * penalty_matrix(n, t, 0.3)).sum()
    cells = (rows * keys).sum() * 2 * 2
    torch.testing.assert_close(loss, total / cells)
    loss.backward()
    size = 2 * 16
    assert all(bool(module.in_proj_weight.grad[:size].any()) for module in attentions)
    last = attentions[-1]  # nothing comes after it: only its queries and keys matter
    assert not bool(last.in_proj_weight.grad[size:].any()) and last.out_proj.weight.grad is None
    with pytest.raises(ValueError, match="watch"):
        guide()


def test_guided_training_makes_the_diagonal() -> None:
    attention = saccade.nn.MultiheadAttention(16, 2, batch_first=True)
    x = saccade.nn.SinusoidalPosition(16, base=30.0, batch_first=True)(torch.zeros(1, 20, 16))
    optimizer = torch.optim.Adam(attention.parameters(), lr=0.02)
    guide, losses = GuidedAttentionLoss(0.2, heads=[1]), []
    for _ in range(60):
        with guide.watch([attention]):
            attention(x, x, x, need_weights=False)
        loss = guide()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize("value", [0, -1.0, "x"])
def test_bad_sigma(value: Any) -> None:
    with pytest.raises(ValueError, match="sigma"):
        diagonal_penalty(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), sigma=value)
    with pytest.raises(ValueError, match="key_lengths"):
        diagonal_penalty(
            torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), None, torch.zeros(2, dtype=torch.int64)
        )
