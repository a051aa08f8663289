"""One attention call as the kernels take it: the operators' arguments, and what every launch is made of."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import config
from .arguments import runtime
from .config import Config
from .mask import UNBOUNDED, Mask
from .tile import Packed, Rows, Static, Terms, Vector

_RELU, _SIGMOID = 1, 2
_TILE = 64  # rows and columns of a graph's tile
_LONGEST = 1 << 30


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of the operators from q to body, in their order."""

    q: Tensor  # [B, H, Sq, D], packed [total, H, D]
    k: Tensor
    v: Tensor
    bias: Tensor | None  # expanded to [B, H, Sq, Sk]
    rel_bias: Tensor | None
    weight: Tensor | None
    sink: Tensor | None
    extra_k: Tensor | None  # [H, D]
    extra_v: Tensor | None
    seed: Tensor | None
    head_bounds: Tensor | None
    lengths: Tensor | None
    keep: Tensor | None
    q_ids: Tensor | None
    k_ids: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    seqused_k: Tensor | None
    page_table: Tensor | None
    beam: Tensor | None
    tiles: list[
        Tensor
    ]  # of a graph: bits, then pointers, ends of the whole tiles, columns, numbers by row; by column
    band: list[int]
    chunks: list[int]
    max_q: int
    max_k: int
    score: int
    activation: int
    scale: float
    softcap: float
    slope: float
    dropout_p: float
    body: int

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_q is None else self.cu_q.shape[0] - 1

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def seqlen_q(self) -> int:
        return self.max_q if self.cu_q is not None else self.q.shape[2]

    @property
    def seqlen_k(self) -> int:
        return self.max_k or self.k.shape[2]

    @property
    def is_by_query(self) -> bool:
        """Has the relative bias rows of its own for each query?"""
        return self.rel_bias is not None and self.rel_bias.dim() > 2

    @property
    def has_lse(self) -> bool:
        return self.activation not in (_RELU, _SIGMOID)

    def rows(self, x: Tensor) -> Rows:
        """A tensor of rows of q's layout."""
        if x.dim() == 3:
            return Rows(x, 0, x.stride(1), x.stride(0), x.stride(2))
        return Rows(x, *x.stride())

    def vector(self, x: Tensor) -> Vector:
        """A contiguous tensor of one number per row."""
        if x.dim() == 1:  # there is none
            return Vector(x, runtime(0), runtime(0))
        batch, head = (0, x.shape[1]) if x.dim() == 2 else x.stride()[:2]
        return Vector(x, runtime(batch), runtime(head))

    def config(self, name: str) -> Config:
        """The tile shape of a pass; a graph's tiles are given."""
        dim = max(self.q.shape[-1], self.v.shape[-1])
        arch, size = architecture(self.q.device), self.q.element_size()
        left_end, right_end, left_start, right_start = self.band
        narrow = max(left_end, right_end) < UNBOUNDED or max(left_start, right_start) < UNBOUNDED
        found = config.pick(name, arch, size, dim, "window" if narrow else "full", self._load(name))
        if self.tiles:
            return Config(_TILE, _TILE, min(found.block_d, 64), found.num_warps, 1, found.measured)
        biases = sum(x.element_size() for x in (self.bias, self.rel_bias) if x is not None)
        more = biases + (self.dropout_p > 0)
        return config.fitted(found, name, arch, size, more) if more or self.extra_k is not None else found

    def _load(self, name: str) -> str:
        """What the call does for each pair that the table's own does not; see `config.lighter`."""
        biased = self.bias is not None or self.rel_bias is not None
        if self.score:
            return "scores"
        if name in ("weights", "bias"):  # the terms that take their registers
            heavy = biased and bool(self.tiles) if name == "weights" else self.rel_bias is not None
            return "terms" if heavy else ""
        if biased or self.softcap or self.dropout_p:
            return "terms"
        return "mask" if self._is_bounded or self.keep is not None or self.lengths is not None else ""

    @property
    def _is_bounded(self) -> bool:
        return self.head_bounds is not None or bool(self.chunks)

    def is_tight(self, name: str) -> bool:
        """Would ptxas run out of registers in a pass where 128 columns are held? Then nothing is hoisted out
        of the loops over tiles, and one loop, whose tiles are all checked, stands for that of whole tiles and
        those beside it: what one loop keeps for the next is kept through all of them. Which calls these are,
        tests/test_triton_compiles.py found; others keep their loops.
        """
        drops = self.dropout_p > 0
        if name == "forward":
            return self.bias is not None and not drops
        if name == "backward_q":
            return self.bias is not None or self.score > 0 or (self.rel_bias is not None and drops)
        if name != "backward_kv" or self.score:
            return False
        terms = self.bias is not None or self.rel_bias is not None or self.extra_k is not None or drops
        return terms or self._load(name) == "mask" or self.q_ids is not None or not self.has_lse

    def static(self, name: str = "") -> Static:
        q, keeps = self.q, self.keep is not None or self.q_ids is not None
        bare = not (self.score or self.softcap or self.bias is not None or self.rel_bias is not None)
        wide = q.dtype == torch.float64
        # Asked of the backend itself: what was set by torch's newer interface makes the older one raise.
        loose = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        bounded = self._is_bounded
        return Static(
            score=self.score,
            activation=self.activation,
            heads=self.heads,
            group=self.heads // max(self.k.shape[1], 1),
            dim=q.shape[-1],
            dim_v=self.v.shape[-1],
            bare=bare and self.scale > 0 and self.activation != _RELU,
            exact=q.element_size() > 2 or self.bias is not None,
            wide=wide,
            precision="tf32" if loose else "ieee",
            softcap=self.softcap != 0,
            dropout=self.dropout_p > 0,
            bounded_left=bounded or min(self.band[0], self.band[2]) < UNBOUNDED,
            irregular=keeps,
            graph=bool(self.tiles),
            gaps=keeps or bool(self.tiles) or bool(self.chunks) or self.bias is not None,
            by_query=self.is_by_query,
            far=self._is_far(),
            tight=self.is_tight(name),
        )

    def _is_far(self, *others: Tensor) -> bool:
        """Do the offsets inside a tile of any of the tensors, or of others, pass 31 bits?"""
        tallest = 256
        spans = (tallest * abs(x.stride(-2 if x.dim() == 4 else 0)) + x.shape[-1] * abs(x.stride(-1))
                 for x in (self.q, self.k, self.v, *others))  # fmt: skip
        return max(spans) >= 1 << 31

    def near(self, x: Tensor) -> Tensor:
        """A gradient that came with strides of its own: as it lies, where the kernels' offsets reach."""
        return x.contiguous() if self._is_far(x) and not self._is_far() else x

    def terms(self) -> Terms:
        rest = 1.0 / (1.0 - self.dropout_p) if self.dropout_p < 1 else 0.0
        numbers = tuple(struct.unpack("q", struct.pack("d", x))[0]
                        for x in (self.scale, self.softcap, self.slope, rest))  # fmt: skip
        extra = [
            None if x is None else Rows(x, 0, x.shape[1], x.shape[1], 1) for x in (self.extra_k, self.extra_v)
        ]
        found = Terms(
            rel_bias=self.rel_bias,
            weight=self.weight,
            sink=self.sink,
            extra_k=extra[0],
            extra_v=extra[1],
            seed=self.seed,
            numbers=numbers,
            threshold=int(self.dropout_p * 65536.0 + 0.5),
        )
        if self.rel_bias is not None and self.is_by_query:
            head = self.rel_bias.shape[-2] * self.rel_bias.shape[-1]
            batch = self.heads * head if self.rel_bias.dim() == 4 else 0
            found = found._replace(rel_batch=runtime(batch), rel_head=runtime(head), rel_start=self.cu_q)
        if self.bias is None:
            return found
        batch, head, row, col = self.bias.stride()
        return found._replace(bias=self.bias, bias_batch=batch, bias_head=head, bias_row=row, bias_col=col)

    def mask(self) -> Mask:
        bounds = self.head_bounds
        chunks: list[int] = []
        for size, left in zip(self.chunks[::2], self.chunks[1::2], strict=True):
            size = min(size, UNBOUNDED)  # beyond the longest sequence all are alike
            chunks += [size, min(left, UNBOUNDED // size)]
        return Mask(
            None if bounds is None else bounds.clamp(-UNBOUNDED, UNBOUNDED).int(),
            tuple(chunks),
            self.lengths,
            self.keep,
            _row(self.keep),
            self.q_ids,
            _row(self.q_ids),
            self.k_ids,
            _row(self.k_ids),
            self.tiles[0] if self.tiles else None,
        )

    def packed(self) -> Packed:
        if self.cu_q is None:
            return Packed()
        return Packed(self.cu_q, self.cu_k, runtime(self.q.shape[0]), runtime(self.k.shape[0]))

    def tile_lists(self, by_column: bool) -> tuple[Tensor, ...]:
        return tuple(self.tiles[5:9] if by_column else self.tiles[1:5])

    def lengths_and_band(self, blocks: int) -> tuple[int, ...]:
        """The run-time numbers that close every launch: no length or bound is compiled in."""
        if max(self.seqlen_q, self.seqlen_k) >= _LONGEST:
            raise ValueError(f"q, k: the triton kernels serve up to {_LONGEST - 1} rows of a sequence")
        band = (max(-UNBOUNDED, min(UNBOUNDED, x)) for x in self.band)
        distances = self.seqlen_q + self.seqlen_k - 1
        if self.rel_bias is not None and self.is_by_query:
            distances = self.rel_bias.shape[-1]
        return (self.seqlen_q, self.seqlen_k, blocks, *band, distances)


def _row(x: Tensor | None) -> int:
    return 0 if x is None else runtime(x.stride(0))


def architecture(device: torch.device) -> str:
    """The column of the tables for a device; the interpreter takes that of the oldest."""
    if device.type != "cuda":
        return "sm80"
    return config.architecture(torch.cuda.get_device_capability(device))


def on_device(x: Tensor) -> Any:
    """Launches go to the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def blocks_of(shape: Config, dim: int) -> int:
    """The columns held at once of heads of `dim`: a power of two that a matrix instruction takes."""
    return max(16, min(shape.block_d, config.width(dim)))
