"""Modules and what surrounds them: autocast, transforms, checkpoints, masks as hints, calls that failed."""

from __future__ import annotations

import io
import pickle
from functools import partial
from typing import Any

import pytest
import saccade
import saccade.nn as S
import torch
from saccade.nn._edges import edges_of
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

PADDING = torch.tensor([[False] * 5, [False, False, True, True, True]])


def encoder(**options: Any) -> S.TransformerEncoder:
    layer = S.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    return S.TransformerEncoder(layer, 3, **options)


@pytest.mark.parametrize("size", [(64, 64), (2, 9000)])
def test_convolution_keeps_its_places(size: tuple[int, int]) -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1)
    module, images = S.ConvolutionalAttention.of(conv), torch.randn(1, 2, *size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(images)
    torch.testing.assert_close(got, conv(images), atol=1e-4, rtol=1e-4)


def test_penalties_keep_their_digits_under_autocast() -> None:
    q, k = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 11, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = S.diagonal_penalty(q, k)
    torch.testing.assert_close(got, S.diagonal_penalty(q, k))


@pytest.mark.parametrize("chunk", [None, 4])
def test_margin_softmax_under_autocast(chunk: int | None) -> None:
    loss, x, target = S.AdditiveMarginSoftmax(16, 10, chunk=chunk), torch.randn(6, 16), torch.arange(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(x, target)
    torch.testing.assert_close(got.float(), loss(x, target), rtol=0.05, atol=0.5)
    with pytest.raises((IndexError, RuntimeError)):
        loss(x, target - 1)


@pytest.mark.parametrize("packed", [False, True])
def test_layer_outputs_are_dense(packed: bool) -> None:
    module, x = encoder(packed=packed).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        found = S.layer_outputs(module, x, src_key_padding_mask=PADDING)
        assert not any(y.is_nested for y in found) and len(found) == 3
        for n, y in enumerate(found):
            for row, end in ((0, 5), (1, 2)):
                alone = S.layer_outputs(module, x[row : row + 1, :end])[n]
                torch.testing.assert_close(y[row : row + 1, :end], alone)
        assert not bool(found[0][1, 2:].any())


def test_packed_encoders_in_checkpoints() -> None:
    module, x = encoder(packed=True), torch.randn(2, 5, 16, requires_grad=True)
    want = torch.autograd.grad(module(x, None, PADDING).sin().sum(), x)[0]
    out = checkpoint(module, x, None, PADDING, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), x)[0], want)
    changed = PADDING.clone()
    with torch.inference_mode():
        module(x, None, changed)
    module(x, None, changed)
    changed[0, 4] = True  # seen as another padding
    torch.testing.assert_close(module(x, None, changed)[0, :4], module(x[:1, :4])[0])


@pytest.mark.parametrize("kind", ["band", "padding"])
def test_modes_that_look_on_change_nothing(kind: str) -> None:
    module, x = encoder(packed=kind == "padding"), torch.randn(2, 70, 16, requires_grad=True)

    def masks() -> Any:  # new ones, which are read in the mode
        padding = torch.arange(70) >= torch.tensor([[70], [20]])
        return (torch.ones(70, 70).bool().triu(1), None) if kind == "band" else (None, padding)

    want = torch.autograd.grad(module(x, *masks()).sin().sum(), x)[0]
    with FlopCounterMode(display=False):  # the backward pass computes again outside of it
        out = checkpoint(module, x, *masks(), use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), x)[0], want)

    def save_all(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        calls.append(op)
        return CheckpointPolicy.MUST_SAVE

    contexts = partial(create_selective_checkpoint_contexts, save_all)
    given, seen = masks(), []
    for _ in range(2):
        calls: list[Any] = []
        out = checkpoint(module, x, *given, use_reentrant=False, context_fn=contexts)
        seen.append(list(calls))
        torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), x)[0], want)
    assert seen[0] == seen[1]  # that the masks were read the first time is not seen


