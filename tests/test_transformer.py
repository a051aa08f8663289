"""The Transformer's layers and stacks: torch's results in every mode."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import saccade
import torch
from torch import Tensor, nn
from transformer_twins import (
    CAUSAL,
    CLASSES,
    PADDING,
    VALID,
    Calls,
    E,
    H,
    N,
    Overridden,
    S,
    TorchOverridden,
    encoder,
    gradients,
    twins,
)

# The prototype notice of torch's nested tensors, not ours to answer.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested"),
    pytest.mark.usefixtures("one_thread"),  # shapes this small gain nothing from more
]


# torch's own samples.


def samples(name: str, dtype: torch.dtype, training: bool) -> list[Any]:
    pytest.importorskip("expecttest")
    from torch.testing._internal import common_modules

    torch.manual_seed(0)
    make = getattr(common_modules, f"module_inputs_torch_nn_{name}")
    return make(None, device="cpu", dtype=dtype, requires_grad=True, training=training)


def sample_twins(name: str, sample: Any, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    args, kwargs = sample.constructor_input.args, dict(sample.constructor_input.kwargs)
    if name == "TransformerEncoder":
        theirs = nn.TransformerEncoder(*args, **kwargs)
        layer = copy.deepcopy(args[0])
        saccade.accelerate(layer, verify=False)
        ours: nn.Module = saccade.nn.TransformerEncoder(layer, *args[1:], **kwargs)
    else:
        theirs = getattr(nn, name)(*args, **kwargs, dtype=dtype)
        ours = getattr(saccade.nn, name)(*args, **kwargs, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize(("dtype", "training"), [(torch.float32, False), (torch.float64, True)])
@pytest.mark.parametrize("name", [*CLASSES, "TransformerEncoder"])
def test_torchs_samples(name: str, dtype: torch.dtype, training: bool) -> None:
    found = samples(name, dtype, training)
    assert len(found) >= 35
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
    for n, sample in enumerate(found):
        theirs, ours = (m.train(training) for m in sample_twins(name, sample, dtype))
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        if not training:
            # torch's nested path zeros padded rows, which a decoder without a memory mask reads
            torch.backends.mha.set_fastpath_enabled(name != "Transformer")
            with torch.no_grad():
                got, expected = ours(*args, **kwargs), theirs(*args, **kwargs)
            torch.backends.mha.set_fastpath_enabled(True)
            torch.testing.assert_close(got, expected, **tolerance, msg=f"sample {n}")
        elif n % 3 == 0:
            got, expected = (gradients(m, args, kwargs) for m in (ours, theirs))
            torch.testing.assert_close(got, expected, **tolerance, msg=f"sample {n}")
        if sample.reference_fn is not None and name != "TransformerEncoder" and n % 5 == 0:
            expected = sample.reference_fn(ours, *args, **kwargs)
            torch.testing.assert_close(ours(*args, **kwargs), expected, **tolerance, msg=f"sample {n}")


@pytest.mark.parametrize("name", CLASSES)
def test_second_derivatives(name: str) -> None:
    """torch skips its own on the CPU: the derivative of its backward is not there."""
    for sample in (samples(name, torch.float64, True)[n] for n in (0, -6)):
        _, ours = sample_twins(name, sample, torch.float64)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        found = [(n, p) for n, p in ours.named_parameters() if n.endswith("in_proj_weight")]
        names, values = zip(*found, strict=True)

        def run(*x: Tensor, m: Any = ours, n: Any = names, a: int = len(args), k: Any = kwargs) -> Tensor:
            return torch.func.functional_call(m, dict(zip(n, x[a:], strict=True)), x[:a], k)

        assert torch.autograd.gradgradcheck(run, (*args, *values), fast_mode=True, atol=1e-4)


# torch's results.


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_encoder_is_torchs(training: bool, first: bool, norm_first: bool) -> None:
    options = {"dropout": 0.0, "batch_first": first, "norm_first": norm_first, "activation": "gelu"}
    layers = twins("TransformerEncoderLayer", E, H, 64, **options)
    theirs, ours = (
        module.TransformerEncoder(layer, 2, nn.LayerNorm(E)).train(training)
        for module, layer in zip((nn, saccade.nn), layers, strict=True)
    )
    x = torch.randn(N, S, E) if first else torch.randn(S, N, E)
    valid, added = VALID if first else VALID.t(), torch.randn(S, S)
    for grad in (torch.enable_grad, torch.inference_mode):
        for mask in (None, CAUSAL, CAUSAL.isinf(), added):
            for padding in (None, PADDING, torch.zeros(N, S).masked_fill(PADDING, -torch.inf)):
                # torch's fused path takes a float mask for a bool one
                torch.backends.mha.set_fastpath_enabled(mask is not added)
                with grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    expected, out = (m(x, mask, padding) for m in (theirs, ours))
                torch.backends.mha.set_fastpath_enabled(True)
                keep = torch.ones_like(valid) if padding is None else valid
                torch.testing.assert_close(out[keep], expected[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_whole_transformer_is_torchs(training: bool) -> None:
    options = {"dropout": 0.0, "batch_first": True}
    theirs, ours = (m.train(training) for m in twins("Transformer", E, H, 2, 2, 64, **options))
    src, tgt = torch.randn(N, S, E, requires_grad=True), torch.randn(N, 5, E, requires_grad=True)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    cases = [
        {},
        {"tgt_mask": causal},
        {"tgt_mask": causal, "tgt_is_causal": True, "src_mask": CAUSAL, "src_is_causal": True},
        {"tgt_mask": causal, "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING},
        {"memory_mask": torch.ones(5, S, dtype=torch.bool).triu(1), "memory_is_causal": True},
    ]
    for case in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, out = theirs(src, tgt, **case), ours(src, tgt, **case)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            for a, b in zip(
                gradients(ours, (src, tgt), case), gradients(theirs, (src, tgt), case), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_inference_runs_on_saccade() -> None:
    """torch's encoder has a fused path in eval that never calls self_attn."""
    model, x = encoder().eval(), torch.randn(N, S, E)
    for padding in (None, PADDING):
        for packed in (False, True):
            model.packed = packed
            with torch.no_grad(), Calls() as calls:
                model(x, src_key_padding_mask=padding)
            assert calls.of("saccade.forward") == 2
            assert not calls.of("_transformer_encoder_layer_fwd") and not calls.of("scaled_dot_product")
            assert packed or padding is not None or not calls.of("nested")


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("check", [False, True])
def test_padding_is_left_out_where_torch_leaves_it_out(check: bool, norm: bool) -> None:
    """With the same numbers at padded positions: in eval torch's encoder runs on nested tensors."""
    layers = twins("TransformerEncoderLayer", E, H, 64, batch_first=True)
    norms = [nn.LayerNorm(E) if norm else None for _ in layers]
    theirs, ours = (
        module.TransformerEncoder(layer, 2, one, mask_check=check).eval()
        for module, layer, one in zip((nn, saccade.nn), layers, norms, strict=True)
    )
    for one in norms:
        if one is not None:
            nn.init.ones_(one.bias)
    rows: list[int] = []
    ours.layers[0].linear1.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[:-1].numel()))
    x, valid, every = torch.randn(N, S, E), int(VALID.sum()), N * S
    cases = [
        (PADDING, {}, torch.no_grad, valid), (PADDING, {}, torch.enable_grad, every),
        (PADDING, {"mask": CAUSAL.isinf()}, torch.no_grad, every),
    ]  # fmt: skip
    if check:  # unchecked, torch's results are wrong unless padding comes last
        cases.append((PADDING.flip(1), {}, torch.no_grad, every))
    for padding, more, grad, count in cases:
        with grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got, want = (m(x, src_key_padding_mask=padding, **more) for m in (ours, theirs))
        assert rows.pop() == count
        keep = slice(None) if count == valid else ~padding
        torch.testing.assert_close(got[keep], want[keep], rtol=1e-4, atol=1e-5)


