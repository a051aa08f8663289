"""Whether a provider's results are right: the tests' yardstick, on the very inputs that are timed.

Large cases do not fit in fp64 at once, so one head is recomputed a block of query rows at a time, from the
`Mask.keep` that defines the mask everywhere. `exact` is that in fp64, `plain` the same in the case's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from saccade.dropout import dropout_mask
from saccade.masks import Mask
from saccade.testing import assert_no_worse_than
from torch import Tensor

from .cases import FORWARD, Case
from .peers import SEED, Inputs

_BLOCK_ENTRIES = 1 << 19  # pairs of one block of rows
_BLOCK_ENTRIES_CUDA = 1 << 23
_CHECKED_PAIRS = 1 << 22  # of all heads together, where one head has fewer
_CHECKED_PLACES = 8


@dataclass(frozen=True)
class Slice:
    """What one (batch entry, head) sees, as leaves: q [Sq, D], k [Sk, D], v [Sk, Dv], bias [Sq, Sk]."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    keep: Tensor | None  # pairs that dropout keeps
    dropout_p: float
    mask: Mask | None
    place: tuple[int, int]  # batch entry, head
    reach: tuple[int, int]  # query i keeps no key before i + reach[0] or after i + reach[1]

    def to(self, dtype: torch.dtype) -> Slice:
        tensors = [
            None if x is None else x.detach().to(dtype).requires_grad_()
            for x in (self.q, self.k, self.v, self.bias)
        ]
        q, k, v, bias = tensors
        assert q is not None and k is not None and v is not None
        return Slice(q, k, v, bias, self.keep, self.dropout_p, self.mask, self.place, self.reach)

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.bias) if x is not None]


def _rows(s: Slice, start: int, stop: int) -> Tensor:
    """The output of query rows start to stop, in the slice's dtype; keys that none reaches are left out."""
    seqlen_q, seqlen_k = s.q.shape[0], s.k.shape[0]
    first, last = max(0, start + s.reach[0]), max(1, min(seqlen_k, stop + s.reach[1]))
    first = min(first, last - 1)
    logits = s.q[start:stop] @ s.k[first:last].T * s.q.shape[1] ** -0.5
    if s.bias is not None:
        logits = logits + s.bias[start:stop, first:last]
    kept = torch.ones_like(logits, dtype=torch.bool)
    i = torch.arange(start, stop, device=s.q.device)[:, None]
    j = torch.arange(first, last, device=s.q.device)[None]
    for part in s.mask.parts if s.mask is not None else ():
        kept = kept & part.keep(*s.place, i, j, seqlen_q, seqlen_k)
    if s.mask is not None:
        logits = logits.masked_fill(~kept, -math.inf)
    weights = torch.softmax(logits, -1)
    if s.mask is not None:
        weights = torch.where(kept.any(-1, keepdim=True), weights, 0.0)
    if s.keep is not None:
        weights = torch.where(s.keep[start:stop, first:last], weights / (1 - s.dropout_p), 0.0)
    return weights @ s.v[first:last]


