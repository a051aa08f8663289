"""accelerate and restore: what is swapped, what stays as it was, what is left alone and why."""

from __future__ import annotations

import copy
import pickle

import pytest
import saccade
import torch
from saccade.accelerate import SWAPS
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

E, H = 32, 4


class Model(nn.Module):
    """Attention in the places people put it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(E, H, batch_first=True)
        self.cross = nn.MultiheadAttention(E, H, kdim=16, vdim=24, add_bias_kv=True, add_zero_attn=True)
        self.layers = nn.ModuleList([nn.MultiheadAttention(E, 2, bias=False) for _ in range(2)])
        self.shared = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x, x, x, need_weights=False)[0]


def test_swaps_by_class_and_keeps_everything_else() -> None:
    model = Model().eval()
    model.first.tag = "mine"
    before = {name: id(module) for name, module in model.named_modules()}
    parameters = [id(p) for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    report = saccade.accelerate(model)
    assert (
        report.swapped == ["first", "cross", "layers.0", "layers.1"]
        and not report.skipped
        and not report.notes
    )
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == list(state)
    assert type(model.first) is saccade.nn.MultiheadAttention and model.shared is model.first
    assert model.first.tag == "mine" and not any(m.training for m in model.modules())
    assert saccade.restore(model) == report.swapped
    assert type(model.first) is nn.MultiheadAttention and not any("saccade" in n for n in vars(model.first))
    assert saccade.restore(model) == []


def test_results_and_gradients_are_the_same() -> None:
    x = torch.randn(2, 9, E)
    model = Model()
    expected = model(x)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in model.first.parameters()]
    model.zero_grad()
    saccade.accelerate(model)
    out = model(x)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected)
    for p, grad in zip(model.first.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


def test_the_root_itself() -> None:
    module = nn.MultiheadAttention(E, H)
    report = saccade.accelerate(module)
    assert report.swapped == [""] and isinstance(module, saccade.nn.MultiheadAttention)
    assert "1 module" in repr(report) and "model itself" in repr(report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_pass_the_check(dtype: torch.dtype) -> None:
    assert saccade.accelerate(Model().to(dtype)).swapped == ["first", "cross", "layers.0", "layers.1"]


@pytest.mark.parametrize("std", [0.1, 0.5, 1.0])
def test_sound_modules_in_fp64_pass_the_check(std: float) -> None:
    for size, heads in ((64, 4), (8, 2)):
        module = nn.MultiheadAttention(size, heads, dtype=torch.float64)
        for weight in module.parameters():
            nn.init.normal_(weight, std=std)
        assert saccade.accelerate(module).swapped == [""]


def test_the_check_is_not_the_callers_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert saccade.accelerate(nn.MultiheadAttention(8, 2)).swapped == [""]


def test_hooks_and_optimizer_state_stay() -> None:
    model, x = Model(), torch.randn(2, 5, E, requires_grad=True)
    calls: list[str] = []
    model.first.register_forward_hook(lambda *_: calls.append("forward"))
    model.first.register_full_backward_hook(lambda *_: calls.append("backward"))
    optimizer = torch.optim.AdamW(model.first.parameters())
    model(x).sum().backward()
    optimizer.step()
    calls.clear()
    moments = [optimizer.state[p]["exp_avg"] for p in model.first.parameters()]
    saccade.accelerate(model)
    assert not calls  # the check passes the hooks by
    assert all(
        optimizer.state[p]["exp_avg"] is m for p, m in zip(model.first.parameters(), moments, strict=True)
    )
    model(x).sum().backward()
    optimizer.step()
    assert calls == ["forward", "backward"]


def test_nothing_random_and_no_gradient_is_touched() -> None:
    model = Model()
    saccade.accelerate(nn.MultiheadAttention(E, H, dropout=0.5))
    before = torch.random.get_rng_state()
    with torch.no_grad():
        saccade.accelerate(model)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.modules())


class Widened(nn.MultiheadAttention):
    pass


def test_what_is_left_alone_has_a_reason() -> None:
    model = nn.ModuleDict(
        {
            "subclass": Widened(E, H),
            "patched": nn.MultiheadAttention(E, H),
            "ours": saccade.nn.MultiheadAttention(E, H, window=(3, 0)),
            "broken": nn.MultiheadAttention(E, H),
        }
    )
    model["patched"].forward = lambda *_: None
    with torch.no_grad():
        model["broken"].in_proj_weight[0, 0] = torch.nan
    report = saccade.accelerate(model)
    assert report.swapped == [] and list(report.skipped) == list(model)
    texts = (
        "a subclass",
        "forward was replaced",
        "already",
        "not finite",
    )
    for reason, text in zip(report.skipped.values(), texts, strict=True):
        assert text in reason
    assert "left alone" in repr(report) and "Widened" in repr(report)
    assert saccade.restore(model) == [] and model["ours"].window == (3, 0)
    assert saccade.accelerate(model, verify=False).swapped == ["broken"]


@pytest.mark.parametrize("order", ["parametrized first", "accelerated first"])
@pytest.mark.parametrize("remove", [False, True])
def test_parametrizations_stay(order: str, remove: bool) -> None:
    """torch puts a class of its own on a parametrized module; ours goes under it, and back."""
    model, x = Model(), torch.randn(2, 9, E)
    if order == "accelerated first":
        saccade.accelerate(model)
    nn.utils.parametrizations.weight_norm(model.first, "in_proj_weight")
    nn.utils.parametrizations.weight_norm(model.first.out_proj, "weight")
    names, twin = list(model.state_dict()), copy.deepcopy(model)
    saccade.restore(twin)
    assert not isinstance(twin.first, saccade.nn.MultiheadAttention)
    if order == "parametrized first":
        assert saccade.accelerate(model).swapped == ["first", "cross", "layers.0", "layers.1"]
    assert isinstance(model.first, saccade.nn.MultiheadAttention) and list(model.state_dict()) == names
    results = []
    for m in (model, twin):
        m(x).square().sum().backward()
        results.append([m(x), *(p.grad for p in m.first.parameters())])
    for new, old in zip(*results, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)
    if remove:
        nn.utils.parametrize.remove_parametrizations(model.first, "in_proj_weight")
    assert saccade.restore(model) == ["first", "cross", "layers.0", "layers.1"]
    assert not isinstance(model.first, saccade.nn.MultiheadAttention)
    assert (type(model.first) is nn.MultiheadAttention) == remove
    torch.testing.assert_close(model(x), results[1][0])
    if not remove:
        nn.utils.parametrize.remove_parametrizations(model.first, "in_proj_weight")
        assert type(model.first) is nn.MultiheadAttention


def test_weight_norm_of_the_old_kind_and_spectral_norm() -> None:
    model, x = Model(), torch.randn(2, 9, E)
    nn.utils.weight_norm(model.first, "in_proj_weight")
    nn.utils.spectral_norm(model.first.out_proj, "weight")
    model.eval()
    expected = model(x)
    assert "first" in saccade.accelerate(model).swapped
    torch.testing.assert_close(model(x), expected)
    saccade.restore(model)
    assert torch.equal(model(x), expected)


def test_a_module_that_differs_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(saccade.nn.MultiheadAttention):
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            out, weights = super().forward(*args, **kwargs)
            return 1.001 * out, weights

    class Failing(saccade.nn.MultiheadAttention):
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            raise RuntimeError("no kernel")

    module = nn.MultiheadAttention(E, H)
    for target, text in ((Wrong, "is off by"), (Failing, "no kernel")):
        monkeypatch.setitem(SWAPS, nn.MultiheadAttention, target)
        report = saccade.accelerate(module)
        assert not report.swapped and text in report.skipped[""]
        assert type(module) is nn.MultiheadAttention and not any("saccade" in n for n in vars(module))


def test_modules_without_values_are_swapped_unchecked() -> None:
    module = nn.MultiheadAttention(E, H, device="meta")
    assert saccade.accelerate(module).swapped == [""]


def test_copies_and_pickles_stay_accelerated() -> None:
    model = Model()
    saccade.accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.first) is saccade.nn.MultiheadAttention and other.first is not model.first
        assert len(saccade.restore(other)) == 4 and type(other.first) is nn.MultiheadAttention
    assert type(model.first) is saccade.nn.MultiheadAttention


def encoder(**options: object) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 64, batch_first=True, **options), 2).eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoders_call_the_swapped_module_in_inference(monkeypatch, padded: bool, activation: str) -> None:
    """torch's encoder layer has a fused path in eval that reads self_attn's weights and never calls it."""
    model, x = encoder(activation=activation), torch.randn(3, 7, E)
    padding = torch.arange(7) >= torch.tensor([7, 4, 5])[:, None] if padded else None
    fused = {name: getattr(model.layers[0], name) for name in ("activation_relu_or_gelu",)}
    expected = model(x, src_key_padding_mask=padding)
    report = saccade.accelerate(model)
    assert set(report.notes) == {"", "layers.0", "layers.1"}
    calls: list[int] = []
    forward = saccade.nn.MultiheadAttention.forward
    monkeypatch.setattr(
        saccade.nn.MultiheadAttention,
        "forward",
        lambda self, *a, **k: (calls.append(1), forward(self, *a, **k))[1],
    )
    with torch.no_grad():
        out = model(x, src_key_padding_mask=padding)
        valid = torch.ones(3, 7, dtype=torch.bool) if padding is None else ~padding
        torch.testing.assert_close(out[valid], expected[valid], rtol=1e-4, atol=1e-5)
        assert len(calls) == 2
        assert torch.equal(copy.deepcopy(model)(x, src_key_padding_mask=padding), out) and len(calls) == 4
        saccade.restore(model)
        torch.testing.assert_close(
            model(x, src_key_padding_mask=padding)[valid], expected[valid], rtol=1e-4, atol=1e-5
        )
    assert (
        len(calls) == 4
        and model.use_nested_tensor
        and type(model.layers[0].self_attn) is nn.MultiheadAttention
    )
    assert {name: getattr(model.layers[0], name) for name in fused} == fused


def test_decoders_and_whole_transformers() -> None:
    model = nn.Transformer(E, H, 1, 1, 64, batch_first=True).eval()
    source, target = torch.randn(2, 6, E), torch.randn(2, 5, E)
    with torch.no_grad():
        expected = model(source, target)
        assert len(saccade.accelerate(model).swapped) == 3
        torch.testing.assert_close(model(source, target), expected, rtol=1e-4, atol=1e-5)


def test_bad_arguments() -> None:
    for function in (saccade.accelerate, saccade.restore):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got list"):
            function([])


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")
def test_sharded_models_are_left_alone_with_a_word() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, model = init_device_mesh("cpu", (1,)), Model()
        fully_shard(model.cross, mesh=mesh)  # gets a class of its own
        fully_shard(model, mesh=mesh)
        report = saccade.accelerate(model)
        assert not report.swapped and len(report.skipped) == 4
        assert all("before it is sharded" in reason for reason in report.skipped.values())
        assert saccade.accelerate(model, verify=False).swapped == ["first", "layers.0", "layers.1"]
    finally:
        distributed.destroy_process_group()
