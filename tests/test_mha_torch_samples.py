"""torch's own sample inputs for attention (torch.testing._internal), replayed on ours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import saccade
import torch
from saccade.nn import MultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("expecttest")
from torch.testing._internal import common_methods_invocations, common_modules  # noqa: E402


def module_samples(dtype: torch.dtype, training: bool = True) -> list[Any]:
    torch.manual_seed(0)
    return common_modules.module_inputs_torch_nn_MultiheadAttention(
        None, device="cpu", dtype=dtype, requires_grad=True, training=training
    )


SAMPLES = range(len(module_samples(torch.float32)))


def twins(sample: Any, dtype: torch.dtype) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    given = sample.constructor_input
    theirs = nn.MultiheadAttention(*given.args, **given.kwargs, dtype=dtype)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.1)  # the inputs reach to 9
    ours = MultiheadAttention(*given.args, **given.kwargs, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def gradients(module: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    found = [x for x in module(*args, **kwargs) if x is not None]
    total = sum((x * torch.arange(1.0, x.numel() + 1, dtype=x.dtype).view(x.shape)).sum() for x in found)
    return list(torch.autograd.grad(total, [*args, *module.parameters()]))


def test_there_are_64() -> None:
    assert len(SAMPLES) == 64


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_module_forward_and_gradients(dtype: torch.dtype, training: bool) -> None:
    for n, sample in enumerate(module_samples(dtype, training)):
        theirs, ours = (m.train(training) for m in twins(sample, dtype))
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        got = ours(*args, **kwargs)
        torch.testing.assert_close(got, theirs(*args, **kwargs), msg=f"sample {n}")
        torch.testing.assert_close(got, sample.reference_fn(ours, *args, **kwargs))
        with torch.no_grad():
            torch.testing.assert_close(ours(*args, **kwargs), got)
        for a, b in zip(gradients(ours, args, kwargs), gradients(theirs, args, kwargs), strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-10, msg=f"sample {n}"
            )


def test_module_non_contiguous() -> None:
    """Inputs and parameters that are not contiguous, with gradients that are not."""
    for sample in module_samples(torch.float64):
        _, ours = twins(sample, torch.float64)
        strided = copy.deepcopy(ours)
        for p in strided.parameters():
            p.data = torch.empty(*p.shape, 2, dtype=p.dtype)[..., 0].copy_(p.data)
        args, kwargs = sample.forward_input.args, dict(sample.forward_input.kwargs)
        spread = [x.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for x in args]
        torch.testing.assert_close(strided(*spread, **kwargs), ours(*args, **kwargs))
        torch.testing.assert_close(gradients(strided, spread, kwargs), gradients(ours, args, kwargs))


@pytest.mark.parametrize("n", SAMPLES[::5])
def test_module_gradcheck_and_gradgradcheck(n: int) -> None:
    """torch's own cannot with need_weights=False; see test_mha_transforms for larger shapes."""
    sample = module_samples(torch.float64)[n]
    _, ours = twins(sample, torch.float64)
    args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
    params = dict(ours.named_parameters())
    for need_weights in (True, False):

        def run(*values: Tensor, need_weights: bool = need_weights) -> Any:
            given = dict(zip(params, values[3:], strict=True))
            found = torch.func.functional_call(
                ours, given, values[:3], {**kwargs, "need_weights": need_weights}
            )
            return found if need_weights else found[0]

        values = (*args, *params.values())
        assert torch.autograd.gradcheck(run, values, check_forward_ad=n % 2 == 0, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, values, fast_mode=True)


def test_module_factory_arguments_and_state() -> None:
    for sample in module_samples(torch.float32):
        given = sample.constructor_input
        made = MultiheadAttention(*given.args, **given.kwargs, device="meta", dtype=torch.float64)
        assert all(p.device.type == "meta" and p.dtype == torch.float64 for p in made.parameters())
        fresh, other = twins(sample, torch.float32)[1], MultiheadAttention(*given.args, **given.kwargs)
        before = [p.detach().clone() for p in fresh.parameters()]
        other.load_state_dict(fresh.state_dict())
        versions = [x._version for x in sample.forward_input.args]
        other(*sample.forward_input.args, **sample.forward_input.kwargs)
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), before, strict=True))
        assert versions == [x._version for x in sample.forward_input.args]


def op_samples(name: str, requires_grad: bool = False) -> list[Any]:
    torch.manual_seed(0)
    op = next(o for o in common_methods_invocations.op_db if o.name == name)
    return list(op.sample_inputs("cpu", torch.float64, requires_grad=requires_grad))


