"""Positions that are added to the input, and the Transformer-XL term as a module with its parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import int_at_least
from ..position import TransformerXL

Offset = int | Tensor


def sinusoidal_encoding(
    positions: Tensor, dim: int, base: float = 10000.0, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The encoding [..., dim], in `dtype`, of `positions` of any shape, ints or floats, negative ones too.

    PE(p, 2k) = sin(p / base^(2k / dim)), PE(p, 2k + 1) = cos(p / base^(2k / dim)): 1706.03762, section 3.5.
    With an odd `dim` the last column is a sine. Angles are computed in fp64.
    """
    int_at_least("dim", dim, 1)
    rates = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim)
    angle = positions[..., None].double() * rates
    both = torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)
    return both[..., :dim].to(dtype)


class _Added(nn.Module):
    """A row per position joins the input."""

    batch_first: bool
    d_model: int
    dropout: nn.Dropout

    def rows(self, positions: Tensor, like: Tensor) -> Tensor:
        """[..., d] of positions [...], in the dtype of `like`."""
        raise NotImplementedError

    def _place(self, x: Tensor, offset: Offset) -> Tensor:
        """The positions of x's rows: [S], or [N, S] where each sequence has an offset of its own."""
        if x.dim() < 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x: expected shape [..., {self.d_model}] with a sequence, got {list(x.shape)}")
        at = x.dim() - 2 if self.batch_first or x.dim() == 2 else 0
        steps = torch.arange(x.shape[at], device=x.device)
        if not isinstance(offset, Tensor):
            return steps + offset
        batch = x.shape[1 - at] if x.dim() == 3 else None
        if offset.dim() != 1 or offset.shape[0] != batch or offset.is_floating_point():
            raise ValueError(f"offset: expected an int or ints [{batch}], got {list(offset.shape)}")
        return offset.to(x.device)[:, None] + steps

    def forward(self, x: Tensor, offset: Offset = 0) -> Tensor:
        """`x` [S, N, d], or [N, S, d] with batch_first, or [S, d], with the rows of positions offset + 0, 1,
        ... added. `offset` is an int, or [N] ints for one per sequence. Result in x's shape and dtype.
        """
        places = self._place(x, offset)
        rows = self.rows(places, x)
        if x.dim() > 2 and not self.batch_first:
            between = (1,) * (x.dim() - 2)
            rows = rows.transpose(0, 1) if places.dim() == 2 else rows.unflatten(0, (-1, *between))
        return self.dropout(x + rows)


class SinusoidalPosition(_Added):
    """Adds `sinusoidal_encoding` (1706.03762, section 3.5): any length, any `d_model`, odd ones too.

    Args:
        d_model: size of the rows.
        base: of the geometric sequence of wavelengths.
        dropout: on the sum, as in the paper.
        batch_first: as in torch's layers.

    No parameters and no length it ends at; float inputs of every dtype, on every device.
    """

    def __init__(
        self, d_model: int, base: float = 10000.0, dropout: float = 0.0, *, batch_first: bool = False
    ) -> None:
        super().__init__()
        self.d_model, self.base, self.batch_first = int_at_least("d_model", d_model, 1), base, batch_first
        self.dropout = nn.Dropout(dropout)

    def rows(self, positions: Tensor, like: Tensor) -> Tensor:
        return sinusoidal_encoding(positions, self.d_model, self.base, dtype=like.dtype)

    def extra_repr(self) -> str:
        return f"{self.d_model}, base={self.base:g}, batch_first={self.batch_first}"


class LearnedPosition(_Added):
    """Adds a learned row per position (1706.03762, section 3.5; 1705.03122), up to `max_len`.

    Args:
        max_len, d_model: `weight` is [max_len, d_model], drawn from N(0, 0.02^2).
        dropout, batch_first: as in `SinusoidalPosition`.
        device, dtype: torch's.

    Raises:
        ValueError: for a sequence that ends past max_len (an int offset; on the CPU also a tensor of them).
    """

    def __init__(
        self,
        max_len: int,
        d_model: int,
        dropout: float = 0.0,
        *,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.max_len = int_at_least("max_len", max_len, 1)
        self.d_model = int_at_least("d_model", d_model, 1)
        self.batch_first = batch_first
        self.weight = nn.Parameter(torch.empty(max_len, d_model, device=device, dtype=dtype))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, offset: Offset = 0) -> Tensor:
        """`x` with the rows of its positions added, from `offset` (an int, or [N] ints: one per sequence)."""
        self._check_end(x, offset)
        return super().forward(x, offset)

    def _check_end(self, x: Tensor, offset: Offset) -> None:
        length = x.shape[-2] if self.batch_first or x.dim() < 3 else x.shape[0]
        if isinstance(offset, Tensor):
            if offset.device.type != "cpu" or torch.compiler.is_compiling() or not offset.numel():
                return
            first, last = int(offset.min()), int(offset.max())
        else:
            first = last = offset
        if first < 0 or last + length > self.max_len:
            raise ValueError(
                f"x: expected positions 0 to {self.max_len - 1}, got {first} to {last + length - 1}; "
                f"make max_len larger, or resize() to keep what was learned"
            )

    def rows(self, positions: Tensor, like: Tensor) -> Tensor:
        return F.embedding(positions, self.weight).to(like.dtype)

    @torch.no_grad()
    def resize(self, max_len: int) -> LearnedPosition:
        """A new module of another length, its rows interpolated linearly between the first and the last."""
        made = LearnedPosition(
            max_len, self.d_model, self.dropout.p, batch_first=self.batch_first,
            device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        rows = self.weight.t()[None].to(torch.promote_types(self.weight.dtype, torch.float32))
        made.weight.copy_(F.interpolate(rows, size=max_len, mode="linear", align_corners=True)[0].t())
        return made.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.max_len}, {self.d_model}, batch_first={self.batch_first}"


