"""A decoder that runs a few tokens at a time: keys and values are kept, and beams share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import int_at_least
from ..functional import attention, attention_decode
from ..masks import Causal, KeyPadding
from ..position import RoPE
from . import _extras
from ._asked import check_padding
from ._masks import join
from ._projections import project, project_memory, project_out, project_query
from .attention import MultiheadAttention
from .transformer_layers import TransformerDecoderLayer


class KVCache:
    """Keys and values [rows, Hk, capacity, D] of one self-attention, of which the first `length` are real.

    `append` writes k and v [rows, Hk, T, D] after them; the capacity doubles when it is reached.
    """

    def __init__(self, capacity: int = 64) -> None:
        self.capacity, self.length = int_at_least("capacity", capacity, 1), 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write k and v [rows, Hk, T, D] after those that are there; other rows, heads or D: ValueError."""
        for name, new, held in (("k", k, self._k), ("v", v, self._v)):
            like = k.shape[:3] if held is None else (*held.shape[:2], k.shape[2])
            if (
                new.dim() != 4
                or new.shape[:3] != like
                or (held is not None and new.shape[3] != held.shape[3])
            ):
                raise ValueError(f"{name}: expected {[*like]} rows, got {list(new.shape)}")
        end = self.length + k.shape[2]
        while self.capacity < end:
            self.capacity *= 2
        self._k, self._v = self._room(self._k, k), self._room(self._v, v)
        self._k[:, :, self.length : end], self._v[:, :, self.length : end] = k, v
        self.length = end

    def _room(self, held: Tensor | None, new: Tensor) -> Tensor:
        if held is not None and held.shape[2] == self.capacity:
            return held
        made = new.new_empty(new.shape[0], new.shape[1], self.capacity, new.shape[3])
        if held is not None:
            made[:, :, : self.length] = held[:, :, : self.length]
        return made

    @property
    def keys(self) -> Tensor:
        """[rows, Hk, length, D], a view."""
        return self._filled(self._k)

    @property
    def values(self) -> Tensor:
        """[rows, Hk, length, D], a view."""
        return self._filled(self._v)

    def _filled(self, held: Tensor | None) -> Tensor:
        if held is None:
            raise ValueError("cache: nothing was appended yet")
        return held[:, :, : self.length]


