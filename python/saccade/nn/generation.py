"""Search for a good output, token by token: greedy and beam search over anything that gives logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import int_at_least

# It gets the last token of every row, [rows, 1] int64, and gives the logits of the next, [rows, V].
Step = Callable[[Tensor], Tensor]


class Hypotheses(NamedTuple):
    """Outputs without BOS. Beyond a hypothesis' length, which does not count END, stands END."""

    tokens: Tensor  # [N, L] int64; of a beam search [N, beams, L], best first
    lengths: Tensor  # [N] or [N, beams] int64
    scores: Tensor  # [N] or [N, beams]: log-probability, END included, over the length penalty
    ended: Tensor  # [N] or [N, beams] bool: END came before max_len


def length_penalty(length: int, alpha: float) -> float:
    """((5 + length) / 6)^alpha, of a length that counts END (Wu et al., 1609.08144, equation 14)."""
    return ((5 + length) / 6) ** alpha


@torch.no_grad()
def greedy_search(
    step: Step,
    batch: int,
    *,
    bos: int,
    eos: int,
    max_len: int,
    alpha: float = 0.0,
    device: torch.device | str | None = None,
) -> Hypotheses:
    """The likeliest token at each step, for `batch` rows at once, until each has given END.

    Args:
        step: tokens [batch, 1] -> logits [batch, V] of what follows; it keeps its own state, such as a
            `DecoderState`. Rows that have ended are fed END.
        bos, eos: the tokens that begin and end a sentence.
        max_len: a row without END after so many tokens, END included, is left as it is.
        alpha: of the length penalty in `scores`.

    Returns `Hypotheses` of [batch, L]. Waits for the device at each step, to see whether all have ended.
    """
    int_at_least("max_len", max_len, 1)
    last = torch.full((batch, 1), bos, dtype=torch.int64, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    lengths = torch.zeros(batch, dtype=torch.int64, device=device)
    total: Tensor | None = None
    tokens = []
    for _ in range(max_len):
        logs = _log_probabilities(step(last), batch)
        best, chosen = logs.max(-1)
        best = best.masked_fill(ended, 0.0)
        total = best if total is None else total + best
        chosen = chosen.masked_fill(ended, eos)
        ended = ended | (chosen == eos)
        lengths += ~ended
        tokens.append(chosen)
        last = chosen[:, None]
        if bool(ended.all()):
            break
    assert total is not None
    counted = lengths + ended  # END counts
    return Hypotheses(torch.stack(tokens, 1), lengths, total / ((5 + counted) / 6) ** alpha, ended)


@torch.no_grad()
def beam_search(
    step: Step,
    reorder: Callable[[Tensor], None],
    batch: int,
    beams: int,
    *,
    bos: int,
    eos: int,
    max_len: int,
    alpha: float = 0.0,
    device: torch.device | str | None = None,
) -> Hypotheses:
    """The `beams` best outputs of each of `batch` sentences, all searched at once.

    Args:
        step: tokens [batch * beams, 1] -> logits [batch * beams, V]; the rows of a sentence lie together.
        reorder: called with rows [batch * beams] before each step but the first: row r goes on from what row
            `rows[r]` has seen (`DecoderState.reorder`).
        alpha: hypotheses are ranked by log-probability / `length_penalty`; 0 leaves it out.
        bos, eos, max_len: as in `greedy_search`.

    A hypothesis is finished when END is among the `beams` best continuations of its sentence; a sentence is
    done when `beams` are finished. With one beam this is greedy search. What has not ended at max_len ranks
    behind what has. Returns `Hypotheses` of [batch, beams, L], best first.
    """
    int_at_least("max_len", max_len, 1)
    int_at_least("beams", beams, 1)
    search = _Beams(batch, beams, eos, alpha, device)
    last = torch.full((batch * beams, 1), bos, dtype=torch.int64, device=device)
    for _ in range(max_len):
        parents, last = search.advance(_log_probabilities(step(last), batch * beams))
        if bool(search.done.all()) or search.length == max_len:
            break
        reorder(parents)
    return search.result()


def _log_probabilities(logits: Tensor, rows: int) -> Tensor:
    if logits.dim() == 3 and logits.shape[1] == 1:
        logits = logits[:, 0]
    if logits.dim() != 2 or logits.shape[0] != rows:
        raise ValueError(f"step: expected logits [{rows}, V], got {list(logits.shape)}")
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def _rows(tokens: Tensor, at: Tensor) -> Tensor:
    """[N, n, L] at [N, m]: [N, m, L]."""
    return tokens.gather(1, at[..., None].expand(-1, -1, tokens.shape[2]))


class _Beams:
    """The live hypotheses of a search, and the finished ones."""

    def __init__(self, batch: int, beams: int, eos: int, alpha: float, device: Any) -> None:
        self.batch, self.beams, self.eos, self.alpha = batch, beams, eos, alpha
        self.length = 0
        shape = (batch, beams)
        self.live = torch.zeros(*shape, 0, dtype=torch.int64, device=device)
        self.totals = torch.full(shape, -torch.inf, device=device)
        self.totals[:, 0] = 0.0  # the rows are alike as yet
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)
        none = torch.zeros(shape, dtype=torch.int64, device=device)
        self.pool = Hypotheses(self.live, none, torch.full_like(self.totals, -torch.inf), none.bool())

    def advance(self, logs: Tensor) -> tuple[Tensor, Tensor]:
        """One token more, of log-probabilities [rows, V]: the rows to go on from, and their tokens."""
        batch, beams, vocabulary = self.batch, self.beams, logs.shape[1]
        totals = (self.totals[..., None] + logs.view(batch, beams, vocabulary)).flatten(1)
        # Of 2 beams continuations at most half end: every hypothesis has one END.
        count = min(2 * beams, totals.shape[1])
        best, at = totals.topk(count)
        parent, token = at // vocabulary, at % vocabulary
        grown = torch.cat([_rows(self.live, parent), token[..., None]], -1)
        self.length += 1
        ends = token == self.eos
        self._finish(grown[:, :beams], best[:, :beams].masked_fill(~ends[:, :beams], -torch.inf))
        order = ends.to(torch.int8).sort(dim=-1, stable=True)[1][:, :beams]
        if order.shape[1] < beams:
            order = F.pad(order, (0, beams - order.shape[1]))
        alive = ~ends.gather(1, order)
        alive &= torch.arange(beams, device=alive.device) < count
        self.totals = best.gather(1, order).masked_fill(~alive, -torch.inf)
        self.live = _rows(grown, order)
        rows = torch.arange(batch, device=at.device)[:, None] * beams + parent.gather(1, order)
        return rows.flatten(), token.gather(1, order).view(-1, 1)

    def _finish(self, grown: Tensor, totals: Tensor) -> None:
        """Those with a finite total join the finished ones, unless their sentence is done."""
        new = totals.masked_fill(self.done[:, None], -torch.inf) / length_penalty(self.length, self.alpha)
        finite = new > -torch.inf
        both = torch.cat([self._held(), grown], 1)
        lengths = torch.cat([self.pool.lengths, torch.full_like(self.pool.lengths, self.length - 1)], 1)
        marks = torch.cat([self.pool.ended, finite], 1)
        kept, order = torch.cat([self.pool.scores, new], 1).sort(dim=-1, descending=True, stable=True)
        order = order[:, : self.beams]
        self.pool = Hypotheses(
            _rows(both, order), lengths.gather(1, order), kept[:, : self.beams], marks.gather(1, order)
        )
        self.done = self.pool.ended.all(-1)

    def _held(self) -> Tensor:
        """The finished ones' tokens, as long as the live ones."""
        tokens = self.pool.tokens
        return F.pad(tokens, (0, self.length - tokens.shape[2]), value=self.eos)

    def result(self) -> Hypotheses:
        """The finished ones, then as many of the live ones as there is room for."""
        pool, live = self.pool, self.live
        room = self.beams - pool.ended.sum(-1, keepdim=True)
        place = torch.arange(self.beams, device=live.device)
        order = self.totals.sort(dim=-1, descending=True, stable=True)[1]
        # Place p of the result takes live hypothesis p - (number finished).
        taken = order.gather(1, (place - (self.beams - room)).clamp(min=0))
        scores = self.totals.gather(1, taken) / length_penalty(self.length, self.alpha)
        return Hypotheses(
            torch.where(pool.ended[..., None], self._held(), _rows(live, taken)),
            torch.where(pool.ended, pool.lengths, self.length),
            torch.where(pool.ended, pool.scores, scores),
            pool.ended,
        )
