"""The arguments that torch.nn.MultiheadAttention does not have, against the same steps by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import saccade
import torch
from saccade.nn import MultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F


def by_hand(
    module: MultiheadAttention, inputs: tuple[Tensor, Tensor, Tensor], mask: Any = None, **options: Any
) -> Tensor:
    """[N, S, E] through the reference, from the documented parameters."""
    heads, dim = module.num_heads, module.head_dim
    heads_k = module.num_kv_heads or heads
    sizes = [heads * dim, heads_k * dim, heads_k * dim]
    packed = module.in_proj_weight is not None
    weights = (
        module.in_proj_weight.split(sizes) if packed else [getattr(module, f"{n}_proj_weight") for n in "qkv"]
    )
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.split(sizes)
    parts = [
        F.linear(*p).unflatten(-1, (-1, dim)).transpose(1, 2)
        for p in zip(inputs, weights, biases, strict=True)
    ]
    if module.qk_norm:
        for n, norm in enumerate((module.q_norm, module.k_norm)):
            x = parts[n]
            parts[n] = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
    out = saccade.reference.attention(*parts, mask, **options)
    return F.linear(out.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)


def make(*args: Any, **kwargs: Any) -> MultiheadAttention:
    module = MultiheadAttention(*args, batch_first=True, dtype=torch.float64, **kwargs)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "window": ({"window": (2, 1)}, {"window": (2, 1)}),
    "window-heads": (
        {"window": (torch.tensor([0, 1, 2, 9]), None)},
        {"window": (torch.tensor([0, 1, 2, 9]), None)},
    ),
    "gqa": ({"num_kv_heads": 2}, {}),
    "gqa-separate": ({"num_kv_heads": 1, "kdim": 5, "vdim": 3}, {}),
    "head-dim": ({"head_dim": 5}, {}),
    "head-dim-gqa-no-bias": ({"head_dim": 3, "num_kv_heads": 2, "bias": False}, {}),
    "relu": ({"activation": "relu"}, {"activation": "relu"}),
    "sigmoid": ({"activation": "sigmoid"}, {"activation": "sigmoid"}),
    "softmax1": ({"activation": "softmax1"}, {"activation": "softmax1"}),
    "qk-norm": ({"qk_norm": True}, {}),
    "rope": ({"position": saccade.RoPE()}, {"position": saccade.RoPE()}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("need_weights", [True, False])
def test_equals_the_steps_by_hand(name: str, need_weights: bool) -> None:
    kwargs, options = CASES[name]
    module = make(16, 4, **kwargs)
    query = torch.randn(2, 5, module.embed_dim).double().requires_grad_()
    key, value = (torch.randn(2, 7, n).double().requires_grad_() for n in (module.kdim, module.vdim))
    calls = [(query, query, query), (query, key, value), (query, key, key)]
    for inputs in calls[1:2] if name == "gqa-separate" else calls:
        out, weights = module(*inputs, need_weights=need_weights, average_attn_weights=False)
        expected = by_hand(module, inputs, **options)
        torch.testing.assert_close(out, expected)
        assert weights is None or weights.shape == (2, 4, 5, inputs[1].shape[1])
        leaves = [*{id(x): x for x in inputs}.values(), *module.parameters()]
        got, wanted = (torch.autograd.grad(t.square().sum(), leaves) for t in (out, expected))
        torch.testing.assert_close(got, wanted)
        flipped = copy.deepcopy(module)
        flipped.batch_first = False
        moved = [inputs[0].transpose(0, 1)] + [x.transpose(0, 1) for x in inputs[1:]]
        torch.testing.assert_close(flipped(*moved)[0].transpose(0, 1), out)
    assert not module._qkv_same_embed_dim


def test_gqa_with_bias_kv() -> None:
    module = make(8, 4, num_kv_heads=2, add_bias_kv=True)
    assert module.bias_k is not None and module.bias_k.shape == (1, 1, 4)
    x = torch.randn(2, 5, 8).double()
    out, weights = module(x, x, x, average_attn_weights=False)
    full = nn.MultiheadAttention(8, 4, add_bias_kv=True, batch_first=True, dtype=torch.float64)
    repeat = lambda t: t.unflatten(-1, (2, 2)).repeat_interleave(2, -2).flatten(-2)  # noqa: E731
    q, k, v = module.in_proj_weight.t().split([8, 4, 4], -1)
    bq, bk, bv = module.in_proj_bias.split([8, 4, 4], -1)
    full.in_proj_weight = nn.Parameter(torch.cat([q, repeat(k), repeat(v)], -1).t())
    full.in_proj_bias = nn.Parameter(torch.cat([bq, repeat(bk), repeat(bv)]))
    full.bias_k, full.bias_v = nn.Parameter(repeat(module.bias_k)), nn.Parameter(repeat(module.bias_v))
    full.out_proj = module.out_proj
    torch.testing.assert_close((out, weights), full(x, x, x, average_attn_weights=False))


def test_positions_train_move_and_are_saved() -> None:
    slopes = nn.Parameter(torch.tensor([0.5, 0.25], dtype=torch.float64))
    module = make(8, 2, position=saccade.ALiBi(slopes))
    assert [n for n, _ in module.named_parameters()][-1] == "position_term.slopes" and "ALiBi" in repr(module)
    x = torch.randn(2, 5, 8).double()
    for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        out = each(x, x, x, need_weights=False)[0]
        own = each.position_term.slopes
        torch.testing.assert_close(out, by_hand(each, (x, x, x), position=saccade.ALiBi(own)))
        (got,) = torch.autograd.grad(out.square().sum(), own)
        assert got.abs().min() > 0
    assert module.float().position_term.slopes.dtype == torch.float32
    table = torch.randn(8, 2)
    assert "position_term.weight" in dict(make(8, 2, position=saccade.T5(table)).named_buffers())


def test_position_by_length() -> None:
    """A position that depends on the lengths comes from a callable; a module's parameters join ours."""

    class Relative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(64, 4).double())
            self.u = nn.Parameter(torch.randn(2, 4).double())

        def forward(self, seqlen_q: int, seqlen_k: int) -> saccade.TransformerXL:
            return saccade.TransformerXL(self.table[: seqlen_q + seqlen_k - 1], self.u, self.u)

    module = make(8, 2, position=Relative())
    x = torch.randn(2, 5, 8).double()
    out, weights = module(x, x, x)
    torch.testing.assert_close(out, by_hand(module, (x, x, x), position=module.position_term(5, 5)))
    assert weights is not None and "position_term.table" in module.state_dict()


