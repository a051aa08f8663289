"""Conformer, streams, pooling and the margin loss: their formulas, and that padding is never seen."""

from __future__ import annotations

import time
from typing import Any

import pytest
import saccade
import torch
from saccade.nn import (
    AdditiveMarginSoftmax,
    Conformer,
    ConformerLayer,
    EncoderStream,
    MaskedBatchNorm,
    SelfAttentionPooling,
)
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("one_thread")

E, H, N, S = 16, 4, 3, 23
LENGTHS = torch.tensor([23, 9, 1])
PADDING = torch.arange(S) >= LENGTHS[:, None]
F64: dict[str, Any] = {"dtype": torch.float64}


def randomised(module: Any) -> Any:
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    return module


def transformer(layers: int = 2, windows: Any = None, **options: Any) -> Any:
    layer = saccade.nn.TransformerEncoderLayer(E, H, 32, 0.1, batch_first=True, **F64, **options)
    norm = nn.LayerNorm(E, **F64) if options.get("norm_first") else None
    return randomised(saccade.nn.TransformerEncoder(layer, layers, norm, windows=windows)).eval()


# Truncated self-attention


def test_windows_of_layers_and_heads() -> None:
    x = torch.randn(N, S, E).double()
    full, wide = transformer(), transformer(windows=[(S, S)] * 2)
    wide.load_state_dict(full.state_dict(), strict=False)
    torch.testing.assert_close(wide(x), full(x))
    causal = transformer(windows=[(None, 0)] * 2)
    causal.load_state_dict(full.state_dict(), strict=False)
    torch.testing.assert_close(causal(x), full(x, mask=saccade.Causal()))
    left, right = torch.tensor([0, 2, 5, 30]), torch.tensor([0, 1, 0, 30])
    attention = randomised(saccade.nn.MultiheadAttention(E, H, batch_first=True, window=(left, right), **F64))
    out, weights = attention(x, x, x, average_attn_weights=False)
    for h in range(H):
        delta = torch.arange(S) - torch.arange(S)[:, None]
        seen = (delta >= -left[h]) & (delta <= right[h])
        assert bool((weights[:, h] > 0).eq(seen).all())
    # A window of (0, 0) is the value itself.
    own = randomised(saccade.nn.MultiheadAttention(E, H, batch_first=True, window=(0, 0), **F64))
    value = F.linear(x, own.in_proj_weight[2 * E :], own.in_proj_bias[2 * E :])
    torch.testing.assert_close(own(x, x, x)[0], own.out_proj(value))


def test_a_window_of_nothing_but_padding() -> None:
    """Some rows see no key at all: zeros from attention, and no NaN in any gradient."""
    model = transformer(windows=[(2, 1), (1, 0)])
    x = torch.randn(N, S, E).double().requires_grad_()
    out = model(x, src_key_padding_mask=PADDING)
    out.sum().backward()
    assert bool(out.isfinite().all()) and bool(x.grad.isfinite().all())
    alone = model(x[1:2, :9])
    torch.testing.assert_close(out[1:2, :9], alone)


# Conformer


def by_hand(layer: ConformerLayer, x: Tensor, window: Any = None) -> Tensor:
    """One unpadded sequence [S, E], in eval, from the papers' formulas and the layer's parameters."""
    x = x + 0.5 * layer.feed1(x)
    a, y = layer.self_attn, layer.norm(x)
    parts = F.linear(y, a.in_proj_weight, a.in_proj_bias).chunk(3, -1)
    q, k, v = (p.unflatten(-1, (H, -1)).transpose(0, 1) for p in parts)  # [H, S, D]
    term, size = layer.self_attn.position_term, x.shape[0]
    logits = torch.empty(H, size, size).double()
    for i in range(size):
        for j in range(size):
            r = saccade.nn.sinusoidal_encoding(torch.tensor(i - j), E, dtype=torch.float64)
            r = (term.linear.weight @ r).view(H, -1)
            logits[:, i, j] = ((q[:, i] + term.u) * k[:, j] + (q[:, i] + term.v) * r).sum(-1)
    y = (torch.softmax(logits * q.shape[-1] ** -0.5, -1) @ v).transpose(0, 1).flatten(1)
    x = x + a.out_proj(y)
    c = layer.convolution
    y = F.glu(c.pointwise1(c.norm(x)), -1)
    rows = [y.new_zeros(E)] * c.before + list(y) + [y.new_zeros(E)] * c.after
    reach = c.before + c.after + 1
    y = torch.stack(
        [
            sum(rows[t + n] * c.depthwise.weight[:, 0, n] for n in range(reach)) + c.depthwise.bias
            for t in range(size)
        ]
    )
    b = c.batch_norm
    y = (y - b.running_mean) / (b.running_var + b.eps).sqrt() * b.weight + b.bias
    x = x + c.pointwise2(y * torch.sigmoid(y))
    return layer.norm_out(x + 0.5 * layer.feed2(x))