def as_module(cls: type[nn.MultiheadAttention], sample: Any) -> nn.MultiheadAttention:
    """The module whose forward is this call of F.multi_head_attention_forward."""
    _, _, width, heads, packed, in_bias, bias_k, bias_v, zero, dropout_p, out_weight, out_bias = sample.args
    separate = sample.kwargs["use_separate_proj_weight"]
    module = cls(
        width,
        heads,
        dropout_p,
        add_bias_kv=True,
        add_zero_attn=zero,
        kdim=width + separate,
        dtype=out_weight.dtype,
    )
    module.kdim = width
    given = {"in_proj_bias": in_bias, "bias_k": bias_k, "bias_v": bias_v}
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    given |= {n: sample.kwargs[n] for n in names} if separate else {"in_proj_weight": packed}
    for name, value in given.items():
        setattr(module, name, nn.Parameter(value))
    module.out_proj.weight, module.out_proj.bias = nn.Parameter(out_weight), nn.Parameter(out_bias)
    return module.train(sample.kwargs["training"])


def test_functional_multi_head_attention() -> None:
    samples = op_samples("nn.functional.multi_head_attention_forward")
    assert len(samples) == 192
    for n, sample in enumerate(samples):
        ours = as_module(MultiheadAttention, sample)
        inputs = (sample.input, *sample.args[:2])
        mask = sample.kwargs["attn_mask"]
        if ours.training:  # other random numbers than torch's: the output must be that of the weights
            torch.manual_seed(n)
            got, weights = ours(*inputs, attn_mask=mask, average_attn_weights=False)
            torch.manual_seed(n)
            torch.testing.assert_close(ours(*inputs, attn_mask=mask, need_weights=False)[0], got)
            with torch.no_grad():
                _, plain = as_module(nn.MultiheadAttention, sample).eval()(
                    *inputs, attn_mask=mask, average_attn_weights=False
                )
            kept = weights != 0
            torch.testing.assert_close(weights, torch.where(kept, 2 * plain, 0.0))
            continue
        kwargs = {k: v for k, v in sample.kwargs.items() if k != "attn_mask"}
        expected = F.multi_head_attention_forward(sample.input, *sample.args, attn_mask=mask, **kwargs)
        torch.testing.assert_close(ours(*inputs, attn_mask=mask), expected, msg=f"sample {n}")


def test_functional_multi_head_attention_gradients() -> None:
    for sample in op_samples("nn.functional.multi_head_attention_forward", requires_grad=True):
        modules = [as_module(cls, sample).eval() for cls in (MultiheadAttention, nn.MultiheadAttention)]
        inputs, mask = (sample.input, *sample.args[:2]), sample.kwargs["attn_mask"]
        got, expected = (
            torch.autograd.grad(
                m(*inputs, attn_mask=mask)[0].square().sum(), [*inputs, mask, *m.parameters()]
            )
            for m in modules
        )
        torch.testing.assert_close(got, expected)


def _sdpa(fn: Any, sample: Any, **options: Any) -> Tensor:
    return fn(sample.input, *sample.args, **{**sample.kwargs, **options})


@pytest.mark.parametrize("n", range(25))
def test_scaled_dot_product_attention(n: int) -> None:
    sample = op_samples("nn.functional.scaled_dot_product_attention", requires_grad=True)[n]
    p = sample.kwargs["dropout_p"]
    inputs = [sample.input, *sample.args]
    plain = {"dropout_p": 0.0}
    expected = _sdpa(F.scaled_dot_product_attention, sample, **plain)
    got = _sdpa(saccade.scaled_dot_product_attention, sample, **plain)
    torch.testing.assert_close(got, expected)
    draw = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, draw), torch.autograd.grad(expected, inputs, draw)
    )
    torch.manual_seed(n)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,))
    torch.manual_seed(n)
    dropped = _sdpa(saccade.scaled_dot_product_attention, sample)
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in inputs))
    q, k, v = (x.expand(*lead, *x.shape[-2:]) for x in inputs)
    bias = sample.kwargs.get("attn_mask")
    mask = saccade.Causal(align="start") if sample.kwargs["is_causal"] else None
    by_hand = saccade.reference.attention(q, k, v, mask, bias=bias, dropout_p=p, seed=seed)
    torch.testing.assert_close(dropped, by_hand)
    if n % 6 == 0:  # upstream skips these: torch's CPU kernel has no second derivative and no forward mode

        def run(*x: Tensor) -> Tensor:
            torch.manual_seed(n)
            return saccade.scaled_dot_product_attention(*x, **sample.kwargs)

        small = [x[..., :1, :3, :2].detach().requires_grad_() for x in inputs]
        if bias is not None:
            sample.kwargs["attn_mask"] = bias[:3, :3].detach()
        assert torch.autograd.gradcheck(run, small, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(run, small, fast_mode=True)
