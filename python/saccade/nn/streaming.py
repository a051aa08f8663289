"""Encoders that read their input in pieces: a state as large as their reach, whatever came before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Chunks, KeyPadding
from . import _extras
from ._core import BATCH_FIRST, Options, attend
from ._masks import join
from ._projections import project, project_out
from .attention import MultiheadAttention
from .conformer import ConformerConvolution, ConformerLayer
from .transformer_layers import TransformerEncoderLayer, has_own_block

Piece = tuple[Tensor, Tensor]  # frames [N, T, E], and which of them are real, bool [N, T]


class EncoderStream:
    """Runs an encoder over pieces of a sequence; what comes out, joined, equals `encoder(whole sequence)`.

    Each layer keeps the keys and values that later frames can still see, and the frames that wait for what
    they see ahead. So a step costs the same however much came before, and each layer that looks ahead, by
    attention or by convolution, delays the output by that much.

    Args:
        encoder: a `TransformerEncoder` of our layers (batch_first) whose `windows` have a left bound, or a
            `Conformer`, in eval mode. Without a left bound (nor chunks) all keys are kept.
        chunks: `saccade.Chunks(size, left)`, the mask the encoder is called with offline. Frames then come
            out when their chunk is complete.

    ```python
    stream = saccade.nn.EncoderStream(encoder)
    out = torch.cat([*(stream.push(piece) for piece in pieces), stream.finish()], 1)
    ```

    Runs without gradients. Raises TypeError and ValueError by the argument's name.
    """

    def __init__(self, encoder: nn.Module, chunks: Chunks | None = None) -> None:
        if encoder.training:
            raise ValueError("encoder: expected eval mode; dropout and batch statistics know no stream")
        if chunks is not None and not isinstance(chunks, Chunks):
            raise TypeError(f"chunks: expected saccade.Chunks, got {type(chunks).__name__}")
        self._norm = getattr(encoder, "norm", None)
        layers: Any = getattr(encoder, "layers", None)
        if layers is None:
            raise TypeError(
                f"encoder: expected a TransformerEncoder or Conformer, got {type(encoder).__name__}"
            )
        self._parts: list[Any] = []
        for layer in layers:
            self._parts += _parts(layer, chunks)
        self._last: Piece | None = None
        self._ended = False

    def push(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """The next frames `x` [N, T, E]; the frames [N, T', E] that are ready, T' from 0 on.

        `valid` bool [N, T]: which are real, where the sequences of a batch end at different places (offline:
        the padding mask). Results at others mean nothing.
        """
        if x.dim() != 3:
            raise ValueError(f"x: expected shape [N, T, E], got {list(x.shape)}")
        if self._ended:
            raise ValueError("push: the stream is at its end; begin another")
        before = None if self._last is None else self._last[0]
        if before is not None and (x.shape[0], x.shape[2]) != (before.shape[0], before.shape[2]):
            raise ValueError(f"x: expected [{before.shape[0]}, T, {before.shape[2]}], got {list(x.shape)}")
        if valid is None:
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        elif valid.dtype == torch.bool and valid.shape == x.shape[:2]:
            for part in self._parts:
                part.padded = True
        if valid.dtype != torch.bool or valid.shape != x.shape[:2]:
            raise ValueError(
                f"valid: expected bool {list(x.shape[:2])}, got {valid.dtype} {list(valid.shape)}"
            )
        out = self._through((x, valid), False)
        self._last = (x, valid)
        return out

    def finish(self) -> Tensor:
        """The frames that still waited [N, T', E]; after this the stream is at its end."""
        if self._last is None:
            raise ValueError("finish: nothing was pushed")
        if self._ended:
            raise ValueError("finish: the stream is at its end")
        self._ended = True
        x, valid = self._last
        return self._through((x[:, :0], valid[:, :0]), True)

    @torch.no_grad()
    def _through(self, piece: Piece, final: bool) -> Tensor:
        for part in self._parts:
            piece = part.push(*piece, final)
        return piece[0] if self._norm is None else self._norm(piece[0])


def _parts(layer: nn.Module, chunks: Chunks | None) -> list[Any]:
    """A layer as parts that each take and give frames."""
    if isinstance(layer, ConformerLayer):
        return [
            _Pointwise(layer.feed1, None, None, 0.5),
            _Attention(layer.self_attn, chunks, layer.norm, None),
            _Convolution(layer.convolution),
            _Pointwise(layer.feed2, None, layer.norm_out, 0.5),
        ]
    if isinstance(layer, TransformerEncoderLayer) and has_own_block(layer):
        attention: Any = layer.self_attn
        if type(attention) is MultiheadAttention and attention.batch_first:
            one, two, block = layer.norm1, layer.norm2, layer._ff_block
            if layer.norm_first:
                return [_Attention(attention, chunks, one, None), _Pointwise(block, two, None)]
            return [_Attention(attention, chunks, None, one), _Pointwise(block, None, two)]
    raise TypeError(f"encoder: expected batch_first layers of saccade.nn, got {type(layer).__name__}")


class _Pointwise:
    """x + factor * block(before(x)), then `after`: every frame by itself."""

    padded = False

    def __init__(self, block: Any, before: Any, after: Any, factor: float = 1.0) -> None:
        self.block, self.before, self.after, self.factor = block, before, after, factor

    def push(self, x: Tensor, valid: Tensor, final: bool) -> Piece:
        y = self.block(x if self.before is None else self.before(x))
        x = torch.add(x, y, alpha=self.factor)
        return x if self.after is None else self.after(x), valid


class _Attention:
    """x + attention(before(x)), then `after`, over what has been seen; frames wait for those they see."""

    padded = False

    def __init__(self, module: Any, chunks: Chunks | None, before: Any, after: Any) -> None:
        _extras.refuse_extra_key("encoder", module)
        self.module, self.chunks, self.before, self.after = module, chunks, before, after
        window = _extras.get_window(module)
        self.left = None if window is None or window.left is None else _most(window.left)
        unbounded = window is not None and window.right is None
        self.right = 0 if window is None or window.right is None else _most(window.right)
        if chunks is None and (window is None or unbounded):
            raise ValueError(
                "encoder: every frame sees the end of the sequence; give its layers a window with a right "
                "bound, or chunks"
            )
        self.window = window
        self.held: list[Tensor] = []  # x, valid, q of the waiting frames; k, v, valid of the keys
        self.start, self.end = 0, 0  # the first waiting frame and the end of what was seen
        self.first = 0  # the first key

    def push(self, x: Tensor, valid: Tensor, final: bool) -> Piece:
        y = x if self.before is None else self.before(x)
        new = [x, valid, *project(self.module, y, y, y), valid]
        self.held = [torch.cat(pair, 1) for pair in zip(self.held, new, strict=True)] if self.held else new
        self.end += x.shape[1]
        ready = self._ready(final)
        count = ready - self.start
        x, valid, q, k, v, real = self.held
        if count:
            out = self._attend(q, k, v, real, count, ready)
            out = x[:, :count] + out
            out = out if self.after is None else self.after(out)
        else:
            out = x[:, :0]
        self._forget(ready, count)
        return out, valid[:, :count]

    def _ready(self, final: bool) -> int:
        """The end of the frames that have seen all they may see."""
        if final:
            return self.end
        end = self.end
        if self.window is not None and self.window.right is not None:
            end = end - self.right
        if self.chunks is not None:
            end = min(end, self.end // self.chunks.size * self.chunks.size)
        return max(end, self.start)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, count: int, ready: int) -> Tensor:
        # Queries end where the keys do, so that windows, chunks and positions count as they do offline: those
        # that are not ready yet are computed and dropped.
        module = self.module
        qkv = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        chunks = self.chunks
        mask = join(self.window, None if chunks is None else Chunks(chunks.size, chunks.left, align="end"))
        terms = _extras.terms(module, q.shape[1], k.shape[1])
        out, _ = attend(
            qkv, BATCH_FIRST, Options(False, False, 0.0, terms),
            mask=join(mask, KeyPadding(keep=real) if self.padded else None),
        )  # fmt: skip
        return project_out(module, out.transpose(1, 2)[:, :count])

    def _forget(self, ready: int, count: int) -> None:
        """Drops what no later frame sees."""
        first = self.first
        if self.left is not None:
            first = max(first, ready - self.left)
        if self.chunks is not None:
            # From the beginning of a chunk on, so that the keys' numbers keep their chunks.
            size = self.chunks.size
            in_reach = max(0, ready // size - self.chunks.left) * size
            first = max(first, in_reach) // size * size
        drop = first - self.first
        self.held = [x[:, count:] for x in self.held[:3]] + [x[:, drop:] for x in self.held[3:]]
        self.first, self.start = first, ready


def _most(bound: Any) -> int:
    return int(bound.max()) if isinstance(bound, Tensor) else bound


class _Convolution:
    """x + convolution(x): a line of frames of the kernel's reach."""

    padded = False

    def __init__(self, module: ConformerConvolution) -> None:
        self.module = module
        self.held: list[Tensor] = []  # x and valid of the waiting frames
        self.line: Tensor | None = None  # what the depthwise convolution reads, `before` frames more

    def push(self, x: Tensor, valid: Tensor, final: bool) -> Piece:
        module = self.module
        new = module.enter(x, valid)
        zeros = new.new_zeros(new.shape[0], module.before, new.shape[2])
        self.line = torch.cat([zeros if self.line is None else self.line, new], 1)
        self.held = (
            [torch.cat(p, 1) for p in zip(self.held, (x, valid), strict=True)] if self.held else [x, valid]
        )
        line = self.line
        if final:
            line = torch.cat([line, line.new_zeros(line.shape[0], module.after, line.shape[2])], 1)
        count = max(line.shape[1] - module.before - module.after, 0)
        x, valid = self.held
        out = x[:, :count]
        if count:
            out = out + module.leave(line, valid[:, :count])
        self.held = [y[:, count:] for y in self.held]
        self.line = line[:, count:]
        return out, valid[:, :count]