@pytest.mark.parametrize("kernel_size", [1, 4, 7])
@pytest.mark.parametrize("causal", [False, True])
def test_the_conformer_is_its_formula(kernel_size: int, causal: bool) -> None:
    layer = randomised(ConformerLayer(E, H, 24, kernel_size, causal=causal, **F64)).eval()
    x = torch.randn(N, 9, E).double()
    out = layer(x)
    for n in range(N):
        torch.testing.assert_close(out[n], by_hand(layer, x[n]))
    if causal:
        assert layer.convolution.after == 0


@pytest.mark.parametrize("training", [False, True])
def test_the_conformer_sees_no_padding(training: bool) -> None:
    model = randomised(Conformer(E, H, 2, 24, 5, dropout=0.0, **F64)).train(training)
    x = torch.randn(N, S, E).double()
    out = model(x, PADDING)
    # More padding, and worse: NaN.
    wide = torch.cat([x, torch.zeros(N, 4, E).double()], 1)
    hidden = torch.arange(S + 4) >= LENGTHS[:, None]
    wide[hidden] = torch.nan
    wide.requires_grad_()
    again = model(wide, hidden)
    torch.testing.assert_close(again[:, :S], out)
    assert not bool(again[hidden].any())
    again.square().sum().backward()
    assert bool(wide.grad.isfinite().all()) and not bool(wide.grad[hidden].any())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    if not training:
        for n in range(N):
            size = int(LENGTHS[n])
            torch.testing.assert_close(out[n : n + 1, :size], model(x[n : n + 1, :size]))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_counts_valid_frames_alone(momentum: float | None) -> None:
    ours, theirs = (kind(5, momentum=momentum, **F64) for kind in (MaskedBatchNorm, nn.BatchNorm1d))
    for _ in range(3):
        x = torch.randn(N, S, 5).double().requires_grad_()
        out = ours(x.masked_fill(PADDING[..., None], 1e4), ~PADDING)
        expected = theirs(x[~PADDING])
        torch.testing.assert_close(out[~PADDING], expected)
        assert not bool(out[PADDING].any())
        weight = torch.randn_like(expected)
        a, b = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (out[~PADDING], expected))
        torch.testing.assert_close(a, b)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, held in ours.state_dict().items():
        torch.testing.assert_close(held, theirs.state_dict()[name])
    before = {name: held.clone() for name, held in ours.state_dict().items()}
    ours(x, torch.zeros(N, S, dtype=torch.bool))
    assert all(torch.equal(held, before[name]) for name, held in ours.state_dict().items())
    torch.testing.assert_close(ours.eval()(x, ~PADDING)[~PADDING], theirs.eval()(x[~PADDING]))


def test_the_conformer_compiles_whole() -> None:
    model = Conformer(E, H, 1, 24, 5, dropout=0.0)
    x = torch.randn(N, S, E)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, PADDING), model(x, PADDING))


def test_equivariant_to_the_order_of_the_batch() -> None:
    """The classic error is attention across the utterances."""
    model = randomised(Conformer(E, H, 1, 24, 5, **F64)).eval()
    x, order = torch.randn(N, S, E).double(), torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(x, PADDING)[order], model(x[order], PADDING[order]))
    other = x.clone()
    other[1] += 1
    torch.testing.assert_close(model(other)[0], model(x)[0])


def test_heads_of_their_own_size() -> None:
    """HW04's: 4 heads of 4 in a model of 224, a kernel of 20."""
    layer = ConformerLayer(224, 4, kernel_size=20, head_dim=4)
    assert layer(torch.randn(2, 8, 224)).shape == (2, 8, 224)


# Streams