def test_dropout_is_drawn_and_reproducible() -> None:
    layer, x = saccade.nn.TransformerEncoderLayer(E, H, 64, 0.5), torch.randn(S, N, E)
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))


def test_causal_masks_are_seen_and_followed() -> None:
    """Exactly causal: the tensor is not read. Anything else, and after a change, it is."""
    model, x, mask = encoder().eval(), torch.randn(2, S, E), CAUSAL.clone()
    hints: list[Any] = []
    model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: hints.append(kwargs["is_causal"]), with_kwargs=True
    )
    expected = model(x, saccade.Causal())
    for given in (mask, mask.isinf()):
        torch.testing.assert_close(model(x, given), expected)
        torch.testing.assert_close(model(x, given, is_causal=False), expected)
        torch.testing.assert_close(model(x, given, is_causal=True), expected)
    changed = mask.clone()
    model(x, changed)
    changed[5, 2] = -torch.inf
    keep = saccade.Causal() & saccade.Graph.from_dense(changed == 0)
    torch.testing.assert_close(model(x, changed), model(x, keep))
    assert hints == [False, *[True, False, True] * 2, True, False, False]
    learned = mask.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x, learned).square().sum(), learned)
    assert grad.tril().abs().max() > 0


def test_what_torch_refuses() -> None:
    theirs, ours = twins("Transformer", E, H, 1, 1, 64, batch_first=True)
    layers = [nn.TransformerEncoderLayer(E, H, 64), saccade.nn.TransformerEncoderLayer(E, H, 64)]
    x = torch.randn(S, N, E)
    calls: list[Any] = [
        lambda module, model, layer: model(torch.randn(2, 3, E), torch.randn(4, 3, E)),
        lambda module, model, layer: model(torch.randn(2, 3, E + 1), torch.randn(2, 3, E)),
        lambda module, model, layer: module.TransformerEncoderLayer(E, H, activation="tanh"),
        lambda module, model, layer: module.TransformerDecoderLayer(E, H, activation="tanh"),
        lambda module, model, layer: module.TransformerEncoderLayer(E, 5),
        lambda module, model, layer: layer(x, is_causal=True),
        lambda module, model, layer: layer(x, src_mask=torch.zeros(S, S, dtype=torch.int)),
        lambda module, model, layer: layer(x, src_key_padding_mask=torch.zeros(N, S, dtype=torch.uint8)),
        lambda module, model, layer: layer(x, src_mask=torch.zeros(S, S + 1)),
        lambda module, model, layer: model.encoder(x, mask=torch.zeros(S, S, dtype=torch.int)),
    ]
    for call in calls:
        with pytest.raises(Exception) as expected:
            call(nn, theirs, layers[0])
        with pytest.raises(expected.type) as got:
            call(saccade.nn, ours, layers[1])
        assert str(got.value) == str(expected.value)