@pytest.mark.parametrize("hint", [None, True])
def test_packing_knows_the_causal_mask(hint: bool | None) -> None:
    module, x, nested = encoder(packed=True), torch.randn(2, 5, 16), []
    module.layers[0].register_forward_pre_hook(lambda _, args: nested.append(args[0].is_nested))
    float_mask = nn.Transformer.generate_square_subsequent_mask(5)
    want = module(x, float_mask, PADDING)
    torch.testing.assert_close(module(x, saccade.Causal(), PADDING, is_causal=hint), want)
    module(x, saccade.Window(1, 0), PADDING)
    assert nested == [True, True, False]


def test_masks_and_hints_both_hold() -> None:
    decoder = S.TransformerDecoder(S.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True), 2)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    want = decoder(x, memory, tgt_mask=saccade.Window(2, 0))
    torch.testing.assert_close(decoder(x, memory, tgt_mask=saccade.Window(2, 2), tgt_is_causal=True), want)
    module = encoder()
    want = module(x, saccade.Causal())
    torch.testing.assert_close(module(x, saccade.Causal(), is_causal=True), want)


@pytest.mark.parametrize("kind", ["pixels", "edge_index", "graph", "bounds"])
def test_what_transforms_build_outlives_them(kind: str) -> None:
    def build() -> Any:
        if kind == "pixels":
            return pixels.neighbourhood(5, 5)
        if kind == "bounds":
            return bounds
        graph = saccade.Graph.from_edge_index(edges, 5)
        graph.columns()
        return graph

    bounds = saccade.Window(torch.tensor([2]), 1)
    pixels, edges = S.PixelAttention(4, 2, 1), torch.randint(0, 5, (2, 12))
    if kind == "pixels":
        images, parameters = torch.randn(1, 4, 5, 5), dict(pixels.named_parameters())
        torch.func.grad(lambda p: functional_call(pixels, p, (images,)).square().sum())(parameters)
        torch.save(pixels, io.BytesIO())
        return
    if kind == "edge_index":
        layer = S.GATConv(3, 4)
        x, parameters = torch.randn(5, 3), dict(layer.named_parameters())
        torch.func.grad(lambda p: functional_call(layer, p, (x, edges)).square().sum())(parameters)
        assert not is_wrapped(edges_of(edges, (5, 5), True).graph.indptr)
        return
    masks: list[Any] = []

    def loss(q: Tensor) -> Tensor:
        masks.append(build())
        return saccade.attention(q, q, q, masks[0]).square().sum()

    q = torch.randn(1, 1, 5, 4)
    torch.func.grad(loss)(q)
    again = pickle.loads(pickle.dumps(masks[0]))
    want = saccade.attention(q, q, q, again)
    torch.testing.assert_close(saccade.attention(q, q, q, masks[0]), want)
    if kind == "bounds":
        assert not is_wrapped(bounds._resolved[1].head_bounds)
    if kind == "graph":
        assert not is_wrapped(masks[0].columns()[0])


def test_positions_given_to_a_transformer_stay() -> None:
    module = S.Transformer(16, 2, 1, 1, 32, position=saccade.T5(nn.Parameter(torch.zeros(8, 2))))
    attention: Any = module.encoder.layers[0].self_attn
    assert not bool(attention.position_term.weight.any())
    assert bool(attention.in_proj_weight is None or attention.in_proj_weight.any())


def test_a_refused_step_changes_nothing() -> None:
    decoder = S.TransformerDecoder(S.TransformerDecoderLayer(16, 2, 32, batch_first=True), 2).eval()
    memory, pieces = torch.randn(2, 3, 16), torch.randn(4, 2, 1, 16)
    states = [S.DecoderState(decoder, memory, beams=2) for _ in range(2)]
    for number, state in enumerate(states):
        state.step(pieces[0].repeat_interleave(2, 0))
        state.reorder(torch.tensor([1, 0, 2, 3]))
        if number:
            with pytest.raises(ValueError, match="x: expected 4 rows of 16 features"):
                state.step(torch.randn(4, 1, 8))
    first, second = (state.step(pieces[1].repeat_interleave(2, 0)) for state in states)
    torch.testing.assert_close(first, second)


