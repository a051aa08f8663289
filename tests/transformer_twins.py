"""What the tests of the Transformer's modules share: sizes, a padded batch, twins of torch's modules."""

from __future__ import annotations

from typing import Any

import saccade
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

E, H, N, S = 32, 4, 3, 9
PADDING = torch.arange(S) >= torch.tensor([9, 4, 6])[:, None]
VALID = ~PADDING
CAUSAL = nn.Transformer.generate_square_subsequent_mask(S)
CLASSES = ("TransformerEncoderLayer", "TransformerDecoderLayer", "Transformer")


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
