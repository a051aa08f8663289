"""Position terms. All of them see the distance `delta = j - (i + Sk - Sq)`: queries are aligned with the end
of the keys.

ALiBi and T5 add one number per head and distance; they become a table over distances, built in O(S). RoPE
turns queries and keys before the kernel. Shaw and TransformerXL add a product of the query with a vector of
the distance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import finite, int_at_least


def _float_tensor(name: str, value: object, dims: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dim() not in dims or not value.is_floating_point():
        wanted = " or ".join(map(str, dims))
        raise ValueError(
            f"{name}: expected a float tensor of {wanted} dimensions, got {value.dtype} {list(value.shape)}"
        )
    return value


def _check_heads(what: str, got: int, heads: int) -> None:
    if got != heads:
        raise ValueError(f"position: {what} is for {got} heads, the call has {heads}")


class Position:
    """Base of the position terms."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that take gradients."""
        return ()

    def __repr__(self) -> str:
        shapes = ", ".join(str(list(x.shape)) for x in self.tensors())
        return f"{type(self).__name__}({shapes})"


class DistanceBias(Position):
    """A term that is one number per head and distance."""

    def at(self, delta: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """[H, n]: the term at the distances `delta` [n] int64, computed in `dtype`."""
        raise NotImplementedError

    def table(self, heads: int, max_q: int, max_k: int, dtype: torch.dtype) -> Tensor:
        """[H, max_q + max_k - 1]: entry `delta + max_k - 1`."""
        delta = torch.arange(1 - max_k, max(max_q, 1 - max_k), device=self.tensors()[0].device)
        return self.at(delta, heads, dtype)


class ALiBi(DistanceBias):
    """Adds `-slopes[h] * |delta|` (Press, Smith, Lewis: 2108.12409). `slopes` [H] takes a gradient."""

    def __init__(self, slopes: Tensor) -> None:
        self.slopes = _float_tensor("slopes", slopes, (1,))

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.slopes,)

    def at(self, delta: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        _check_heads("ALiBi", self.slopes.shape[0], heads)
        return -self.slopes.to(dtype)[:, None] * delta.abs()

    @staticmethod
    def default_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
        """The paper's geometric sequence, for any number of heads."""
        int_at_least("heads", heads, 1)
        power = 2 ** math.floor(math.log2(heads))
        slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
        slopes += [2 ** (-4 * (2 * n + 1) / power) for n in range(heads - power)]
        return torch.tensor(slopes, device=device)


class T5(DistanceBias):
    """Adds `table[bucket(delta), h]` (Raffel et al.: 1910.10683). `table` [num_buckets, H] takes a gradient.

    Half of the buckets are exact distances, the rest grow logarithmically to `max_distance`; `bidirectional`
    gives keys after the query buckets of their own.
    """

    def __init__(
        self,
        table: Tensor,
        bidirectional: bool = True,
        num_buckets: int | None = None,
        max_distance: int = 128,
    ) -> None:
        self.weight = _float_tensor("table", table, (2,))
        self.bidirectional = bool(bidirectional)
        self.num_buckets = table.shape[0] if num_buckets is None else num_buckets
        self.max_distance = max_distance
        int_at_least("num_buckets", self.num_buckets, 2)
        int_at_least("max_distance", max_distance, 1)
        if self.num_buckets != table.shape[0]:
            raise ValueError(f"table: expected shape [{self.num_buckets}, H], got {list(table.shape)}")
        if self.num_buckets < (4 if bidirectional else 2) or self.num_buckets % (2 if bidirectional else 1):
            raise ValueError(
                f"num_buckets: expected an even number from 4 (from 2 one way), got {self.num_buckets}"
            )
        exact = self.num_buckets // (4 if bidirectional else 2)
        if max_distance <= exact:
            raise ValueError(
                f"max_distance: expected more than {exact} (the exact buckets), got {max_distance}"
            )

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def bucket(self, delta: Tensor) -> Tensor:
        """The bucket of each distance."""
        buckets = self.num_buckets
        base = torch.zeros_like(delta)
        if self.bidirectional:
            buckets //= 2
            base = (delta > 0).long() * buckets
            distance = delta.abs()
        else:
            distance = (-delta).clamp(min=0)
        exact = buckets // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return base + torch.where(distance < exact, distance, far)

    def at(self, delta: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        _check_heads("T5", self.weight.shape[1], heads)
        return self.weight.to(dtype)[self.bucket(delta)].t()


def _check_vectors(term: Position, table: Tensor, heads: int, head_dim: int) -> None:
    name = type(term).__name__
    if table.dim() == 3:
        _check_heads(name, table.shape[0], heads)
    if table.shape[-1] != head_dim:
        raise ValueError(
            f"position: {name} has vectors of {table.shape[-1]}, the head dimension is {head_dim}"
        )


class QueryRelative(Position):
    """A term that is the product of the query with a vector of the distance."""

    def table(self) -> Tensor:
        """[R, D] or [H, R, D]: the vectors."""
        raise NotImplementedError

    def content_query(self, q: Tensor) -> Tensor:
        """The query [B, H, Sq, D] that meets the keys."""
        return q

    def position_query(self, q: Tensor) -> Tensor:
        """The query [B, H, Sq, D] that meets the vectors of `table`."""
        return q

    def index(self, delta: Tensor, max_k: int) -> Tensor:
        """The row of `table` of each distance."""
        raise NotImplementedError

    def check(self, heads: int, head_dim: int, max_q: int, max_k: int) -> None:
        """Raise ValueError where the tensors do not fit the call."""
        _check_vectors(self, self.table(), heads, head_dim)


class Shaw(Position):
    """Adds `scale * q_i . table[clip(delta, -c, c) + c]` (Shaw, Uszkoreit, Vaswani: 1803.02155).

    `table` [2c + 1, D], or [H, 2c + 1, D] for vectors of each head, takes a gradient.
    """

    def __init__(self, table: Tensor) -> None:
        self.vectors = _float_tensor("table", table, (2, 3))
        if table.shape[-2] % 2 == 0:
            raise ValueError(f"table: expected an odd number of rows (2c + 1), got {list(table.shape)}")

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.vectors,)

    def check(self, heads: int, head_dim: int) -> None:
        """Raise ValueError where the table does not fit the call."""
        _check_vectors(self, self.vectors, heads, head_dim)

    def products(self, q: Tensor, scale: float, longest: int | None, dtype: torch.dtype) -> Tensor:
        """What each query adds at each clipped distance, computed in `dtype`: [B, H, Sq, R] from q
        [B, H, Sq, D], [H, total, R] from packed q [total, H, D]. R is 2c + 1, or fewer where sequences of at
        most `longest` have no such distances; None: of unknown length.
        """
        table = self.vectors.to(dtype)
        beyond = 0 if longest is None else table.shape[-2] // 2 - max(longest - 1, 0)
        if beyond > 0:
            table = table[..., beyond:-beyond, :]
        # A row that keeps no key may hold anything, but 0 times NaN would reach the gradient of the table. A
        # row that keeps one is NaN by its keys.
        rows = torch.nan_to_num(q, 0.0, 0.0, 0.0).to(dtype)
        rows = rows.transpose(0, 1) if q.dim() == 3 else rows
        with torch.autocast(q.device.type, enabled=False):
            return rows @ (scale * table).transpose(-1, -2)


class TransformerXL(QueryRelative):
    """Logit `scale * ((q_i + u) . k_j + (q_i + v) . r[delta + Sk - 1])` (Dai et al.: 1901.02860; also the
    Conformer's).

    `r` [Sq + Sk - 1, D] or [H, Sq + Sk - 1, D] holds the projected vectors of the distances, farthest past
    key first; `u` and `v` are [H, D]. In a batch of sequences of several lengths Sq and Sk are the longest.
    All take gradients.
    """

    def __init__(self, r: Tensor, u: Tensor, v: Tensor) -> None:
        self.r = _float_tensor("r", r, (2, 3))
        self.u = _float_tensor("u", u, (2,))
        self.v = _float_tensor("v", v, (2,))

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.r, self.u, self.v)

    def table(self) -> Tensor:
        return self.r

    def content_query(self, q: Tensor) -> Tensor:
        return q + self.u[:, None].to(q.dtype)

    def position_query(self, q: Tensor) -> Tensor:
        return q + self.v[:, None].to(q.dtype)

    def index(self, delta: Tensor, max_k: int) -> Tensor:
        return delta + max_k - 1

    def check(self, heads: int, head_dim: int, max_q: int, max_k: int) -> None:
        super().check(heads, head_dim, max_q, max_k)
        if self.r.shape[-2] != max(max_q + max_k - 1, 0):
            raise ValueError(
                f"position: TransformerXL's r needs Sq + Sk - 1 = {max_q + max_k - 1} rows, "
                f"got {self.r.shape[-2]}"
            )
        for name, value in (("u", self.u), ("v", self.v)):
            if tuple(value.shape) != (heads, head_dim):
                raise ValueError(
                    f"position: TransformerXL's {name} must be [{heads}, {head_dim}], got {list(value.shape)}"
                )