class DecoderState:
    """What a `TransformerDecoder` has seen, so that `step` costs what the new tokens cost.

    Stepping through a sequence in pieces of any size gives what `decoder(tgt, memory, tgt_mask=Causal())`
    gives at once, to rounding, at every position. Keys and values of the memory are projected here, once.

    Args:
        decoder: a `saccade.nn.TransformerDecoder` of our layers, in eval mode.
        memory: (N, S, E) with batch_first, else (S, N, E); or a sequence of them, one per layer (any
            encoder layers: 2005.08081).
        memory_key_padding_mask: bool (N, S), True = padding.
        beams: hypotheses per sentence. There are N * beams rows, those of a sentence together; they share
            the memory's keys.
        capacity: tokens for which there is room at first.

    Runs without gradients. Raises TypeError and ValueError by the argument's name.
    """

    def __init__(
        self,
        decoder: nn.TransformerDecoder,
        memory: Tensor | Sequence[Tensor],
        memory_key_padding_mask: Tensor | None = None,
        *,
        beams: int = 1,
        capacity: int = 64,
    ) -> None:
        self.layers = _checked_layers(decoder)
        self.decoder, self.beams = decoder, int_at_least("beams", beams, 1)
        self.first = self.layers[0].self_attn.batch_first
        memories = [memory] * len(self.layers) if isinstance(memory, Tensor) else list(memory)
        if len(memories) != len(self.layers):
            raise ValueError(f"memory: expected one for each of {len(self.layers)} layers")
        if any(x.dim() != 3 for x in memories):
            raise ValueError("memory: expected a batch, (N, S, E) or (S, N, E)")
        memories = [x if self.first else x.transpose(0, 1) for x in memories]
        self.batch = memories[0].shape[0]
        self.rows = self.batch * self.beams
        self._padding = None
        if memory_key_padding_mask is not None:
            for x in memories:
                check_padding("memory_key_padding_mask", memory_key_padding_mask, *x.shape[:2])
            self._padding = KeyPadding(keep=~memory_key_padding_mask)
        with torch.no_grad():
            self._memory = [
                tuple(x.transpose(1, 2) for x in project_memory(layer.multihead_attn, m))
                for layer, m in zip(self.layers, memories, strict=True)
            ]
        self._caches = [KVCache(capacity) for _ in self.layers]
        self._table: Tensor | None = None  # [rows, length] int32: the cache row of each key, after a reorder

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self._caches[0].length

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """The next T tokens of every row, embedded: `x` (rows, T, E) with batch_first, else (T, rows, E).
        Result alike.
        """
        _check_eval(self.decoder)
        width = self.layers[0].self_attn.embed_dim
        if x.dim() != 3 or x.shape[0 if self.first else 1] != self.rows or x.shape[2] != width:
            raise ValueError(f"x: expected {self.rows} rows of {width} features, got {list(x.shape)}")
        x = x if self.first else x.transpose(0, 1)
        self._extend_table(x.shape[1])
        for layer, cache, memory in zip(self.layers, self._caches, self._memory, strict=True):
            x = self._run(layer, x, cache, memory)
        x = x if self.decoder.norm is None else self.decoder.norm(x)
        return x if self.first else x.transpose(0, 1)

    @torch.no_grad()
    def reorder(self, parents: Tensor) -> None:
        """Row r goes on from what row `parents[r]` ([rows] ints) has seen, a row of the same sentence.

        No key or value moves: a table [rows, length] says where each lies, and the kernel reads through it.
        """
        if parents.shape != (self.rows,) or parents.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"parents: expected ints [{self.rows}], got {parents.dtype} {list(parents.shape)}"
            )
        if parents.device.type == "cpu":
            own = torch.arange(self.rows, device=parents.device) // self.beams
            wrong = (torch.div(parents, self.beams, rounding_mode="floor") != own).nonzero()
            if wrong.numel():
                row = int(wrong[0])
                raise ValueError(
                    f"parents: expected rows of the same sentence, got {int(parents[row])} at {row}"
                )
        if self._table is None:
            self._table = self._own_rows(parents.device).repeat(1, self.length)
        self._table = self._table[parents]

    def _own_rows(self, device: torch.device) -> Tensor:
        return torch.arange(self.rows, dtype=torch.int32, device=device)[:, None]

    def _extend_table(self, count: int) -> None:
        """New keys lie in the rows that make them."""
        if self._table is not None:
            own = self._own_rows(self._table.device).expand(-1, count)
            self._table = torch.cat([self._table, own], 1)

    def _run(self, layer: Any, x: Tensor, cache: KVCache, memory: Any) -> Tensor:
        if layer.norm_first:
            x = x + self._attend_self(layer.self_attn, layer.norm1(x), cache)
            x = x + self._attend_memory(layer.multihead_attn, layer.norm2(x), memory)
            return x + layer._ff_block(layer.norm3(x))
        x = layer.norm1(x + self._attend_self(layer.self_attn, x, cache))
        x = layer.norm2(x + self._attend_memory(layer.multihead_attn, x, memory))
        return layer.norm3(x + layer._ff_block(x))

    def _attend_self(self, module: MultiheadAttention, x: Tensor, cache: KVCache) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in project(module, x, x, x))
        start = cache.length
        terms = _extras.terms(module, q.shape[2], start + q.shape[2])
        if isinstance(terms.get("position"), RoPE):  # the cache holds turned keys
            k = terms["position"].rotate(k, torch.arange(start, start + k.shape[2], device=k.device))
        cache.append(k, v)
        lengths = torch.full((self.rows,), cache.length, dtype=torch.int64, device=q.device)
        mask = join(Causal(), _extras.get_window(module))
        out = attention_decode(q, cache.keys, cache.values, lengths, None, self._table, mask, **terms)
        return project_out(module, out.transpose(1, 2))

    def _attend_memory(self, module: MultiheadAttention, x: Tensor, memory: Any) -> Tensor:
        # The beams of a sentence are so many queries over the same keys.
        length = x.shape[1]
        rows = x.reshape(self.batch, self.beams * length, -1)
        q = project_query(module, rows).transpose(1, 2)
        terms = _extras.terms(module, q.shape[2], memory[0].shape[2])
        k, v = memory
        out = attention(q, k, v, self._padding, **terms)
        return project_out(module, out.transpose(1, 2)).view(self.rows, length, -1)


def _check_eval(decoder: nn.Module) -> None:
    if decoder.training:
        raise ValueError("decoder: expected eval mode; dropout would make every step another decoder")


def _checked_layers(decoder: Any) -> list[Any]:
    if not isinstance(decoder, nn.TransformerDecoder):
        raise TypeError(f"decoder: expected a TransformerDecoder, got {type(decoder).__name__}")
    own = TransformerDecoderLayer
    for layer in decoder.layers:
        blocks = isinstance(layer, own) and all(
            getattr(type(layer), n, 0) is getattr(own, n) for n in ("_sa_block", "_mha_block")
        )
        attentions = (getattr(layer, "self_attn", None), getattr(layer, "multihead_attn", None))
        if not blocks or any(type(x) is not MultiheadAttention for x in attentions):
            raise TypeError("decoder: expected saccade.nn.TransformerDecoderLayer; see saccade.accelerate")
        own_attention: Any = layer.self_attn
        memory_attention: Any = layer.multihead_attn
        _extras.refuse_extra_key("decoder", own_attention, memory_attention)
        if memory_attention._has_extras and (
            memory_attention.window is not None
            or getattr(memory_attention, "position_term", None) is not None
        ):
            raise ValueError("decoder: windows and positions of multihead_attn count rows that step has not")
    _check_eval(decoder)
    return list(decoder.layers)