def test_a_refused_piece_changes_nothing() -> None:
    module = encoder(windows=[(2, 1)] * 3).eval()
    x, stream = torch.randn(2, 9, 16), S.EncoderStream(module)
    found = [stream.push(x[:, :4])]
    with pytest.raises(ValueError, match="x: expected"):
        stream.push(torch.randn(2, 3, 8))
    found += [stream.push(x[:, 4:]), stream.finish()]
    torch.testing.assert_close(torch.cat(found, 1), module(x))
    for call in (lambda: stream.push(x), stream.finish):
        with pytest.raises(ValueError, match="the stream is at its end"):
            call()


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm", "conformer"])
def test_streams_are_saved_half_way(kind: str) -> None:
    if kind == "conformer":
        module: Any = S.Conformer(16, 2, 2, 32, 3, 0.0, position=None, window=(4, 1)).eval()
    else:
        layer = S.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=kind == "pre-norm")
        module = S.TransformerEncoder(layer, 2, windows=[(4, 1)] * 2).eval()
    x, stream = torch.randn(2, 9, 16), S.EncoderStream(module)
    found = [stream.push(x[:, :5])]
    again = pickle.loads(pickle.dumps(stream))
    found += [again.push(x[:, 5:]), again.finish()]
    torch.testing.assert_close(torch.cat(found, 1), module(x))


def with_extra_key(**options: Any) -> S.MultiheadAttention:
    return S.MultiheadAttention(16, 2, batch_first=True, **options)


@pytest.mark.parametrize("place", ["self_attn", "multihead_attn"])
@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_beside_the_input_are_refused_in_pieces(place: str, options: dict[str, Any]) -> None:
    decoder = S.TransformerDecoder(S.TransformerDecoderLayer(16, 2, 32, batch_first=True), 1)
    setattr(decoder.layers[0], place, with_extra_key(**options))
    with pytest.raises(ValueError, match="add_bias_kv and add_zero_attn"):
        S.DecoderState(decoder.eval(), torch.randn(2, 3, 16))
    with (
        pytest.raises(ValueError, match="keys without a place"),
        S.GuidedAttentionLoss().watch([with_extra_key(**options)]),
    ):
        pass
    conformer = S.Conformer(16, 2, 1, 32, 3, 0.0, position=None, window=(4, 1), **options)
    with pytest.raises(ValueError, match="add_bias_kv and add_zero_attn"):
        S.EncoderStream(conformer.eval())


def test_windows_over_the_memory_are_refused_in_steps() -> None:
    decoder = S.TransformerDecoder(S.TransformerDecoderLayer(16, 2, 32, batch_first=True), 1)
    decoder.layers[0].multihead_attn = with_extra_key(window=(1, 1))
    with pytest.raises(ValueError, match="windows and positions of multihead_attn"):
        S.DecoderState(decoder.eval(), torch.randn(2, 3, 16))


def test_guided_losses_see_padding_and_refuse_other_masks() -> None:
    module, x = S.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)
    guide = S.GuidedAttentionLoss()
    hidden = torch.zeros(2, 5).masked_fill(PADDING, -torch.inf)
    with guide.watch([module]):
        module(x, x, x, key_padding_mask=PADDING)
        module(x, x, x, hidden)
    with guide.watch([module]), pytest.raises(ValueError, match="knows 0 and -inf only"):
        module(x, x, x, hidden.clamp(min=-1.0))
    with guide.watch([module]):
        module(x, x, x, key_padding_mask=PADDING)
        module(x, x, x, hidden)
    _, weights = module(x, x, x, key_padding_mask=PADDING)
    place = torch.arange(5) / 5
    penalty = 1 - torch.exp(-((place[:, None] - place) ** 2) / (2 * 0.4**2))
    torch.testing.assert_close(guide(), (weights * penalty).mean(), atol=1e-6, rtol=1e-5)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    with guide.watch([module]), pytest.raises(ValueError, match="attn_mask: the guided"):
        module(x, x, x, attn_mask=mask)
    for heads, error in (([], ValueError), ([2], ValueError), (["a"], TypeError)):
        with pytest.raises(error, match="heads"), S.GuidedAttentionLoss(heads=heads).watch([module]):
            pass
    with pytest.raises(ValueError, match="sigma"):
        S.GuidedAttentionLoss(sigma=-1.0)
    with pytest.raises(TypeError, match="saccade.nn.MultiheadAttention"), guide.watch([nn.Linear(2, 2)]):
        pass


