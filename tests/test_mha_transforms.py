"""saccade.nn.MultiheadAttention under derivatives of every kind, vmap, compile, export, nested tensors."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade.nn import MultiheadAttention
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

WEIGHTS = pytest.mark.parametrize("need_weights", [True, False])
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)


def twins(
    dtype: torch.dtype = torch.float32, **kwargs: Any
) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    theirs = nn.MultiheadAttention(8, 2, batch_first=True, dtype=dtype, **kwargs)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    ours = MultiheadAttention(8, 2, batch_first=True, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@WEIGHTS
@pytest.mark.parametrize(
    "kwargs", [{}, {"add_bias_kv": True, "add_zero_attn": True, "dropout": 0.3}], ids=str
)
def test_first_second_and_forward_derivatives(need_weights: bool, kwargs: dict[str, Any]) -> None:
    _, ours = twins(torch.float64, **kwargs)
    query, key = (torch.randn(2, n, 8).double().requires_grad_() for n in (2, 3))
    mask = torch.randn(4, 2, 3).double()
    mask[1, 0, 2] = mask[2, 1] = -torch.inf
    padding = torch.randn(2, 3).double().requires_grad_()

    def run(query: Tensor, key: Tensor, mask: Tensor, padding: Tensor) -> Any:
        torch.manual_seed(7)
        options = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights}
        found = ours(query, key, key, **options)
        return found if need_weights else found[0]

    def of_mask(mask: Tensor) -> Any:
        return run(query.detach(), key.detach(), mask, padding.detach())

    def of_inputs(query: Tensor, key: Tensor, padding: Tensor) -> Any:
        return run(query, key, mask, padding)

    finite = torch.randn(4, 2, 3).double().requires_grad_()
    for fn, values in ((of_inputs, (query, key, padding)), (of_mask, (finite,))):
        assert torch.autograd.gradcheck(fn, values, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(fn, values, fast_mode=True)


@WEIGHTS
def test_per_sample_gradients(need_weights: bool) -> None:
    theirs, ours = twins(torch.float64)
    params = {n: p.detach() for n, p in ours.named_parameters()}
    x, padding = torch.randn(3, 2, 6, 8).double(), torch.rand(3, 2, 6) < 0.3
    padding[..., 0] = False

    def loss(module: nn.Module, params: Any, x: Tensor, padding: Tensor) -> Tensor:
        found = functional_call(
            module, params, (x, x, x), {"key_padding_mask": padding, "need_weights": need_weights}
        )
        return sum(f.square().sum() for f in found if f is not None)  # type: ignore[return-value]

    got = vmap(grad(lambda p, x, m: loss(ours, p, x, m)), in_dims=(None, 0, 0))(params, x, padding)
    for n in range(3):
        expected = grad(lambda p, n=n: loss(theirs, p, x[n], padding[n]))(params)
        for name, value in expected.items():
            torch.testing.assert_close(got[name][n], value)


def test_forward_mode_through_parameters() -> None:
    theirs, ours = twins(torch.float64)
    params = {n: p.detach() for n, p in ours.named_parameters()}
    tangents = {n: torch.randn_like(p) for n, p in params.items()}
    x = torch.randn(2, 6, 8).double()
    got, expected = (
        jvp(lambda p, m=m: functional_call(m, p, (x, x, x)), (params,), (tangents,)) for m in (ours, theirs)
    )
    torch.testing.assert_close(got, expected)


@WEIGHTS
@pytest.mark.parametrize("training", [True, False])
def test_compile_without_graph_breaks(need_weights: bool, training: bool) -> None:
    theirs, ours = (m.train(training) for m in twins(torch.float64, add_bias_kv=True))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    options = {
        "key_padding_mask": PADDING,
        "attn_mask": CAUSAL,
        "need_weights": need_weights,
        "is_causal": True,
    }
    for length in (6, 5):  # the second compiles for any length
        x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
        cut = {**options, "key_padding_mask": PADDING[:, :length], "attn_mask": CAUSAL[:length, :length]}
        got, expected = compiled(x, x, x, **cut), theirs(x, x, x, **{**cut, "is_causal": False})
        torch.testing.assert_close([t for t in got if t is not None], [t for t in expected if t is not None])
        wanted = [x, *theirs.parameters()], [x, *ours.parameters()]
        grads = (
            torch.autograd.grad(m[0].square().sum(), w) for m, w in zip((expected, got), wanted, strict=True)
        )
        torch.testing.assert_close(*grads)


def test_compile_dropout_draws_anew() -> None:
    _, ours = twins(dropout=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 8)
    first, second = (compiled(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_inductor_gradients() -> None:
    theirs, ours = twins()
    torch._dynamo.reset()
    x = torch.randn(2, 6, 8, requires_grad=True)
    got = torch.compile(ours, fullgraph=True)(x, x, x, need_weights=False)[0]
    expected = theirs(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (got, expected)))


class SelfAttention(nn.Module):
    def __init__(self, inner: nn.Module, need_weights: bool) -> None:
        super().__init__()
        self.inner, self.need_weights = inner, need_weights

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        found = self.inner(x, x, x, key_padding_mask=padding, need_weights=self.need_weights)
        return found if self.need_weights else found[0]


@WEIGHTS
def test_export_with_any_shape(need_weights: bool) -> None:
    theirs, ours = twins()
    x = torch.randn(2, 6, 8)
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=4096)
    shapes = {"x": {0: batch, 1: length}, "padding": {0: batch, 1: length}}
    program = torch.export.export(
        SelfAttention(ours, need_weights).eval(), (x, PADDING), dynamic_shapes=shapes
    )
    targets = [str(n.target) for n in program.graph.nodes]
    assert f"saccade.forward{'_weights' if need_weights else ''}.default" in targets  # both in one pass
    x, padding = torch.randn(3, 9, 8), torch.zeros(3, 9, dtype=torch.bool)
    padding[0, 5:] = True
    torch.testing.assert_close(program.module()(x, padding), SelfAttention(theirs, need_weights)(x, padding))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@WEIGHTS
@pytest.mark.parametrize("kwargs", [{}, {"add_bias_kv": True, "add_zero_attn": True, "kdim": 5}], ids=str)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("training", [True, False])
def test_nested_tensors(
    layout: torch.layout, kwargs: dict[str, Any], need_weights: bool, training: bool
) -> None:
    theirs, ours = (m.train(training) for m in twins(**kwargs))
    rows = [torch.randn(n, 8) for n in (3, 70, 1)]
    keys = rows if "kdim" not in kwargs else [torch.randn(n, 5) for n in (2, 5, 66)]
    values = rows if "kdim" not in kwargs else [torch.randn(len(k), 8) for k in keys]

    def nested(rows: list[Tensor]) -> Tensor:
        return torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)

    query = nested(rows)
    key = query if keys is rows else nested(keys)
    value = query if values is rows else nested(values)
    if value is not key and layout == torch.jagged:  # jagged tensors of one ragged size share their offsets
        value = torch.nested.nested_tensor_from_jagged(torch.cat(values).requires_grad_(), key.offsets())
    out, weights = ours(query, key, value, need_weights=need_weights)
    assert out.is_nested and out.layout == layout
    alone = [theirs(q, k, v) for q, k, v in zip(rows, keys, values, strict=True)]
    for n, (got, (expected, w)) in enumerate(zip(out.unbind(), alone, strict=True)):
        torch.testing.assert_close(got, expected)
        if need_weights:
            size = len(keys[n])
            torch.testing.assert_close(weights[n, : len(rows[n]), :size], w[:, :size])
    sum(o.square().sum() for o in out.unbind()).backward()
    sum(o.square().sum() for o, _ in alone).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    assert query.grad is not None and query.grad.is_nested


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_tensors_refuse_masks_and_take_ours() -> None:
    _, ours = twins()
    rows = [torch.randn(n, 8) for n in (3, 6)]
    nested = torch.nested.nested_tensor(rows)
    with pytest.raises(AssertionError, match="does not support NestedTensor"):
        ours(nested, nested, nested, key_padding_mask=PADDING)
    with pytest.raises(AssertionError, match="all nested, or none"):
        ours(nested, rows[0], rows[0])
    got = ours(nested, nested, nested, need_weights=False, mask=saccade.Causal())[0]
    for out, row in zip(got.unbind(), rows, strict=True):
        hidden = torch.ones(len(row), len(row), dtype=torch.bool).triu(1)
        torch.testing.assert_close(out, ours(row, row, row, attn_mask=hidden)[0])


class Named(Tensor):
    """A subclass that redefines torch's functions."""

    seen: list[str] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_and_modes() -> None:
    theirs, ours = twins()
    x = torch.randn(2, 6, 8)
    Named.seen.clear()
    out = ours(*[x.as_subclass(Named)] * 3)[0]
    assert type(out) is Named and "multi_head_attention_forward" in Named.seen
    torch.testing.assert_close(out.as_subclass(Tensor), theirs(x, x, x)[0])
    with torch.device("cpu"):  # a mode is no subclass: the kernel still runs
        with torch.profiler.profile() as profile:
            ours(x, x, x)
    assert "saccade::forward" in {e.name for e in profile.events()}


