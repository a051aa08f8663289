"""How nn.TransformerEncoder is measured on padded batches: torch's, the same after saccade.accelerate, and
that with `packed=True`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from saccade.accelerate import accelerate
from saccade.testing import assert_no_worse_than
from torch import Tensor

from .cases import DTYPES, FORWARD, TRAIN, Group

Call = Callable[[], list[Tensor]]
_EIGHTHS = (8, 5, 2, 1)  # of the whole length, per sequence: half of all tokens are padding


@dataclass(frozen=True)
class EncoderCase:
    """One call of an encoder of torch's layers, batch 4, with half of the batch padding."""

    name: str
    length: int = 1024
    embed_dim: int = 512
    num_heads: int = 8
    feedforward: int = 2048
    layers: int = 2
    dtype: str = "fp32"
    training: bool = True

    def lengths(self) -> list[int]:
        return [self.length * n // 8 for n in _EIGHTHS]

    def describe(self) -> dict[str, object]:
        """The columns of a result row that say what was measured."""
        head_dim = self.embed_dim // self.num_heads
        return {
            "case": self.name,
            "dtype": self.dtype,
            "batch": len(_EIGHTHS),
            "heads": self.num_heads,
            "heads_k": self.num_heads,
            "seqlen_q": self.length,
            "seqlen_k": self.length,
            "head_dim": head_dim,
            "head_dim_v": head_dim,
            "mask": f"padding {self.lengths()}",
            "bias": False,
            "dropout_p": 0.0,
        }

    def flops(self) -> int:
        """Useful ones, of tokens that are there; three times the forward's with the backward pass."""
        e, lengths = self.embed_dim, self.lengths()
        linear = sum(lengths) * (8 * e * e + 4 * e * self.feedforward)
        attention = 4 * e * sum(n * n for n in lengths)
        return self.layers * (linear + attention) * (3 if self.training else 1)


def encoders() -> list[Group]:
    """Length 1024 with half of it padding, eval and train, fp32 and bf16."""
    groups = []
    for dtype in ("fp32", "bf16"):
        cases = tuple(
            EncoderCase(
                f"encoder-{dtype}-{'train' if training else 'eval'}-n1024", dtype=dtype, training=training
            )
            for training in (True, False)
        )
        groups.append(Group(f"encoder {dtype} padded", cases, "torch"))  # type: ignore[arg-type]
    return groups


class EncoderWork:
    """One case made ready: three encoders with the same weights, their input, their check."""

    def __init__(self, case: EncoderCase, device: str, excluded: frozenset[str] = frozenset()) -> None:
        self.case, self.dtype = case, DTYPES[case.dtype]
        generator = torch.random.get_rng_state()
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(
            case.embed_dim, case.num_heads, case.feedforward, dropout=0.0, batch_first=True, device=device
        )
        shape = (len(_EIGHTHS), case.length, case.embed_dim)
        self._x = torch.randn(shape, device=device).to(self.dtype).requires_grad_(case.training)
        dout = torch.randint(-8, 9, shape, device=device).to(self.dtype) / 8
        torch.random.set_rng_state(generator)
        self._keep = torch.arange(case.length, device=device) < torch.tensor(
            case.lengths(), device=device
        ).unsqueeze(1)
        self._dout = dout.masked_fill(~self._keep[..., None], 0)  # padded rows of the output are nobody's
        encoder = torch.nn.TransformerEncoder(layer, case.layers)
        self._torch = encoder.to(self.dtype).train(case.training)
        self._saccade, self._packed = copy.deepcopy(self._torch), copy.deepcopy(self._torch)
        accelerate(self._saccade, verify=False)
        accelerate(self._packed, verify=False)
        self._packed.packed = True  # type: ignore[assignment]
        self._known: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def directions(self) -> tuple[str, ...]:
        return (TRAIN if self.case.training else FORWARD,)

    def _call(self, encoder: Any, x: Tensor, dout: Tensor) -> Call:
        padding = ~self._keep

        def evaluate() -> list[Tensor]:
            with torch.no_grad():
                return [encoder(x, src_key_padding_mask=padding)]

        def train() -> list[Tensor]:
            out = encoder(x, src_key_padding_mask=padding)
            return [out.detach(), *torch.autograd.grad(out, [x, *encoder.parameters()], dout)]

        return train if self.case.training else evaluate

    def offers(self, direction: str) -> dict[str, Call | str]:
        """All three can always."""
        encoders = {"saccade": self._saccade, "saccade-packed": self._packed, "torch": self._torch}
        return {name: self._call(encoder, self._x, self._dout) for name, encoder in encoders.items()}

    def fault(self, name: str, direction: str, call: Call) -> str:
        """Compare with torch's encoder in fp64; torch's own error in this dtype is the yardstick."""
        if self._known is None:
            wide = copy.deepcopy(self._torch).double()
            x = self._x.detach().double().requires_grad_(self.case.training)
            plain = self._call(self._torch, self._x, self._dout)()
            self._known = plain, self._call(wide, x, self._dout.double())()
        for n, triple in enumerate(zip(call(), *self._known, strict=True)):
            got, plain_one, exact = (y[self._keep] for y in triple) if n == 0 else triple
            try:
                assert_no_worse_than(got, plain_one, exact, factor=3.0 if n else 2.0, name=f"result {n}")
            except AssertionError as error:
                return str(error)
        return ""

    def flops(self, direction: str, name: str) -> int:
        return self.case.flops()