class SinusoidalXL(TransformerXL):
    """The term of a `TransformerXLPosition` for some lengths; `r` is made when it is first read."""

    def __init__(self, module: TransformerXLPosition, seqlen_q: int, seqlen_k: int) -> None:
        self.module, self.sizes = module, (seqlen_q, seqlen_k)
        self.u, self.v = module.u, module.v

    @property
    def r(self) -> Tensor:  # type: ignore[override]
        if "_r" not in self.__dict__:
            self._r = self.module.table(*self.sizes)
        return self._r

    def expand(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, H, Sq, D'] and k [B, Hk, Sk, D'] whose plain products are the unscaled logits of this term.

        With a = W^T (q + v) the second product is a . R[i - j], a sum of sines and cosines of differences;
        sin(x - y) = sin x cos y - cos x sin y, and so for cos: a product of what depends on the query with
        what depends on the key's place. D' = D + d_model, and nothing of size N x N is made.
        """
        module, (size_q, size_k) = self.module, (q.shape[2], k.shape[2])
        width = module.linear.in_features
        weight = module.linear.weight.view(module.num_heads, module.head_dim, width)
        a = F.pad((q + self.v[:, None]) @ weight, (0, width % 2))  # [B, H, Sq, d_model]
        of_sin, of_cos = a[..., 0::2], a[..., 1::2]
        both = width + width % 2
        # Places are counted back from the last key, at which the queries end too.
        query_at, key_at = (torch.arange(1 - n, 1, device=q.device) for n in (size_q, size_k))
        rates = module.rates(q.device)
        query_angle, key_angle = query_at[:, None] * rates, key_at[:, None] * rates
        sin, cos = query_angle.sin().to(q.dtype), query_angle.cos().to(q.dtype)
        features = torch.cat([key_angle.cos(), key_angle.sin()], -1).to(k.dtype)
        own = torch.cat([of_sin * sin + of_cos * cos, of_cos * sin - of_sin * cos], -1)
        wide_k = torch.cat([k, features.expand(*k.shape[:2], size_k, both)], -1)
        return torch.cat([q + self.u[:, None], own], -1), wide_k


class TransformerXLPosition(nn.Module):
    """The relative positions of Transformer-XL and the Conformer (1901.02860, 2005.08100), for
    `MultiheadAttention(position=...)`: the logit is scale * ((q + u) . k + (q + v) . W R[i - j]).

    R is `sinusoidal_encoding`; `linear.weight` [H D, d_model] is the paper's W_kR, `u` and `v` are [H, D].
    Any lengths; called with (L, S) it gives the `saccade.TransformerXL` term, farthest past key first.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int | None = None,
        base: float = 10000.0,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if head_dim is None and d_model % num_heads:
            raise ValueError(f"num_heads: expected a divisor of d_model {d_model}, got {num_heads}")
        self.num_heads, self.base = num_heads, base
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.linear = nn.Linear(d_model, num_heads * self.head_dim, bias=False, **factory)
        self.u = nn.Parameter(torch.empty(num_heads, self.head_dim, **factory))
        self.v = nn.Parameter(torch.empty(num_heads, self.head_dim, **factory))
        bound = math.sqrt(6.0 / (num_heads + self.head_dim))
        for bias in (self.u, self.v):
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, seqlen_q: int, seqlen_k: int) -> TransformerXL:
        """The term of a call with these lengths, for `position=`."""
        return SinusoidalXL(self, seqlen_q, seqlen_k)

    def rates(self, device: torch.device) -> Tensor:
        """[d_model / 2], rounded up, fp64: the angle by which a step turns each pair of the encoding."""
        width = self.linear.in_features
        return self.base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)

    def table(self, seqlen_q: int, seqlen_k: int) -> Tensor:
        """[H, Sq + Sk - 1, D]: the term's r."""
        weight = self.linear.weight
        # Row delta + Sk - 1 stands for the distance i - j = -delta.
        distance = torch.arange(seqlen_k - 1, -max(seqlen_q, 1), -1, device=weight.device)
        table = sinusoidal_encoding(distance, weight.shape[1], self.base, dtype=weight.dtype)
        rows = self.linear(table).unflatten(-1, (self.num_heads, self.head_dim))
        return rows.transpose(0, 1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"
