"""`saccade.nn.multi_head_attention_forward` beside torch's function."""

from __future__ import annotations

from typing import Any

import pytest
import saccade
import torch
from saccade.nn import multi_head_attention_forward as ours
from torch import Tensor
from torch.nn import functional as F

L, S, N, E, H = 5, 7, 2, 12, 3


def call(**changes: Any) -> dict[str, Any]:
    """The arguments of a plain call in fp64, every tensor with a gradient."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    key = draw(S, N, E)
    given = dict(
        query=draw(L, N, E), key=key, value=key, embed_dim_to_check=E, num_heads=H,
        in_proj_weight=draw(3 * E, E), in_proj_bias=draw(3 * E), bias_k=None, bias_v=None,
        add_zero_attn=False, dropout_p=0.0,
        out_proj_weight=draw(E, E), out_proj_bias=draw(E),
    )  # fmt: skip
    return given | {n: x(draw) if callable(x) else x for n, x in changes.items()}


SEPARATE = dict(
    use_separate_proj_weight=True, in_proj_weight=None, key=lambda f: f(S, N, 4), value=lambda f: f(S, N, 6),
    q_proj_weight=lambda f: f(E, E), k_proj_weight=lambda f: f(E, 4), v_proj_weight=lambda f: f(E, 6),
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not-averaged": dict(average_attn_weights=False),
    "without-weights": dict(need_weights=False),
    "separate": SEPARATE,
    "without-biases": dict(in_proj_bias=None, out_proj_bias=None),
    "extra-key": dict(bias_k=lambda f: f(E), bias_v=lambda f: f(1, 1, E), add_zero_attn=True),
    "static": dict(static_k=lambda f: f(N * H, S, E // H), static_v=lambda f: f(N * H, S, E // H)),
    "static-value": dict(static_v=lambda f: f(N * H, S, E // H), need_weights=False),
    "float-mask": dict(attn_mask=lambda f: f(N * H, L, S)),
    "padding": dict(key_padding_mask=torch.arange(S) >= torch.tensor([[4], [6]])),
    "causal": dict(
        attn_mask=torch.ones(L, S, dtype=torch.bool).triu(1), is_causal=True, need_weights=False,
        training=False,
    ),
    "unbatched": dict(query=lambda f: f(L, E), key=lambda f: f(S, E), value=lambda f: f(S, E)),
    "unbatched-padding": dict(
        query=lambda f: f(L, E), key=lambda f: f(S, E), value=lambda f: f(S, E),
        key_padding_mask=torch.arange(S) > 3, need_weights=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_and_gradients_are_torchs(variant: str) -> None:
    given = call(**VARIANTS[variant])
    wanted = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    found = []
    for fn in (ours, F.multi_head_attention_forward):
        out, weights = fn(**given)
        total = out.square().sum() + (0 if weights is None else weights.cos().sum())
        found.append(
            (out, weights, torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))
        )
    torch.testing.assert_close(*found)


def test_torchs_samples() -> None:
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    torch.manual_seed(0)
    op = next(o for o in op_db if o.name == "nn.functional.multi_head_attention_forward")
    samples = list(op.sample_inputs("cpu", torch.float64, requires_grad=False))
    assert len(samples) == 192
    for sample in samples:
        args = (sample.input, *sample.args)
        got, expected = (
            fn(*args, **{**sample.kwargs, "training": False}) for fn in (ours, F.multi_head_attention_forward)
        )
        torch.testing.assert_close(got, expected)
        if sample.kwargs["training"]:  # other random numbers than torch's: the same from the same state
            first, second = (torch.manual_seed(1) and ours(*args, **sample.kwargs) for _ in range(2))
            torch.testing.assert_close(first, second, rtol=0, atol=0)
            assert not torch.equal(first[0], expected[0])


def test_our_masks_hold_too() -> None:
    given = call(need_weights=True)
    hidden = ~saccade.Window(1, 2).materialize(L, S)
    torch.testing.assert_close(
        ours(**given, mask=saccade.Window(1, 2)), F.multi_head_attention_forward(**given, attn_mask=hidden)
    )


BAD: dict[str, dict[str, Any]] = {
    "embed_dim": dict(embed_dim_to_check=6),
    "heads": dict(num_heads=5),
    "values": dict(value=lambda f: f(S + 1, N, E)),
    "separate-values": SEPARATE | dict(value=lambda f: f(S + 1, N, 6)),
    "no-weight": dict(in_proj_weight=None),
    "no-separate-weight": SEPARATE | dict(k_proj_weight=None),
    "bias_k-alone": dict(bias_k=lambda f: f(E)),
    "bias_v-alone": dict(bias_v=lambda f: f(E)),
    "bias-and-static": dict(
        bias_k=lambda f: f(1, 1, E), bias_v=lambda f: f(1, 1, E), static_k=lambda f: f(N * H, S, E // H)
    ),
    "static-batch": dict(static_k=lambda f: f(N, S, E // H)),
    "static-width": dict(static_v=lambda f: f(N * H, S, E)),
    "hint-alone": dict(is_causal=True),
    "mask-shape": dict(attn_mask=lambda f: f(L, S + 1)),
    "padding-shape": dict(key_padding_mask=torch.zeros(N, S + 1, dtype=torch.bool)),
    "rank": dict(query=lambda f: f(1, L, N, E)),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_torchs(case: str) -> None:
    given = call(**BAD[case])
    with pytest.raises((AssertionError, RuntimeError, ValueError)) as theirs:
        F.multi_head_attention_forward(**given)
    with pytest.raises(theirs.type) as mine:
        ours(**given)
    assert str(mine.value) == str(theirs.value)


class Named(Tensor):
    """A tensor that answers torch's functions itself."""

    calls: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_overriding_tensors_go_to_torch() -> None:
    given = call()
    given["query"] = given["query"].detach().as_subclass(Named)
    Named.calls.clear()
    out, _ = ours(**given)
    assert isinstance(out, Named)
    assert Named.calls[0] is F.multi_head_attention_forward


def test_the_warning_names_the_callers_line() -> None:
    given = call(attn_mask=lambda f: f(L, S), key_padding_mask=torch.zeros(N, S, dtype=torch.bool))
    with pytest.warns(UserWarning, match="mismatched") as seen:
        ours(**given)
    assert seen[0].filename == __file__
