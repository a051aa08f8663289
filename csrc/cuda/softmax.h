// The online softmax of the tiled and decode kernels (docs/numerics.md).
#pragma once
#include "tile.h"

namespace saccade {

// A warp's 16 x 8 blocks of sums as one array: entry 4 n + 2 half + c is row l / 4 + 8 half, column
// 8 n + l % 4 * 2 + c. wgmma leaves its sums in the same places.
template <int kBlocks>
SACCADE_DEVICE float (&flat(float (&s)[kBlocks][4]))
    [kBlocks * 4] { return reinterpret_cast<float (&)[kBlocks * 4]>(s); }

// From a row's maximum and sum, and the sink, to its lse; `scale` receives what its output is multiplied by.
SACCADE_DEVICE double finish_row(const Terms& t, float top, float total, float sink, float& scale) {
  // With the factor as it was used.
  double highest = top == -kInfinity ? -double(kInfinity) : double(top) * t.factor * kLn2;
  float mine = 1;
  if (t.sink) {
    const double pivot = highest > sink ? highest : double(sink);
    const bool none = pivot == -double(kInfinity);
    mine = none ? 0.0f : exp2_approx(float((highest - pivot) / kLn2));
    total = total * mine + (none ? 0.0f : exp2_approx(float((sink - pivot) / kLn2)));
    highest = pivot;
  }
  scale = total == 0 ? 0.0f : mine * t.keep_scale / total;
  return total == 0 ? -double(kInfinity) : highest + double(logf(total));
}

// The running maximum and sum of a thread's two rows.
struct RunningSoftmax {
  float top[2] = {-kInfinity, -kInfinity}, sum[2] = {0, 0};

  // Turns logits into weights; `rescale` receives what earlier weights are to be multiplied by. In the bare
  // form the maximum is folded into one multiply-add; logits with a bias may be so large that only their
  // difference may be multiplied.
  template <bool kGeneral, int kCount>
  SACCADE_DEVICE_MEMBER void weigh(float (&s)[kCount], float factor, float (&rescale)[2]) {
    SACCADE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float best = top[half];
      SACCADE_UNROLL
      for (int n = 2 * half; n < kCount; n += 4) best = fmaxf(best, fmaxf(s[n], s[n + 1]));
      best = fmaxf(best, shuffle_xor(best, 1));
      best = fmaxf(best, shuffle_xor(best, 2));
      const float pivot = best == -kInfinity ? 0.0f : best;  // -inf - -inf is NaN
      const float folded = pivot * factor;
      rescale[half] = exp2_approx((top[half] - pivot) * factor);
      top[half] = best;
      float added = 0;
      SACCADE_UNROLL
      for (int n = 2 * half; n < kCount; n += 4)
        for (int c = n; c < n + 2; ++c) {
          s[c] = exp2_approx(kGeneral ? (s[c] - pivot) * factor : fmaf(s[c], factor, -folded));
          added += s[c];
        }
      sum[half] = sum[half] * rescale[half] + added;
    }
  }

  // Joins the sums of the four lanes of a row, and finishes it.
  SACCADE_DEVICE_MEMBER double finish(const Terms& t, float sink, int half, float& scale) {
    float total = sum[half];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    return finish_row(t, top[half], total, sink, scale);
  }
};

}  // namespace saccade