def results(s: Slice, cotangent: Tensor | None) -> list[Tensor]:
    """The output [Sq, Dv], and with a cotangent the gradients of the slice's leaves."""
    step = max(1, (_BLOCK_ENTRIES_CUDA if s.k.is_cuda else _BLOCK_ENTRIES) // s.k.shape[0])
    outs, grads = [], [torch.zeros_like(x) for x in s.leaves()]
    for start in range(0, s.q.shape[0], step):
        stop = min(start + step, s.q.shape[0])
        with torch.set_grad_enabled(cotangent is not None):
            out = _rows(s, start, stop)
        outs.append(out.detach())
        if cotangent is not None:
            found = torch.autograd.grad(out, s.leaves(), cotangent[start:stop].to(out.dtype))
            for total, grad in zip(grads, found, strict=True):
                total += grad
    return [torch.cat(outs), *(grads if cotangent is not None else [])]


NAMES = ("out", "gradient of q", "gradient of k", "gradient of v", "gradient of the bias")


def compare(got: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> str:
    """Empty when every result is within the yardstick, else what is wrong."""
    for name, *triple in zip(NAMES, got, plain, exact, strict=False):
        try:
            assert_no_worse_than(*triple, factor=2.0 if name == "out" else 3.0, name=name)
        except AssertionError as error:
            return str(error)
    return ""


def of_inputs(inputs: Inputs, place: tuple[int, int], dtype: torch.dtype, train: bool) -> list[Tensor]:
    """Results for batch entry and key head `place` = (b, hk), over the G query heads that read it.

    They are out [G, Sq, Dv], then the gradients of q [G, Sq, D], k [Sk, D], v [Sk, Dv] and bias [G, Sq, Sk],
    that of the bias for this batch entry alone.
    """
    case, (b, hk) = inputs.case, place
    group = case.heads // case.heads_k
    per_head = []
    for h in range(hk * group, (hk + 1) * group):
        keep = None
        if case.dropout_p:
            shape = (b + 1, h + 1, case.seqlen_q, case.seqlen_k)
            keep = dropout_mask(SEED, case.dropout_p, *shape)[b, h].to(inputs.q.device)
        bias = None if inputs.bias is None else inputs.bias[0, h]
        tensors = (inputs.q[b, h], inputs.k[b, hk], inputs.v[b, hk], bias, keep)
        one = Slice(*tensors, case.dropout_p, inputs.mask, (b, h), case.bounds())
        per_head.append(results(one.to(dtype), inputs.dout[b, h] if train else None))
    out, *grads = (list(x) for x in zip(*per_head, strict=True))
    found = [torch.stack(out)]
    for n, parts in enumerate(grads):
        found.append(sum(parts[1:], parts[0]) if n in (1, 2) else torch.stack(parts))
    return found


def at_place(got: Sequence[Tensor], case: Case, place: tuple[int, int]) -> list[Tensor]:
    """The same part of a provider's results."""
    b, hk = place
    group = case.heads // case.heads_k
    heads = slice(hk * group, (hk + 1) * group)
    picks = ((b, heads), (b, heads), (b, hk), (b, hk), (0, heads))
    return [x[pick] for x, pick in zip(got, picks, strict=False)]


class Oracle:
    """The exact and the plain results of a case, computed once and compared with every provider's."""

    def __init__(self, inputs: Inputs) -> None:
        case = self._case = inputs.case
        train = case.directions != (FORWARD,)
        self._places = places(case)
        self._plain, self._exact = (
            _joined([of_inputs(inputs, place, dtype, train) for place in self._places])
            for dtype in (inputs.q.dtype, torch.float64)
        )

    def fault(self, got: Sequence[Tensor]) -> str:
        """Empty when the results (forward: out alone) are within the yardstick, else what is wrong."""
        if self._case.batch > 1:
            got = got[:4]  # the batch entries share the gradient of the bias
        mine = _joined([at_place(got, self._case, place) for place in self._places])
        return compare(mine, self._plain, self._exact)


def places(case: Case) -> list[tuple[int, int]]:
    """The (batch entry, key head) that are recomputed: as many as are cheap, from the last to the first."""
    if case.dropout_p:
        return [(0, 0)]  # the pattern of the others is slow to write down
    pairs = case.seqlen_q * case.seqlen_k * case.heads // case.heads_k
    wanted = max(1, min(_CHECKED_PAIRS // pairs, _CHECKED_PLACES, case.batch * case.heads_k))
    flat = torch.linspace(case.batch * case.heads_k - 1, 0, wanted).long().tolist()
    return [divmod(n, case.heads_k) for n in flat]


def _joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The results of all places one behind the other: the yardstick looks at the largest error of all."""
    return [torch.cat([x.flatten() for x in same]) for same in zip(*parts, strict=True)]