def test_fp64_stays_fp64() -> None:
    x, valid = torch.randn(4, 7, 3, dtype=torch.float64), torch.rand(4, 7) < 0.7
    for momentum in (0.1, None):
        ours = S.MaskedBatchNorm(3, momentum=momentum, dtype=torch.float64)
        torchs = nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
        for _ in range(3):
            torch.testing.assert_close(ours(x, valid)[valid], torchs(x[valid]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.running_var, torchs.running_var, rtol=1e-14, atol=0.0)
        torch.testing.assert_close(ours.running_mean, torchs.running_mean, rtol=1e-13, atol=1e-16)
    learned = S.LearnedPosition(6, 4, dtype=torch.float64)
    torch.testing.assert_close(learned.resize(6).weight, learned.weight, rtol=0.0, atol=1e-15)
    vit = S.VisionTransformer(8, 4, 1, 2, 16, 3, dtype=torch.float64)
    wide = vit.positions((3, 5))
    assert not torch.equal(wide, wide.float().double())


def test_norms_of_padded_rows_leave_weights_finite() -> None:
    norm, x = S.MaskedBatchNorm(3).eval(), torch.randn(2, 4, 3)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    x[1, 2:] = torch.nan
    norm(x, valid).sum().backward()
    assert norm.weight.grad is not None and bool(norm.weight.grad.isfinite().all())
    with pytest.raises(ValueError, match="valid: expected shape"):
        norm(x, valid[0])


def test_copies_are_the_rounded_rows() -> None:
    for size in range(1, 24):
        for length in range(1, 50):
            source = torch.arange(float(size))[None, :, None]
            got = S.uniform_copy(source, torch.tensor([size]), torch.tensor([length]))[0, :, 0]
            want = [min(round(t * size / length), size - 1) for t in range(length)]
            assert got.tolist() == want, (size, length)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "dilation: expected at least 1", lambda: S.PixelAttention(8, 2, 1, dilation=0)),
        (ValueError, "dilation: needs a radius", lambda: S.PixelAttention(8, 2, dilation=3)),
        (ValueError, "head_dim: expected at least 1", lambda: S.GraphMultiheadAttention(8, 2, head_dim=0)),
        (ValueError, "dropout: expected 0 to 1", lambda: S.GraphMultiheadAttention(8, 2, dropout=2.0)),
        (
            ValueError,
            "v: expected",
            lambda: S.KVCache().append(torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 1, 4)),
        ),
        (
            ValueError,
            "k: expected",
            lambda: filled().append(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)),
        ),
    ],
)
def test_bad_input(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()


def filled() -> S.KVCache:
    cache = S.KVCache()
    cache.append(torch.zeros(4, 2, 1, 4), torch.zeros(4, 2, 1, 4))
    return cache


def test_the_default_device_is_not_asked() -> None:
    """Only inputs and parameters say where a result lies."""
    index, model = torch.randint(30, (2, 90)), nn.ModuleList([nn.MultiheadAttention(8, 2)])
    graph = saccade.Graph.from_edge_index(index, 30)

    def found() -> list[Tensor]:
        shift = S.ConvolutionalAttention(3, 8, 3, device="cpu").shift
        codes = S.laplacian_encoding(graph, 30, 3), S.random_walk_encoding(index, 30, 3)
        return [graph.reorder()[1], *codes, shift.detach()]

    expected = found()
    with torch.device("meta"):
        assert all(map(torch.equal, found(), expected))
        saccade.accelerate(model)
    assert isinstance(model[0], S.MultiheadAttention)