def test_jit_trace_without_gradients_and_a_word_where_there_are() -> None:
    x = torch.randn(2, 6, 8)
    _, ours = twins()
    ours.eval()
    with torch.no_grad():
        traced = torch.jit.trace(ours, (x, x, x))
        torch.testing.assert_close(traced(x, x, x)[0], ours(x, x, x)[0])
    with pytest.raises(RuntimeError, match=r"trace under torch\.no_grad\(\)"):
        torch.jit.trace(ours, (x, x, x))


HIDDEN = {
    "bool": lambda hidden: hidden,
    "float": lambda hidden: torch.zeros(70, 70).masked_fill(hidden, -torch.inf),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("tracer", ["jit", "make_fx", "pre_dispatch"])
@pytest.mark.parametrize("module", ["attention", "encoder"])
def test_traces_follow_the_mask(module: str, tracer: str, kind: str) -> None:
    layer = saccade.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = saccade.nn.TransformerEncoder(layer, 1).eval().requires_grad_(False)
    attention = encoder.layers[0].self_attn
    x, causal = torch.randn(2, 70, 8), torch.ones(70, 70, dtype=torch.bool).triu(1)
    mask, other = HIDDEN[kind](causal), HIDDEN[kind](causal.roll(1, 0).fill_diagonal_(False))

    def call(x: Tensor, mask: Tensor) -> Tensor:
        return encoder(x, mask=mask) if module == "encoder" else attention(x, x, x, attn_mask=mask)[0]

    with torch.no_grad():
        call(x, mask)  # what is known of it must not count either
        if tracer == "jit":
            traced: Any = torch.jit.trace(call, (x, mask))
        else:
            traced = make_fx(call, pre_dispatch=tracer == "pre_dispatch")(x, mask)
        torch.testing.assert_close(traced(x, other), call(x, other))
        assert not torch.allclose(call(x, mask), call(x, other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_refuse_edges_and_leave_padding_in() -> None:
    conv, x, edges = (
        saccade.nn.GATv2Conv(3, 4).requires_grad_(False),
        torch.randn(5, 3),
        torch.randint(0, 5, (2, 9)),
    )
    layer = saccade.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = saccade.nn.TransformerEncoder(layer, 1).eval().requires_grad_(False)
    y, other = torch.randn(2, 6, 8), PADDING.flip(0)
    with torch.no_grad():
        conv(x, edges)
        with pytest.raises(RuntimeError, match=r"pass a saccade\.Graph"):
            torch.jit.trace(conv, (x, edges))
        graph = saccade.Graph.from_edge_index(edges, 5)
        torch.testing.assert_close(conv(x, graph), conv(x, edges))  # the graph with loops is built here
        torch.testing.assert_close(torch.jit.trace(lambda x: conv(x, graph), x)(x + 1), conv(x + 1, edges))
        encoder(y, src_key_padding_mask=PADDING)
        traced = torch.jit.trace(lambda y, padding: encoder(y, src_key_padding_mask=padding), (y, PADDING))
        got, want = traced(y, other), encoder(y, src_key_padding_mask=other)
        torch.testing.assert_close(got[~other], want[~other])


def test_masks_are_read_on_their_own_device() -> None:
    _, ours = twins()
    x, mask = torch.randn(2, 70, 8), torch.ones(70, 70, dtype=torch.bool).triu(1)
    with torch.device("meta"):
        got = ours(x, x, x, attn_mask=mask)[0]
    torch.testing.assert_close(got, ours(x, x, x, mask=saccade.Causal())[0])


def test_tangents_of_masks_are_seen() -> None:
    theirs, ours = twins(torch.float64)
    x, tangent = torch.randn(2, 70, 8).double(), torch.randn(70, 70).double().tril()
    mask = nn.Transformer.generate_square_subsequent_mask(70, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        with forward_ad.dual_level(), torch.no_grad():
            out = module(x, x, x, attn_mask=forward_ad.make_dual(mask, tangent))[0]
            found.append(forward_ad.unpack_dual(out).tangent)
    torch.testing.assert_close(*found)