@pytest.mark.parametrize("kind", ["additive", "gatv2", "callable"])
def test_scores(kind: str) -> None:
    weight = nn.Parameter(torch.randn(2, 4).double())
    score = {
        "additive": "additive",
        "gatv2": saccade.GATv2(weight, 0.1),
        "callable": lambda: saccade.Additive(weight),
    }[kind]
    module = make(8, 2, score=score)
    x = torch.randn(2, 5, 8).double()
    out, weights = module(x, x, x)
    torch.testing.assert_close(out, by_hand(module, (x, x, x), score=module.score_term()))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5).double())
    if kind == "additive":
        assert module.state_dict()["score_term.weight"].shape == (2, 4)
        module._reset_parameters()
        assert not torch.equal(module.score_term.weight, torch.zeros(2, 4).double())


def test_masks_join() -> None:
    module = make(8, 2, window=(3, None))
    x = torch.randn(2, 6, 8).double()
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    hidden = torch.rand(6, 6) < 0.3
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    out, weights = module(
        x, x, x, key_padding_mask=padding, attn_mask=hidden, is_causal=True, mask=saccade.Segments(ids)
    )
    mask = (
        saccade.Window(3, None) & saccade.Causal() & saccade.KeyPadding(keep=~padding) & saccade.Segments(ids)
    )
    graph = saccade.Graph.from_dense(~hidden)
    torch.testing.assert_close(out, by_hand(module, (x, x, x), mask & graph))
    kept = (mask & graph).materialize(6, 6)
    assert torch.equal(weights > 0, kept)
    plain = make(8, 2)
    torch.testing.assert_close(plain(x, x, x, mask=graph)[0], by_hand(plain, (x, x, x), graph))


