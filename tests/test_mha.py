"""saccade.nn.MultiheadAttention against torch's: construction, results, gradients, dropout, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from saccade.nn import MultiheadAttention
from saccade.testing import pairwise
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

KINDS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"kdim": 5, "vdim": 7},
    {"kdim": 5, "add_bias_kv": True, "bias": False},
    {"vdim": 3, "add_zero_attn": True, "add_bias_kv": True, "batch_first": True},
]


def twins(
    *args: Any, dtype: torch.dtype = torch.float64, **kwargs: Any
) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and ours with the same random parameters (the biases too, which start at 0)."""
    theirs = nn.MultiheadAttention(*args, dtype=dtype, **kwargs)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    ours = MultiheadAttention(*args, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(
        got, expected, rtol=1e-5, atol=1e-6 if expected[0].dtype == torch.float32 else 1e-12
    )


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
def test_same_parameters_and_generator(kwargs: dict[str, Any]) -> None:
    made = []
    for cls in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(5)
        module = cls(8, 2, 0.1, **kwargs)
        made.append((module, torch.get_rng_state()))
    (theirs, state), (ours, own_state) = made
    assert isinstance(ours, nn.MultiheadAttention) and torch.equal(state, own_state)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert {n for n, p in ours._parameters.items() if p is None} == {
        n for n, p in theirs._parameters.items() if p is None
    }
    names = [
        "embed_dim",
        "kdim",
        "vdim",
        "_qkv_same_embed_dim",
        "num_heads",
        "dropout",
        "batch_first",
        "head_dim",
        "add_zero_attn",
    ]
    assert [getattr(ours, n) for n in names] == [getattr(theirs, n) for n in names]
    assert ours.__constants__ == theirs.__constants__ and repr(ours) == repr(theirs)
    torch.manual_seed(9)
    theirs._reset_parameters()
    torch.manual_seed(9)
    ours._reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("args", [(0, 1), (4, 0), (-4, 2), (7, 2)], ids=str)
def test_constructor_refuses_as_torch(args: tuple[int, int]) -> None:
    with pytest.raises((ValueError, AssertionError)) as expected:
        nn.MultiheadAttention(*args)
    with pytest.raises(expected.type) as got:
        MultiheadAttention(*args)
    assert str(got.value) == str(expected.value)


def test_factory_arguments() -> None:
    meta = MultiheadAttention(8, 2, add_bias_kv=True, kdim=3, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in meta.parameters())
    with torch.device("meta"):
        assert MultiheadAttention(8, 2).out_proj.bias.is_meta
    filled = meta.to_empty(device="cpu")
    filled._reset_parameters()
    assert filled.in_proj_bias is not None and not filled.in_proj_bias.any()
    assert torch.nn.utils.skip_init(MultiheadAttention, 8, 2).in_proj_weight.shape == (24, 8)


def test_copies_and_old_checkpoints() -> None:
    theirs, ours = twins(8, 2, batch_first=True, dtype=torch.float32)
    x = torch.randn(2, 5, 8)
    expected = ours(x, x, x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(again) is MultiheadAttention
        assert all(torch.equal(a, b) for a, b in zip(again(x, x, x), expected, strict=True))
    state = {n: v for n, v in theirs.__dict__.items() if n != "_qkv_same_embed_dim"}
    old = MultiheadAttention.__new__(MultiheadAttention)
    old.__setstate__(state)
    assert old._qkv_same_embed_dim and torch.equal(old(x, x, x)[0], expected[0])
    theirs.__class__ = MultiheadAttention  # what `accelerate` does
    assert torch.equal(theirs(x, x, x)[0], expected[0]) and theirs.extra_repr() == ""


AXES: dict[str, list[Any]] = {
    "sizes": [(1, 1, 1), (2, 5, 7), (3, 17, 9), (2, 70, 66)],  # N, L, S; N = 0 means unbatched below
    "batched": [True, False],
    "batch_first": [True, False],
    "kind": [0, 1, 2, 3, 4, 5, 6],
    "heads": [1, 2, 4],
    "inputs": ["self", "cross", "three"],
    "attn_mask": [None, "bool2d", "float2d", "bool3d", "float3d"],
    "padding": [None, "bool", "float"],
    "weights": [None, "average", "heads"],
    "mode": ["train", "eval", "no_grad"],
    "dtype": [torch.float64, torch.float32],
}


def label(case: dict[str, Any]) -> str:
    return "-".join(str(x).replace(" ", "").replace("torch.", "") for x in case.values())


def make_masks(
    case: dict[str, Any], sizes: tuple[int, int, int], dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """Masks that leave every row its first key (what torch does without one is not a number)."""
    batch, tgt, src = sizes
    shape = (batch * case["heads"], tgt, src) if "3d" in str(case["attn_mask"]) else (tgt, src)
    hidden, padded = torch.rand(shape) < 0.4, torch.rand(batch, src) < 0.4
    hidden[..., 0] = padded[:, 0] = False
    lead = () if case["batched"] else (0,)
    found: dict[str, Tensor | None] = {}
    for name, kind, value in (
        ("attn_mask", case["attn_mask"], hidden),
        ("key_padding_mask", case["padding"], padded[lead]),
    ):
        if kind is None:
            found[name] = None
        elif kind.startswith("bool"):
            found[name] = value
        else:
            found[name] = (
                torch.randn(value.shape, dtype=dtype).masked_fill(value, -torch.inf).requires_grad_()
            )
    return found


def make_call(case: dict[str, Any], module: nn.MultiheadAttention) -> tuple[list[Tensor], dict[str, Any]]:
    batch, tgt, src = case["sizes"]
    batch = batch if case["batched"] else 1
    src = tgt if case["inputs"] == "self" else src
    first = module.batch_first or not case["batched"]

    def draw(length: int, width: int) -> Tensor:
        x = torch.randn((batch, length, width) if first else (length, batch, width), dtype=case["dtype"])
        return (x if case["batched"] else x[0]).requires_grad_()

    query = draw(tgt, module.embed_dim)
    if case["inputs"] == "self":
        inputs = [query, query, query]
    elif case["inputs"] == "cross":
        key = draw(src, module.kdim)
        inputs = [query, key, key]
    else:
        inputs = [query, draw(src, module.kdim), draw(src, module.vdim)]
    options = make_masks(case, (batch, tgt, src), case["dtype"])
    weights = case["weights"]
    return inputs, {
        **options,
        "need_weights": weights is not None,
        "average_attn_weights": weights != "heads",
    }


def run(
    module: nn.Module, inputs: list[Tensor], options: dict[str, Any], mode: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of inputs, masks and parameters under fixed cotangents."""
    module.train(mode == "train")
    if mode == "no_grad":
        with torch.no_grad():
            return [x for x in module(*inputs, **options) if x is not None], []
    found = [x for x in module(*inputs, **options) if x is not None]
    draw = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in found]
    masks = [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]
    leaves = list({id(x): x for x in [*inputs, *masks, *module.parameters()]}.values())
    return found, list(torch.autograd.grad(found, leaves, cotangents))


@pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("case", pairwise(AXES), ids=label)
def test_results_and_gradients(case: dict[str, Any]) -> None:
    kwargs = {"batch_first": case["batch_first"], **KINDS[case["kind"]]}
    if case["inputs"] != "three":
        kwargs.pop("kdim", None), kwargs.pop("vdim", None)
    theirs, ours = twins(8, case["heads"], dtype=case["dtype"], **kwargs)
    inputs, options = make_call(case, theirs)
    expected, expected_grads = run(theirs, inputs, options, case["mode"])
    got, grads = run(ours, inputs, options, case["mode"])
    assert [x.shape for x in got] == [x.shape for x in expected]
    scale = 20 if case["dtype"] == torch.float32 else 1
    for a, b in zip([*got, *grads], [*expected, *expected_grads], strict=True):
        atol = (1e-6 if a.dtype == torch.float32 else 1e-13) * scale * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("sizes", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_empty_inputs(sizes: tuple[int, int, int], need_weights: bool) -> None:
    theirs, ours = twins(8, 2, batch_first=True)
    query, key = torch.randn(sizes[0], sizes[1], 8).double(), torch.randn(sizes[0], sizes[2], 8).double()
    expected = theirs(query, key, key, need_weights=need_weights)
    got = ours(query, key, key, need_weights=need_weights)
    torch.testing.assert_close(got, expected)
    got[0].sum().backward()


def test_output_is_contiguous_and_inputs_untouched() -> None:
    for first in (True, False):
        ours = MultiheadAttention(8, 2, batch_first=first)
        wide = torch.randn(4, 6, 16)
        x, before = wide[..., ::2], wide.clone()
        out, _ = ours(x, x, x)
        assert out.is_contiguous() and torch.equal(wide, before)
        torch.testing.assert_close(out, ours(*[x.contiguous()] * 3)[0])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_forward_copies_nothing(first: bool, kwargs: dict[str, Any]) -> None:
    """q, k, v are views of one product; the kernel writes what the next product reads; nothing is joined."""
    ours = MultiheadAttention(16, 4, bias=False, batch_first=first, **kwargs)  # addmm copies the bias
    x = torch.randn(3, 5, 16)
    for training in (False, True):
        with torch.set_grad_enabled(training), torch.profiler.profile() as profile:
            ours(x, x, x, need_weights=False)
        names = [e.name for e in profile.events()]
        assert names.count("aten::linear") == 2 and "saccade::forward" in names
        assert not {"aten::copy_", "aten::cat", "aten::clone", "aten::contiguous"} & set(names)


def test_weights_read_at_every_call() -> None:
    theirs, ours = twins(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8).double()
    for module in (theirs, ours):
        parametrizations.weight_norm(module, "in_proj_weight")
        with torch.no_grad():
            module.parametrizations.in_proj_weight.original0.mul_(1.5)
        low_rank = torch.nn.Linear(8, 8).double()
        with torch.no_grad():
            low_rank.weight.copy_(module.out_proj.weight + 0.3)
            low_rank.bias.fill_(0.25)
        module.out_proj = low_rank
    assert_same(ours(x, x, x), theirs(x, x, x))


def test_autocast() -> None:
    theirs, ours = twins(16, 2, batch_first=True, add_bias_kv=True, dtype=torch.float32)
    x, mask = torch.randn(2, 5, 16), torch.randn(5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(x, x, x, attn_mask=mask), theirs(x, x, x, attn_mask=mask)
    assert [t.dtype for t in got] == [t.dtype for t in expected] == [torch.bfloat16] * 2
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    got[0].sum().backward()
    assert (
        ours.bias_k is not None and ours.bias_k.grad is not None and ours.bias_k.grad.dtype == torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    theirs, ours = twins(16, 4, batch_first=True, dtype=dtype)
    x = torch.randn(2, 33, 16, dtype=dtype)
    exact = copy.deepcopy(theirs).double()(*[x.double()] * 3)
    for got, plain, want in zip(ours(x, x, x), theirs(x, x, x), exact, strict=True):
        assert got.dtype == dtype
        error, allowed = ((t.double() - want).abs().max() for t in (got, plain))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * want.abs().max()


class TestDropout:
    x = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(1)).double()

    def test_weights_are_those_of_the_output(self) -> None:
        ours = MultiheadAttention(
            8, 2, 0.4, batch_first=True, add_bias_kv=True, add_zero_attn=True, dtype=torch.float64
        )
        out, weights = ours(self.x, self.x, self.x, average_attn_weights=False)
        plain = copy.deepcopy(ours).eval()(self.x, self.x, self.x, average_attn_weights=False)[1]
        dropped = weights == 0
        torch.testing.assert_close(weights, torch.where(dropped, 0.0, plain / 0.6))
        assert abs(dropped.double().mean() - 0.4) < 0.03 and dropped[..., -2:].any()
        v = nn.functional.linear(self.x, ours.in_proj_weight[16:], ours.in_proj_bias[16:])
        v = (
            torch.cat([v, ours.bias_v.expand(2, 1, 8), torch.zeros(2, 1, 8)], 1)
            .view(2, 42, 2, 4)
            .transpose(1, 2)
        )
        torch.testing.assert_close(out, ours.out_proj((weights @ v).transpose(1, 2).reshape(2, 40, 8)))

    def test_probability_is_read_at_every_call(self) -> None:
        ours = MultiheadAttention(8, 2, 0.5, batch_first=True, dtype=torch.float64)
        torch.manual_seed(1)
        first = ours(self.x, self.x, self.x)[0]
        torch.manual_seed(1)
        assert torch.equal(ours(self.x, self.x, self.x)[0], first)
        assert not torch.equal(ours(self.x, self.x, self.x)[0], first)
        ours.dropout = 1.0
        out, weights = ours(self.x, self.x, self.x)
        assert not weights.any() and torch.equal(out, ours.out_proj.bias.expand_as(out))
        ours.dropout = 0.0
        assert torch.equal(ours(self.x, self.x, self.x)[0], ours.eval()(self.x, self.x, self.x)[0])
        state = torch.get_rng_state()
        ours.dropout = 0.5
        ours(self.x, self.x, self.x)
        assert torch.equal(state, torch.get_rng_state()), "eval drew random numbers"

    @pytest.mark.parametrize("need_weights", [True, False])
    def test_checkpoint(self, need_weights: bool) -> None:
        ours = MultiheadAttention(8, 2, 0.5, batch_first=True, dtype=torch.float64)
        grads = []
        for wrap in (False, True):
            x = self.x.clone().requires_grad_()
            torch.manual_seed(4)
            call = lambda x: ours(x, x, x, need_weights=need_weights)[0]  # noqa: E731
            (checkpoint(call, x, use_reentrant=False) if wrap else call(x)).square().sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads)


X = {
    n: torch.zeros(n)
    for n in ((3, 2, 8), (4, 2, 8), (3, 2, 6), (3, 8), (4, 8), (8,), (4, 2, 7), (4, 3, 8), (1, 3, 2, 8))
}
LONG, FLAG = torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.bool)
REFUSED: list[tuple[dict[str, Any], tuple[Any, Any, Any], dict[str, Any]]] = [
    ({}, ((3, 2, 8), (4, 8), (4, 8)), {}),
    ({}, ((3, 8), (4, 2, 8), (4, 2, 8)), {}),
    ({}, ((8,), (4, 8), (4, 8)), {}),
    ({}, ((1, 3, 2, 8), (4, 8), (4, 8)), {}),
    ({}, ((3, 2, 6), (4, 2, 8), (4, 2, 8)), {}),
    ({}, ((3, 2, 8), (4, 2, 8), (3, 2, 8)), {}),
    ({}, ((3, 8), (4, 8), (3, 8)), {}),
    ({"kdim": 8, "vdim": 7}, ((3, 2, 8), (3, 2, 8), (4, 2, 7)), {}),
    ({}, ((3, 2, 8), (4, 3, 8), (4, 3, 8)), {}),
    ({}, ((3, 2, 8), (4, 2, 7), (4, 2, 7)), {}),
    ({}, ((3, 2, 8), (4, 2, 8), (4, 2, 8)), {"key_padding_mask": torch.zeros(4, dtype=torch.bool)}),
    ({}, ((3, 8), (4, 8), (4, 8)), {"key_padding_mask": FLAG}),
    ({}, ((3, 2, 8), (4, 2, 8), (4, 2, 8)), {"key_padding_mask": FLAG[:1]}),
    ({}, ((3, 2, 8), (4, 2, 8), (4, 2, 8)), {"key_padding_mask": FLAG[:, :3]}),
    ({"add_bias_kv": True}, ((3, 2, 8), (4, 2, 8), (4, 2, 8)), {"key_padding_mask": FLAG[:, :3]}),
    ({}, ((3, 2, 8), (4, 2, 8), (4, 2, 8)), {"key_padding_mask": FLAG.long()}),
    ({}, ((3, 2, 8), (4, 2, 8), (4, 2, 8)), {"attn_mask": LONG}),
    ({}, ((3, 2, 8), (4, 2, 8), (4, 2, 8)), {"attn_mask": torch.zeros(4)}),
    ({}, ((3, 2, 8), (4, 2, 8), (4, 2, 8)), {"attn_mask": torch.zeros(1, 1, 3, 4)}),
    ({}, ((3, 2, 8), (4, 2, 8), (4, 2, 8)), {"attn_mask": torch.zeros(4, 3)}),
    ({}, ((3, 2, 8), (4, 2, 8), (4, 2, 8)), {"attn_mask": torch.zeros(1, 3, 4)}),
    ({}, ((3, 8), (4, 8), (4, 8)), {"attn_mask": torch.zeros(1, 3, 4)}),
    ({}, ((3, 2, 8), (4, 2, 8), (4, 2, 8)), {"is_causal": True}),
    ({}, ((3, 2, 8), (4, 2, 8), (4, 2, 8)), {"is_causal": True, "need_weights": False}),
]  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refuses_as_torch(case: int, train: bool) -> None:
    kwargs, shapes, options = REFUSED[case]
    theirs, ours = twins(8, 2, dtype=torch.float32, **kwargs)
    inputs = [X[s] for s in shapes]
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        theirs.train()(*inputs, **options)  # its slow path: every check, before the kernel
    with pytest.raises(expected.type) as got:
        ours.train(train)(*inputs, **options)
    assert str(got.value) == str(expected.value)


def test_dtype_of_input_and_weights() -> None:
    ours = MultiheadAttention(8, 2)
    with pytest.raises(RuntimeError, match="same dtype"):
        ours(*[torch.zeros(3, 2, 8, dtype=torch.float64)] * 3)
    assert ours(*[torch.zeros(3, 2, 8)] * 3, attn_mask=torch.zeros(3, 3).double())[0].dtype == torch.float32


def test_mixed_masks_warn_at_the_caller() -> None:
    theirs, ours = twins(8, 2, dtype=torch.float32)
    x = torch.randn(4, 2, 8)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    options = {"key_padding_mask": padding, "attn_mask": torch.randn(4, 4)}
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask is deprecated") as caught:
        got = ours(x, x, x, **options)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning):
        assert_same(got, theirs(x, x, x, **options))


def test_scripting_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="torch.jit.script"):
        torch.jit.script(MultiheadAttention(8, 2))
