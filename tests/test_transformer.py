"""The Transformer's layers and stacks: torch's results in every mode, and what goes beyond them."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import saccade
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

E, H, N, S = 32, 4, 3, 9
PADDING = torch.arange(S) >= torch.tensor([9, 4, 6])[:, None]
VALID = ~PADDING
CAUSAL = nn.Transformer.generate_square_subsequent_mask(S)
CLASSES = ("TransformerEncoderLayer", "TransformerDecoderLayer", "Transformer")
# The prototype notice of torch's nested tensors, not ours to answer.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Shapes this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> int:
        return sum(name in x for x in self.names)


def twins(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """torch's module and ours from the same seed: the same values, and the generator left alike."""
    torch.manual_seed(3)
    theirs = getattr(nn, name)(*args, **kwargs)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    ours = getattr(saccade.nn, name)(*args, **kwargs)
    assert torch.equal(state, torch.get_rng_state()) and isinstance(ours, type(theirs))
    a, b = theirs.state_dict(), ours.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
    return theirs, ours


def gradients(module: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    out = module(*args, **kwargs)
    total = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    return list(torch.autograd.grad(total, [*args, *module.parameters()]))


def encoder(layer: dict[str, Any] | None = None, norm: bool = True, **options: Any) -> Any:
    given = {"dropout": 0.0, "batch_first": True, **(layer or {})}
    one = saccade.nn.TransformerEncoderLayer(E, H, 64, **given)
    made = saccade.nn.TransformerEncoder(one, 2, nn.LayerNorm(E) if norm else None, **options)
    for p in made.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, std=0.3)  # biases that are not zero show where rows are left alone
    return made


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


class Overridden(saccade.nn.TransformerEncoderLayer):
    """As written for torch's class: it knows no mask= and adds the float masks it is given."""

    def _sa_block(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        assert key_padding_mask is None or key_padding_mask.is_floating_point()
        assert attn_mask is None or attn_mask.is_floating_point()
        out = self.self_attn(x, x, x, attn_mask=attn_mask, key_padding_mask=key_padding_mask)[0]
        return 2 * self.dropout1(out)

    def _ff_block(self, x: Tensor) -> Tensor:
        return 3 * super()._ff_block(x)


class TorchOverridden(nn.TransformerEncoderLayer):
    _sa_block = Overridden._sa_block

    def _ff_block(self, x: Tensor) -> Tensor:
        return 3 * super()._ff_block(x)


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


# Beyond torch.


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