WINDOWS: Any = [(4, 0), (torch.tensor([1, 3, 5, 2]), torch.tensor([0, 2, 1, 0]))]
STREAMS: dict[str, Any] = {
    "window": lambda: (transformer(windows=[(3, 0), (5, 0)]), None),
    "ahead": lambda: (transformer(windows=[(3, 2), (2, 1)]), None),
    "heads": lambda: (transformer(windows=WINDOWS), None),
    "norm-first": lambda: (transformer(windows=[(3, 1), (5, 0)], norm_first=True), None),
    "unbounded-left": lambda: (transformer(windows=[(None, 0), (None, 2)]), None),
    "gqa": lambda: (transformer(windows=[(3, 1)] * 2, num_kv_heads=2), None),
    "chunks": lambda: (transformer(), saccade.Chunks(4, 2)),
    "chunks-all": lambda: (transformer(), saccade.Chunks(5)),
    "chunks-window": lambda: (transformer(windows=[(3, 2), (9, 2)]), saccade.Chunks(4, 1)),
    "rope": lambda: (transformer(windows=[(3, 1)] * 2, position=saccade.RoPE()), None),
    "alibi": lambda: (
        transformer(windows=[(4, 2)] * 2, position=saccade.ALiBi(torch.rand(H).double())),
        None,
    ),
    "shaw-chunks": lambda: (
        transformer(position=saccade.Shaw(torch.randn(7, E // H).double())),
        saccade.Chunks(3, 1),
    ),
    "conformer": lambda: (
        randomised(Conformer(E, H, 2, 24, 5, windows=[(4, 1), (2, 0)], **F64)).eval(),
        None,
    ),
    "conformer-causal": lambda: (
        randomised(Conformer(E, H, 2, 24, 4, causal=True, window=(6, 0), **F64)).eval(),
        None,
    ),
    "conformer-chunks": lambda: (
        randomised(Conformer(E, H, 2, 24, 6, causal=True, **F64)).eval(),
        saccade.Chunks(4, 1),
    ),
}


@pytest.mark.parametrize("sizes", [[1] * S, [7, 0, 1, 3, 12], [S]], ids=["frames", "pieces", "whole"])
@pytest.mark.parametrize("name", STREAMS)
def test_streaming_equals_offline(name: str, sizes: list[int]) -> None:
    encoder, chunks = STREAMS[name]()
    x = torch.randn(N, S, E).double()
    with torch.no_grad():
        whole = encoder(x, mask=chunks)
    stream = EncoderStream(encoder, chunks)
    out = [*(stream.push(piece) for piece in x.split(sizes, 1)), stream.finish()]
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=1e-9, atol=1e-11)
    if name in ("window", "conformer-causal"):  # nothing ahead: every frame at once
        assert [y.shape[1] for y in out] == [*sizes, 0]
    if name == "ahead":
        assert out[-1].shape[1] == 3  # what the layers look ahead adds up


@pytest.mark.parametrize("name", ["ahead", "conformer", "chunks"])
def test_streams_of_several_lengths(name: str) -> None:
    encoder, chunks = STREAMS[name]()
    x = torch.randn(N, S, E).double()
    with torch.no_grad():
        masks = {"padding": PADDING} if isinstance(encoder, Conformer) else {"src_key_padding_mask": PADDING}
        whole = encoder(x, mask=chunks, **masks)
    stream = EncoderStream(encoder, chunks)
    x[PADDING] = torch.nan
    pieces = zip(x.split(5, 1), (~PADDING).split(5, 1), strict=True)
    out = torch.cat([*(stream.push(*piece) for piece in pieces), stream.finish()], 1)
    torch.testing.assert_close(out[~PADDING], whole[~PADDING], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["ahead", "chunks", "conformer"])
def test_the_state_does_not_grow(name: str) -> None:
    encoder, chunks = STREAMS[name]()
    stream = EncoderStream(encoder, chunks)

    def held() -> int:
        parts: list[Any] = [*stream._parts]
        lines = [x for p in parts if getattr(p, "line", None) is not None for x in [p.line]]
        return sum(x.numel() for p in parts for x in getattr(p, "held", [])) + sum(x.numel() for x in lines)

    sizes = []
    for _ in range(40):
        stream.push(torch.randn(1, 4, E).double())
        sizes.append(held())
    assert len(set(sizes[10:])) == 1


def test_a_step_costs_the_same_after_a_long_history() -> None:
    encoder = transformer(windows=[(64, 0)] * 2)
    stream = EncoderStream(encoder)
    x = torch.randn(1, 8, E).double()

    def seconds() -> float:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            stream.push(x)
            times.append(time.perf_counter() - start)
        return min(times)

    for _ in range(10):
        stream.push(x)
    early = seconds()
    for _ in range(20):
        stream.push(torch.randn(1, 2000, E).double())
    assert seconds() < 2 * early


def test_stream_errors() -> None:
    with pytest.raises(ValueError, match="eval"):
        EncoderStream(transformer(windows=[(3, 0)] * 2).train())
    with pytest.raises(ValueError, match="window with a right bound"):
        EncoderStream(transformer())
    with pytest.raises(ValueError, match="window with a right bound"):
        EncoderStream(transformer(windows=[(3, None)] * 2))
    with pytest.raises(TypeError, match="chunks"):
        EncoderStream(transformer(), saccade.Causal())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="encoder"):
        EncoderStream(nn.Linear(1, 1).eval())
    with pytest.raises(TypeError, match="batch_first"):
        layer = saccade.nn.TransformerEncoderLayer(E, H, window=(1, 0))
        EncoderStream(saccade.nn.TransformerEncoder(layer, 1).eval())
    stream = EncoderStream(transformer(windows=[(3, 0)] * 2))
    with pytest.raises(ValueError, match="nothing was pushed"):
        stream.finish()
    with pytest.raises(ValueError, match="valid"):
        stream.push(torch.zeros(1, 2, E).double(), torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="windows"):
        Conformer(E, H, 2, windows=[(1, 1)])
    with pytest.raises(ValueError, match="padding"):
        ConformerLayer(E, H)(torch.zeros(N, S, E), PADDING[:, 1:])
    with pytest.raises(ValueError, match="x: expected"):
        ConformerLayer(E, H)(torch.zeros(S, E))


# Pooling


@pytest.mark.parametrize("queries", [1, 3])
def test_pooling_is_its_formula_and_sees_no_padding(queries: int) -> None:
    pool = SelfAttentionPooling(E, queries, **F64)
    x = torch.randn(N, S, E).double()
    hidden = x.masked_fill(PADDING[..., None], torch.nan).requires_grad_()
    out, weights = pool(hidden, PADDING), pool.weights(x, PADDING)
    for n in range(N):
        h = x[n, : LENGTHS[n]]
        w = torch.softmax(pool.query @ h.t(), -1)
        torch.testing.assert_close(out[n], (w @ h).flatten())
        torch.testing.assert_close(weights[n, :, : LENGTHS[n]], w)
        torch.testing.assert_close(pool(h[None])[0], out[n])
    out.sum().backward()
    assert not bool(hidden.grad[PADDING].any())
    empty = pool(x[:1], torch.ones(1, S, dtype=torch.bool))
    assert not bool(empty.any())
    with pytest.raises(ValueError, match="x: expected"):
        pool(x[0])


# Additive margin softmax


@pytest.mark.parametrize("chunk", [None, 1, 3, 50])
def test_the_margin_loss_is_its_formula(chunk: int | None) -> None:
    loss_of = AdditiveMarginSoftmax(E, 7, 30.0, 0.35, chunk=chunk, **F64)
    x, target = torch.randn(5, E).double().requires_grad_(), torch.tensor([0, 6, 3, 3, 1])
    found = loss_of(x, target)
    total = 0
    for n, y in enumerate(target.tolist()):
        cos = [F.cosine_similarity(x[n], w, 0) for w in loss_of.weight]
        top = torch.exp(30 * (cos[y] - 0.35))
        total = total - torch.log(top / (top + sum(torch.exp(30 * c) for j, c in enumerate(cos) if j != y)))
    torch.testing.assert_close(found, total / 5)
    inputs = (x, loss_of.weight)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(total / 5, inputs), strict=True):
        torch.testing.assert_close(a, b)
    # The length of neither vector counts, and the margin is in the loss alone.
    torch.testing.assert_close(loss_of(x * 7, target), found)
    cosines = F.normalize(x, dim=-1) @ F.normalize(loss_of.weight, dim=-1).t()
    torch.testing.assert_close(loss_of.logits(x), 30 * cosines)


def test_no_margin_is_cross_entropy_and_one_class_is_nothing() -> None:
    x, target = torch.randn(5, E), torch.randint(4, (5,))
    loss_of = AdditiveMarginSoftmax(E, 4, 10.0, 0.0)
    torch.testing.assert_close(loss_of(x, target), F.cross_entropy(loss_of.logits(x), target))
    lonely = AdditiveMarginSoftmax(E, 1, chunk=1)
    x.requires_grad_()
    loss = lonely(x, torch.zeros(5, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and bool(x.grad.isfinite().all())
    with pytest.raises(ValueError, match="target"):
        loss_of(x, target[1:])


def test_confident_margins_keep_their_digits() -> None:
    """Where the class is certain, the loss is tiny but not rounded away."""
    loss_of = AdditiveMarginSoftmax(2, 2, 30.0, 0.35, chunk=1)
    with torch.no_grad():
        loss_of.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    found = loss_of(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    exact = torch.log1p(torch.exp(torch.tensor(-30 - 30 * 0.65).double()))
    assert found.item() == pytest.approx(exact.item(), rel=1e-5, abs=0)
