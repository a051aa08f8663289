"""How nn.TransformerEncoder is measured: torch's, the same after saccade.accelerate, and, where the batch is
padded, that with `packed=True`; where it is not, what is left without attention.
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
from .modules import LINEAR, diagonal, linear_of

Call = Callable[[], list[Tensor]]
_EIGHTHS = (8, 5, 2, 1)  # of the whole length, per sequence: half of all tokens are padding
_TOKENS = 4096  # of a batch without padding


@dataclass(frozen=True)
class EncoderCase:
    """One call of an encoder of torch's layers: 4096 tokens a batch, or four sequences of which half is
    padding.
    """

    name: str
    length: int = 1024
    padded: bool = True
    embed_dim: int = 512
    num_heads: int = 8
    feedforward: int = 2048
    layers: int = 2
    dtype: str = "fp32"
    training: bool = True

    def lengths(self) -> list[int]:
        if not self.padded:
            return [self.length] * max(1, _TOKENS // self.length)
        return [self.length * n // 8 for n in _EIGHTHS]

    def describe(self) -> dict[str, object]:
        """The columns of a result row that say what was measured."""
        head_dim = self.embed_dim // self.num_heads
        return {
            "case": self.name,
            "dtype": self.dtype,
            "batch": len(self.lengths()),
            "heads": self.num_heads,
            "heads_k": self.num_heads,
            "seqlen_q": self.length,
            "seqlen_k": self.length,
            "head_dim": head_dim,
            "head_dim_v": head_dim,
            "mask": f"padding {self.lengths()}" if self.padded else "",
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
    """Length 1024 with half of it padding, then 128 to 1024 without; eval and train, fp32 and bf16."""
    better = {FORWARD: 1.3, TRAIN: 1.3}
    groups = []
    for dtype in ("fp32", "bf16"):
        at_1024 = better if dtype == "bf16" else {}
        for name, padded, lengths, goal in (
            (f"encoder {dtype} padded", True, (1024,), better),
            (f"encoder {dtype} to 512", False, (128, 256, 512), {}),
            (f"encoder {dtype} 1024", False, (1024,), at_1024),
        ):
            cases = tuple(
                EncoderCase(
                    f"encoder-{dtype}-{mode}-n{n}", n, padded, dtype=dtype, training=mode.endswith("train")
                )
                for n in lengths
                for mode in (("padded-train", "padded-eval") if padded else ("train", "eval"))
            )
            groups.append(Group(name, cases, "torch", goal, 1.0))  # type: ignore[arg-type]
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
        shape = (len(case.lengths()), case.length, case.embed_dim)
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
        self._linear = linear_of(self._saccade)
        self._known: dict[bool, tuple[list[Tensor], list[Tensor]]] = {}

    @property
    def directions(self) -> tuple[str, ...]:
        return (TRAIN if self.case.training else FORWARD,)

    def _call(self, encoder: Any, x: Tensor, dout: Tensor, alone: bool = False) -> Call:
        padding = ~self._keep if self.case.padded else None
        mask = diagonal(self.case.length, x.device) if alone else None

        def evaluate() -> list[Tensor]:
            with torch.no_grad():
                return [encoder(x, mask, src_key_padding_mask=padding)]

        def train() -> list[Tensor]:
            out = encoder(x, mask, src_key_padding_mask=padding)
            return [out.detach(), *torch.autograd.grad(out, [x, *encoder.parameters()], dout)]

        return train if self.case.training else evaluate

    def offers(self, direction: str) -> dict[str, Call | str]:
        """Packing is for padding, and the linear layers alone for none; the others can always."""
        padded = self.case.padded
        linear = self._call(self._linear, self._x, self._dout)
        return {
            "saccade": self._call(self._saccade, self._x, self._dout),
            "saccade-packed": self._call(self._packed, self._x, self._dout)
            if padded
            else "nothing is padded",
            "torch": self._call(self._torch, self._x, self._dout),
            LINEAR: "padding takes no part" if padded else linear,
        }

    def fault(self, name: str, direction: str, call: Call) -> str:
        """Compare with torch's encoder in fp64; torch's own error in this dtype is the yardstick."""
        alone = name == LINEAR
        if alone not in self._known:
            wide = copy.deepcopy(self._torch).double()
            x = self._x.detach().double().requires_grad_(self.case.training)
            plain = self._call(self._torch, self._x, self._dout, alone)()
            self._known[alone] = plain, self._call(wide, x, self._dout.double(), alone)()
        for n, triple in enumerate(zip(call(), *self._known[alone], strict=True)):
            got, plain_one, exact = (y[self._keep] for y in triple) if n == 0 else triple
            try:
                assert_no_worse_than(got, plain_one, exact, factor=3.0 if n else 2.0, name=f"result {n}")
            except AssertionError as error:
                return str(error)
        return ""

    def flops(self, direction: str, name: str) -> int:
        return self.case.flops()
