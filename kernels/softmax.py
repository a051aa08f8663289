"""From logits to weights and back, for every activation; the online softmax and its end.

A tile's logits are in units: the natural logit is s * unit, where unit is the scale of a bare dot product and
1 otherwise, and exp(logit) = 2^(s * factor), factor = unit * log2(e). A pair that is not kept has s = -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mask import across

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SOFTMAX, RELU, SIGMOID, SOFTMAX1 = (tl.constexpr(n) for n in range(4))


@triton.jit
def online_softmax(peak, total, s, factor, S: tl.constexpr):
    """(peak, total, p, decay) after a tile s [M, N]; what was summed before is to be multiplied by decay."""
    new = tl.maximum(peak, tl.max(s, 1))
    # A row without a key so far has peak -inf, and -inf - -inf is NaN: give it a finite pivot.
    pivot = tl.where(new == float("-inf"), 0.0, new)
    if S.exact:
        p = tl.exp2((s - pivot[:, None]) * factor)
        decay = tl.exp2((peak - pivot) * factor)
    else:
        shift = pivot * factor
        p = tl.exp2(s * factor - shift[:, None])  # one fused multiply-add for each pair
        decay = tl.exp2(peak * factor - shift)
    return new, total * decay + tl.sum(p, 1), p, decay


@triton.jit
def row_lse(peak, total, unit):
    """lse in fp64, so that exp(s - lse) is as exact as s is; -inf where nothing was kept."""
    wide = peak.to(tl.float64) * unit + tl.log(tl.where(total == 0.0, 1.0, total).to(tl.float64))
    return tl.where(total == 0.0, float("-inf"), wide)


@triton.jit
def split_lse(lse, unit, S: tl.constexpr):
    """(high, low) of `weigh`, in the accumulator's dtype: lse = high * unit + low * ln 2, so that s - high is
    exact where it matters; where that is not asked for, high is lse * log2(e).
    """
    ACC: tl.constexpr = tl.float64 if S.wide else tl.float32
    finite = tl.where(lse == float("-inf"), 0.0, lse)
    if S.exact:
        high = (finite / unit).to(ACC)
        return high, ((finite - high.to(tl.float64) * unit) * LOG2E).to(ACC)
    else:
        high = (finite * LOG2E).to(ACC)
        return high, tl.zeros(high.shape, ACC)


@triton.jit
def weigh(s, high, low, factor, S: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The weights of a tile whose rows' lse is known; 0 where s is -inf."""
    if S.activation == RELU:
        return tl.maximum(s, 0.0)
    elif S.activation == SIGMOID:
        return 1.0 / (1.0 + tl.exp2(-s * factor))
    elif S.exact:
        return tl.exp2((s - across(high, TRANSPOSED)) * factor - across(low, TRANSPOSED))
    else:
        return tl.exp2(s * factor - across(high, TRANSPOSED))


@triton.jit
def logit_gradient(s, p, dp, delta, S: tl.constexpr, TRANSPOSED: tl.constexpr):
    """dL/ds of a tile from dL/dp; delta [M] is the row's sum of p * dp, minus dL/dlse."""
    if S.activation == RELU:
        return tl.where(s > 0.0, dp, 0.0)
    elif S.activation == SIGMOID:
        return p * (1.0 - p) * dp
    else:
        return p * (dp - across(delta, TRANSPOSED))
