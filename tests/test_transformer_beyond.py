"""The Transformer's layers and stacks where they go beyond torch's: packed batches, windows and masks of
ours, nested tensors in training, `accelerate`.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import saccade
import torch
from torch import nn
from torch.nn import functional as F
from transformer_twins import (
    CAUSAL,
    PADDING,
    VALID,
    Calls,
    E,
    H,
    N,
    S,
    TorchOverridden,
    encoder,
)

# The prototype notice of torch's nested tensors, not ours to answer.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested"),
    pytest.mark.usefixtures("one_thread"),  # shapes this small gain nothing from more
]


def test_packed_is_the_same_on_valid_rows() -> None:
    model, x = encoder(packed=True), torch.randn(N, S, E, requires_grad=True)
    plain = copy.deepcopy(model)
    plain.packed = False
    holes = PADDING.clone()
    holes[0, 3] = holes[1, 0] = True
    for padding in (PADDING, PADDING.flip(1), holes):
        for mask in (None, CAUSAL, CAUSAL.isinf(), torch.randn(S, S), saccade.Window(2, 2)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got, expected = (m(x, mask, padding) for m in (model, plain))
            torch.testing.assert_close(got[~padding], expected[~padding])
            assert (got[padding] == 0).all() and got.shape == expected.shape
    weight = VALID[..., None] * torch.randn(N, S, E)
    grads = [
        torch.autograd.grad((m(x, src_key_padding_mask=PADDING) * weight).sum(), [x, *m.parameters()])
        for m in (model, plain)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_packed_does_no_work_for_padding() -> None:
    model, seen = encoder(packed=True), []
    model.layers[0].linear1.register_forward_hook(lambda _, args, out: seen.append(args[0].shape))
    model(torch.randn(N, S, E), src_key_padding_mask=PADDING)
    assert seen == [(int(VALID.sum()), E)]


def test_packed_with_other_layouts_and_empty_rows() -> None:
    x, padding = torch.randn(S, N, E), PADDING.clone()
    padding[1] = True
    model = encoder({"batch_first": False}, packed=True)
    out = model(x, src_key_padding_mask=padding)
    assert out.shape == x.shape and out.isfinite().all() and (out.transpose(0, 1)[padding] == 0).all()
    torch.testing.assert_close(out[:, 2:], model(x[:, 2:], src_key_padding_mask=padding[2:]))
    assert (model(x, src_key_padding_mask=torch.ones_like(padding)) == 0).all()
    single = model(x[:, 0], src_key_padding_mask=PADDING[1])
    torch.testing.assert_close(single[:4], model(x[:4, 0]))
    assert (single[4:] == 0).all()
    with pytest.raises(AssertionError, match="shape"):
        model(x, src_key_padding_mask=PADDING[:, :5])


@pytest.mark.parametrize("packed", [False, True])
def test_window_per_layer(packed: bool) -> None:
    model = encoder(windows=[(2, 1), None], packed=packed)
    plain = encoder()
    plain.load_state_dict(model.state_dict())
    x, delta = torch.randn(N, S, E), torch.arange(S) - torch.arange(S)[:, None]
    band = (delta < -2) | (delta > 1)
    gap = PADDING.clone()
    gap[0, 3:5] = True  # a window counts places, not valid tokens
    for padding in (PADDING, gap):
        out = plain.layers[0](x, src_mask=band, src_key_padding_mask=padding)
        out = plain.norm(plain.layers[1](out, src_key_padding_mask=padding))
        got = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(got[~padding], out[~padding])
    decoder = saccade.nn.TransformerDecoder(
        saccade.nn.TransformerDecoderLayer(E, H, 64, 0.0, batch_first=True), 2, windows=[(1, 0)] * 2
    )
    free = copy.deepcopy(decoder)
    for layer in free.layers:
        layer.self_attn = plain.layers[0].self_attn
    for layer in decoder.layers:
        layer.self_attn.load_state_dict(plain.layers[0].self_attn.state_dict())
    memory, band = torch.randn(N, 5, E), (delta < -1) | (delta > 0)
    torch.testing.assert_close(decoder(x, memory), free(x, memory, tgt_mask=band))


def test_window_of_a_layer_is_one_of_its_own_arguments() -> None:
    layer = saccade.nn.TransformerEncoderLayer(
        E, H, 64, window=(3, 0), num_kv_heads=2, head_dim=4, attention_activation="softmax1", qk_norm=True
    )
    attention = layer.self_attn
    assert attention.window == (3, 0) and attention.in_proj_weight.shape == (4 * (H + 2 * 2), E)
    assert attention.activation == "softmax1" and hasattr(attention, "q_norm")
    x = torch.randn(S, N, E)
    moved = x.clone()
    moved[0] += 1
    a, b = layer.eval()(x), layer(moved)
    assert torch.equal(a[4:], b[4:]) and not torch.equal(a[3], b[3])
    other = saccade.nn.TransformerDecoderLayer(E, H, 64, window=(3, 0), num_kv_heads=2, score="additive")
    assert other.multihead_attn.window is None and other.multihead_attn.num_kv_heads == 2
    weights = [m.score_term.weight for m in (other.self_attn, other.multihead_attn)]
    assert weights[0] is not weights[1] and other(x, x).shape == x.shape
    model = saccade.nn.Transformer(
        E, H, 2, 1, 64, encoder_windows=[(1, 1), (2, 2)], decoder_windows=[(2, 0)], num_kv_heads=1
    )
    assert [x.self_attn.window for x in model.encoder.layers] == [(1, 1), (2, 2)]
    assert model(x, x[:5]).isfinite().all()


def test_masks_of_ours() -> None:
    x, memory = torch.randn(2, S, E), torch.randn(2, 6, E)
    layer = saccade.nn.TransformerDecoderLayer(E, H, 64, 0.0, batch_first=True)
    window, cross = saccade.Window(3, 0), saccade.KeyPadding(torch.tensor([6, 2]))
    hidden = ~window.materialize(S, S)
    padding = torch.arange(6) >= torch.tensor([6, 2])[:, None]
    expected = layer(x, memory, tgt_mask=hidden, memory_key_padding_mask=padding)
    torch.testing.assert_close(layer(x, memory, tgt_mask=window, memory_mask=cross), expected)
    torch.testing.assert_close(layer(x, memory, CAUSAL, cross, mask=window), expected)
    model = saccade.nn.Transformer(E, H, 1, 1, 64, 0.0, batch_first=True)
    given = {"src_mask": window, "tgt_mask": saccade.Causal(), "memory_mask": saccade.Window(None, 1)}
    dense = {n: ~m.materialize(5 if n[0] != "s" else S, 5 if n[0] == "t" else S) for n, m in given.items()}
    tgt = torch.randn(2, 5, E)
    torch.testing.assert_close(model(x, tgt, **given), model(x, tgt, **dense))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("norm_first", [False, True])
def test_nested_tensors(layout: torch.layout, norm_first: bool) -> None:
    """In training too, with gradients; torch takes the strided layout in eval only."""
    model = encoder({"norm_first": norm_first})
    x, lengths = torch.randn(N, S, E, requires_grad=True), VALID.sum(1).tolist()
    expected = model(x, src_key_padding_mask=PADDING)
    nested = torch.nested.as_nested_tensor([r[:n] for r, n in zip(x, lengths, strict=True)], layout=layout)
    assert nested.requires_grad
    for run in (model, lambda y: model.norm(model.layers[1](model.layers[0](y)))):
        out = run(nested)
        assert out.is_nested and out.layout == layout
        rows = torch.cat(list(out.unbind()))
        torch.testing.assert_close(rows, expected[VALID])
        grads = (torch.autograd.grad((y * y).sum(), x, retain_graph=True)[0] for y in (rows, expected[VALID]))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    layer = saccade.nn.TransformerDecoderLayer(E, H, 64, 0.0, batch_first=True, norm_first=norm_first)
    plain = layer(x, x, tgt_key_padding_mask=PADDING, memory_key_padding_mask=PADDING)
    torch.testing.assert_close(torch.cat(list(layer(nested, nested).unbind())), plain[VALID])
    causal = torch.cat(list(model.eval()(nested, saccade.Causal()).unbind()))
    torch.testing.assert_close(causal, model(x, CAUSAL)[VALID])


def test_what_we_refuse() -> None:
    layer = saccade.nn.TransformerEncoderLayer(E, H, 64)
    for call, kind, text in (
        (lambda: saccade.nn.TransformerEncoderLayer(E, H, windw=(1, 0)), TypeError, "windw"),
        (lambda: saccade.nn.Transformer(E, H, windw=(1, 0)), TypeError, "windw"),
        (lambda: saccade.nn.TransformerEncoderLayer(E, H, num_kv_heads=3), ValueError, "num_kv_heads"),
        (lambda: saccade.nn.TransformerEncoder(layer, 2, windows=[(1, 0)]), ValueError, "2 layers"),
        (lambda: saccade.nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H), 1, windows=[(1, 0)]),
         TypeError, "windows"),
        (lambda: saccade.nn.Transformer(E, H, custom_encoder=layer, packed=True), ValueError, "packed"),
        (lambda: saccade.nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H), 1)(
            torch.randn(S, N, E), saccade.Causal()), TypeError, "saccade.Mask"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            call()


def test_accelerate_a_whole_transformer() -> None:
    model = nn.Transformer(E, H, 2, 2, 64, batch_first=True).eval()
    src, tgt = torch.randn(N, S, E), torch.randn(N, S, E)
    given = {"tgt_mask": CAUSAL.isinf(), "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    expected, modules = model(src, tgt, **given), [id(m) for m in model.modules()]
    report = saccade.accelerate(model)
    assert len(report.swapped) == 6 and len(report.notes) == 7 and not report.skipped
    assert type(model) is saccade.nn.Transformer and [id(m) for m in model.modules()] == modules
    other = pickle.loads(pickle.dumps(model))
    for m in (model, other):
        with torch.no_grad(), Calls() as calls:
            torch.testing.assert_close(m(src, tgt, **given), expected, rtol=1e-4, atol=1e-5)
        assert calls.of("saccade.forward") == 6
        saccade.restore(m)
        assert all(type(x).__module__.startswith("torch.") for x in m.modules())


def test_accelerate_leaves_overriding_layers_their_forward() -> None:
    model = nn.TransformerEncoder(TorchOverridden(E, H, 64, 0.0, batch_first=True), 2).eval()
    x = torch.randn(N, S, E)
    expected = model(x)
    report = saccade.accelerate(model)
    assert type(model.layers[0]) is TorchOverridden and len(report.notes) == 3
    with torch.no_grad(), Calls() as calls:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert calls.of("saccade.forward") == 2
    assert F.relu is model.layers[0].activation
