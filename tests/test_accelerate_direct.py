"""Modules that call F.scaled_dot_product_attention themselves: that call in them goes to saccade."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import saccade
import torch
import torch.nn.functional as F
from saccade.integrations import direct
from torch import Tensor, nn

E, H = 32, 4


class Attention(nn.Module):
    """As people write it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.proj, self.dropout = nn.Linear(E, 3 * E), nn.Linear(E, E), dropout

    def forward(self, x: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, E // H)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        return self.proj(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.mha = nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, **options)
        return x + self.mha(x, x, x, need_weights=False)[0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two functions ran."""
    found: list[str] = []

    def run(*args: Any, **kwargs: Any) -> Tensor:
        found.append("saccade")
        return saccade.scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(direct, "scaled_dot_product_attention", run)
    return found


MASK = torch.ones(9, 9, dtype=torch.bool).tril(3)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"mask": MASK}], ids=["plain", "causal", "mask"]
)
def test_results_and_gradients_are_the_same(options: dict[str, Any], calls: list[str]) -> None:
    model, x = Model(), torch.randn(2, 9, E)
    state = {name: id(p) for name, p in model.named_parameters()}
    expected = model(x, **options)
    old = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    report = saccade.accelerate(model)
    assert report.swapped == ["layers.0", "layers.1", "mha"] and set(report.notes) == {"layers.0", "layers.1"}
    assert "layers.0: its calls of F.scaled_dot_product_attention" in repr(report)
    calls.clear()
    out = model(x, **options)
    assert calls == ["saccade"] * 2
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    for grad, before in zip(grads, old, strict=True):
        torch.testing.assert_close(grad, before, rtol=1e-4, atol=1e-5)
    assert {name: id(p) for name, p in model.named_parameters()} == state
    assert isinstance(model.layers[0], Attention) and repr(model.layers[0]) == repr(Attention())
    assert "already" in saccade.accelerate(model).skipped["layers.0"]
    assert saccade.restore(model) == report.swapped and type(model.layers[0]) is Attention
    calls.clear()
    assert torch.equal(model(x, **options), expected) and not calls


def test_other_modules_keep_torchs(calls: list[str]) -> None:
    """Nothing global: what is not inside a swapped module's forward is torch's."""
    swapped, other = Attention(), Attention()
    saccade.accelerate(swapped, verify=False)
    x = torch.randn(2, 5, E)
    other(x)
    F.scaled_dot_product_attention(x, x, x)
    assert not calls
    with direct.UsesSaccade():
        other(x)
    swapped(x)
    assert calls == ["saccade"] * 2


class Quiet(Attention):
    """Its own forward, which does without."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self._attend(x)

    def _attend(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_what_is_found_and_what_is_left_alone() -> None:
    patched, parametrized = Attention(), Attention()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    parametrized.weight = nn.Parameter(torch.randn(3, 3))
    nn.utils.parametrizations.orthogonal(parametrized, "weight")
    model = nn.ModuleDict(
        {"quiet": Quiet(), "patched": patched, "own": parametrized, "linear": nn.Linear(E, E)}
    )
    report = saccade.accelerate(model)
    assert report.swapped == ["quiet"] and "parametrized" in report.skipped["own"]
    assert set(report.skipped) == {"own"}
    with torch.device("meta"):
        assert saccade.accelerate(Attention()).swapped == [""]


def test_a_difference_leaves_the_module_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        direct,
        "scaled_dot_product_attention",
        lambda *a, **k: 1.001 * F.scaled_dot_product_attention(*a, **k),
    )
    direct._fault.cache_clear()
    module = Attention()
    report = saccade.accelerate(module)
    direct._fault.cache_clear()
    assert "is off by" in report.skipped[""] and type(module) is Attention


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_pass_the_check(dtype: torch.dtype) -> None:
    assert saccade.accelerate(Attention().to(dtype)).swapped == [""]


def test_fp64_may_round_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own result is the exact one there, so its error, 0, says nothing."""
    few_roundings = 1 + 4 * torch.finfo(torch.float64).eps
    monkeypatch.setattr(
        direct,
        "scaled_dot_product_attention",
        lambda *a, **k: few_roundings * F.scaled_dot_product_attention(*a, **k),
    )
    direct._fault.cache_clear()
    report = saccade.accelerate(Attention().double())
    direct._fault.cache_clear()
    assert report.swapped == [""]


def test_copies_and_pickles_stay_accelerated(calls: list[str]) -> None:
    model, x = Model(), torch.randn(2, 5, E)
    expected = model(x)
    saccade.accelerate(model, verify=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        torch.testing.assert_close(other(x), expected)
        assert len(calls) == 2 and other.layers[0] is not model.layers[0]
        assert len(saccade.restore(other)) == 3 and type(other.layers[0]) is Attention
    assert type(model.layers[0]) is not Attention


def test_hooks_and_a_parametrization_that_comes_later() -> None:
    module, x, seen = Attention(), torch.randn(2, 5, E), []
    module.scale = nn.Parameter(torch.randn(3, 3))
    module.register_forward_hook(lambda *_: seen.append(1))
    expected = module(x)
    saccade.accelerate(module)
    nn.utils.parametrizations.orthogonal(module, "scale")
    torch.testing.assert_close(module(x), expected)
    saccade.restore(module)
    assert isinstance(module, Attention) and "scale" in module.parametrizations and len(seen) == 2
    assert not isinstance(module, direct.accelerated(Attention)) and module.scale.shape == (3, 3)
    nn.utils.parametrize.remove_parametrizations(module, "scale")
    assert type(module) is Attention


def test_nested_tensors_stay_torchs(calls: list[str]) -> None:
    rows = [torch.randn(n, H, 8) for n in (3, 5)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    with direct.UsesSaccade():
        F.scaled_dot_product_attention(nested, nested, nested)
    assert not calls


def test_torch_compile_in_one_graph_and_export() -> None:
    model, x = Model().eval(), torch.randn(2, 9, E)
    expected = model(x)
    saccade.accelerate(model, verify=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
        found = [str(node.target) for graph in graphs for node in graph.nodes]
        assert sum("saccade.forward" in name for name in found) == 3
        assert not any("scaled_dot" in name for name in found)
        torch.testing.assert_close(program.module()(x), expected)