class RoPE(Position):
    """Turns queries and keys by angles that grow with the position (Su et al.: 2104.09864). Keys stand at j,
    queries at i + Sk - Sq.

    The first `dim` components (default: all) turn in pairs: (x, x + dim/2), or (2x, 2x + 1) with
    `interleaved`. Pair n turns by `position * inv_freq[n]`, by default `base ** (-2n / dim)`; a given
    `inv_freq` [dim / 2] takes a gradient. In `attention_decode` the cache holds keys that `rotate` has
    turned; only the queries are turned by the call.
    """

    def __init__(
        self,
        base: float = 10000.0,
        dim: int | None = None,
        interleaved: bool = False,
        inv_freq: Tensor | None = None,
    ) -> None:
        if finite("base", base) <= 0:
            raise ValueError(f"base: expected a positive number, got {base}")
        if dim is not None and int_at_least("dim", dim, 2) % 2:
            raise ValueError(f"dim: expected an even number from 2, got {dim}")
        if inv_freq is not None:
            _float_tensor("inv_freq", inv_freq, (1,))
            if dim is not None and inv_freq.shape[0] != dim // 2:
                raise ValueError(f"inv_freq: expected shape [{dim // 2}], got {list(inv_freq.shape)}")
            dim = 2 * inv_freq.shape[0]
        self.base, self.dim, self.interleaved, self.inv_freq = float(base), dim, interleaved, inv_freq

    def tensors(self) -> tuple[Tensor, ...]:
        return () if self.inv_freq is None else (self.inv_freq,)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` [..., S, D] turned at `positions` [S] (or any shape that broadcasts to x's up to D), in fp32 or
        wider.
        """
        dim = x.shape[-1] if self.dim is None else self.dim
        if dim > x.shape[-1] or dim % 2:
            raise ValueError(
                f"position: RoPE turns an even number of at most {x.shape[-1]} components, got {dim}"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.inv_freq is None:
            # Angles of large positions need the digits of fp64.
            steps = torch.arange(0, dim, 2, device=x.device, dtype=torch.float64)
            angle = positions[..., None].double() * self.base ** (-steps / dim)
        else:
            angle = positions[..., None].to(wide) * self.inv_freq.to(wide)
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        part = x[..., :dim].to(wide)
        if self.inv_freq is None:
            turned = self._turn(part, cos, sin)
        else:  # a row of NaN that no pair keeps must not reach the gradient of inv_freq, as 0 * NaN
            finite = part.isfinite().all(-1, keepdim=True)
            safe = self._turn(torch.where(finite, part, 0.0), cos, sin)
            turned = torch.where(finite, safe, self._turn(part, cos.detach(), sin.detach()))
        turned = turned.to(x.dtype)
        return turned if dim == x.shape[-1] else torch.cat([turned, x[..., dim:]], -1)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