def test_weights_of_repeated_edges() -> None:
    plain = make(8, 2)
    x = torch.randn(2, 4, 8).double().requires_grad_()
    index = torch.tensor([[0, 0, 3, 2, 2, 1], [1, 1, 1, 0, 3, 3]])
    graph = saccade.Graph.from_edge_index(index, 4)
    out, weights = plain(x, x, x, mask=graph, average_attn_weights=False)
    torch.testing.assert_close(out, by_hand(plain, (x, x, x), graph))
    values = plain.in_proj_weight[16:] @ x.mT + plain.in_proj_bias[16:, None]  # [N, E, S]
    mixed = torch.einsum("nhij,nhdj->nihd", weights, values.unflatten(1, (2, 4))).flatten(2)
    torch.testing.assert_close(out, plain.out_proj(mixed))
    with torch.no_grad():
        torch.testing.assert_close(plain(x, x, x, mask=graph, average_attn_weights=False)[1], weights)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_torchs_encoder_layer_cannot_bypass() -> None:
    """In eval torch's layer computes full attention from the weights, unless told they are not its own."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, dtype=torch.float64)
    module = make(8, 2, window=(1, 0))
    layer.self_attn = module
    x = torch.randn(2, 6, 8).double()
    expected = layer.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)
        torch.testing.assert_close(nn.TransformerEncoder(layer, 1).eval()(x), expected)


def test_window_bounds_move_outside_the_state() -> None:
    module = make(8, 2, window=(torch.tensor([1, 2]), 0))
    assert list(module.state_dict()) == list(make(8, 2).state_dict())
    meta = copy.deepcopy(module).to("meta")
    assert meta.window_left.is_meta and not module.window_left.is_meta


COMPILED: list[dict[str, Any]] = [
    {"window": (2, 1)},
    {"num_kv_heads": 1},
    {"qk_norm": True},
    {"score": "additive"},
    {"position": saccade.RoPE()},
    {"activation": "sigmoid"},
]


@pytest.mark.parametrize("kwargs", COMPILED, ids=str)
def test_compile(kwargs: dict[str, Any]) -> None:
    module = make(8, 2, **kwargs)
    torch._dynamo.reset()
    x = torch.randn(2, 6, 8).double().requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got, expected = (m(x, x, x, need_weights=False)[0] for m in (compiled, module))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (got, expected)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_with_extras() -> None:
    module = make(8, 2, window=(2, 0), num_kv_heads=1, qk_norm=True)
    rows = [torch.randn(n, 8).double() for n in (3, 9, 1)]
    nested = torch.nested.nested_tensor(rows)
    out = module(nested, nested, nested, need_weights=False)[0]
    for got, row in zip(out.unbind(), rows, strict=True):
        torch.testing.assert_close(got, module(row, row, row)[0])
    with pytest.raises(NotImplementedError, match="need_weights"):
        module(nested, nested, nested)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads"),
        ({"num_kv_heads": 2.0}, TypeError, "num_kv_heads"),
        ({"head_dim": -1}, ValueError, "head_dim"),
        ({"window": 3}, TypeError, "window"),
        ({"window": (-1, 0)}, ValueError, "left"),
        ({"window": (torch.tensor([1, 2, 3]), 0)}, ValueError, "window"),
        ({"activation": "gelu"}, ValueError, "activation"),
        ({"activation": 3}, TypeError, "activation"),
        ({"activation": "relu", "add_zero_attn": True}, ValueError, "add_zero_attn"),
        ({"score": "cosine"}, ValueError, "score"),
        ({"score": 3}, TypeError, "score"),
        ({"position": 3}, TypeError, "position"),
    ],
    ids=str,
)
def test_refused(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        MultiheadAttention(8, 4, **kwargs)


def test_repr_and_state_of_resized() -> None:
    module = MultiheadAttention(
        8, 4, num_kv_heads=2, head_dim=3, window=(4, None), qk_norm=True, score="additive"
    )
    text = repr(module)
    assert all(
        t in text
        for t in ("window=(4, None)", "num_kv_heads=2", "head_dim=3", "qk_norm=True", "score=additive")
    )
    shapes = {n: tuple(x.shape) for n, x in module.state_dict().items()}
    assert shapes == {
        "in_proj_weight": (24, 8), "in_proj_bias": (24,), "out_proj.weight": (8, 12), "out_proj.bias": (8,),
        "score_term.weight": (4, 3), "q_norm.weight": (3,), "k_norm.weight": (3,),
    }  # fmt: skip
    assert (
        module.out_proj.bias is not None
        and not module.out_proj.bias.any()
        and module.in_proj_weight.abs().max() > 0
    )