# Override points, hooks, copies, compile.


@pytest.mark.parametrize("packed", [False, True])
def test_overridden_blocks_are_called(packed: bool) -> None:
    ours, theirs = (c(E, H, 64, 0.0, batch_first=True) for c in (Overridden, TorchOverridden))
    theirs.load_state_dict(ours.state_dict())
    stacks = (
        saccade.nn.TransformerEncoder(ours, 2, packed=packed),
        nn.TransformerEncoder(theirs, 2, enable_nested_tensor=False),
        saccade.nn.TransformerEncoder(theirs, 2, packed=packed),  # torch's layers in our stack
    )
    x = torch.randn(N, S, E)
    for mask in (None, CAUSAL.isinf()):
        first, expected, mixed = (m(x, mask, PADDING) for m in stacks)
        torch.testing.assert_close(first[VALID], expected[VALID])
        torch.testing.assert_close(mixed[VALID], expected[VALID])
        assert bool((first[PADDING] == 0).all()) == packed


def test_hooks_copies_and_pickles() -> None:
    model, x = encoder(packed=True).eval(), torch.randn(N, S, E)
    expected = model(x, src_key_padding_mask=PADDING)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, src_key_padding_mask=PADDING), expected)
        assert type(other.layers[1].self_attn) is saccade.nn.MultiheadAttention
    calls: list[str] = []
    for name in ("self_attn", "norm2", "linear1"):
        getattr(model.layers[0], name).register_forward_hook(lambda *_, n=name: calls.append(n))
    model(x, src_key_padding_mask=PADDING)
    assert calls == ["self_attn", "linear1", "norm2"]


def test_compile_without_a_break() -> None:
    model, x = encoder().eval(), torch.randn(N, S, E)
    expected = model(x, CAUSAL.isinf(), PADDING)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, CAUSAL.isinf(), PADDING)[VALID], expected[VALID])
