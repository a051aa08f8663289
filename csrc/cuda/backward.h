// What the backward kernels share. With P the weights, Z dropout's mask over 1 - p and dP = dO V^T:
// dV = (P Z)^T dO, dS = P (dP Z - delta), dQ = dS K, dK = dS^T Q (docs/numerics.md). Each gradient has a pass
// of its own, so that nothing is added atomically and results repeat bitwise.
#pragma once
#include "tile_sm80.h"

namespace saccade {

struct BackwardArgs {
  GradParams p;
  Terms terms;
  const int64_t* seed;  // on the device; null: p.seed
  float* rows;          // [3, row_count]: what stats_of reads, at row_of
  int64_t row_count, head_rows;
  int blocks;  // of the longest sequence
  bool aligned_q, aligned_k, aligned_v, aligned_dout, aligned_dq, aligned_dk, aligned_dv;
};

// Rows of the workspace: the queries of a sequence begin at a multiple of kRowPad and own the rows up to the
// next multiple, so that tiles of queries are aligned runs of it.
constexpr int kRowPad = 128;
SACCADE_DEVICE int64_t row_of(const BackwardArgs& args, const Head& x) {
  if (args.p.cu_seqlens_q)
    return x.h * args.head_rows + (x.q_begin + int64_t(x.b) * kRowPad) / kRowPad * kRowPad;
  return (x.b * args.p.heads + x.h) * args.head_rows;
}

// Of one query: lse as the sum of two numbers (one fp32 would lose the sum of logits near -1e9), in base 2 in
// the bare form; rowsum(dO * O) - dlse.
struct RowStats {
  float high, low, delta;
};
SACCADE_DEVICE RowStats stats_of(const BackwardArgs& args, const Head& x, int i) {
  if (i >= x.seqlen_q) return {kInfinity, 0, 0};  // weights of 0
  const float* at = args.rows + row_of(args, x) + i;
  return {load_global(at), load_global(at + args.row_count), load_global(at + 2 * args.row_count)};
}

// The weight of a pair before dropout; `slope` receives the logit's derivative by the product (in the bare
// form 1: the scale is applied to whole sums).
template <bool kGeneral>
SACCADE_DEVICE float pair_weight(const BackwardArgs& args, const Head& x, float product, int i, int j,
                                 const RowStats& row, float& slope) {
  const Terms& t = args.terms;
  slope = 1;
  if (!kGeneral || t.bare) return exp2_approx(fmaf(product, t.factor, -row.high) - (kGeneral ? row.low : 0));
  const float logit = logit_of(args.p, t, x, product, i, j, slope);
  return logit == -kInfinity ? 0 : exp2_approx(((logit - row.high) - row.low) * t.factor);
}
// The gradient of its logit. A weight of 0 has none, whatever stands in its key.
template <bool kGeneral>
SACCADE_DEVICE float pair_gradient(const Terms& t, float weight, float dproduct, bool undropped,
                                   float delta) {
  if (kGeneral && t.dropout) dproduct = undropped ? dproduct * t.keep_scale : 0;
  return weight == 0 ? 0 : weight * (dproduct - delta);
}

// Bit 4 n + 2 half + c: dropout keeps the pair that entry c of half `half` of 16 x 8 block n stands for.
// `place` gives query and key of such an entry. Rolled, since Philox is long.
template <int kEntries, typename PlaceOf>
SACCADE_DEVICE uint32_t undropped_entries(uint64_t seed, uint32_t threshold, const Head& x, PlaceOf place) {
  static_assert(kEntries <= 32, "a bit for each");
  uint32_t kept = 0;
  SACCADE_ROLLED
  for (int e = 0; e < kEntries; ++e) {
    int i, j;
    place(e, i, j);
    kept |= uint32_t(keeps_half(dropout_word(seed, x, i, j), j & 1, threshold)) << e;
  }
  return kept;
}

// A tile of queries of one head.
struct QueryTile {
  int h, m;
  int low, high;  // of the head's band, which otherwise is its sequence's
  bool whole;     // every pair is kept by the band
};

// Which tiles of queries a block of keys meets, head by head.
template <typename Shape>
struct QueryTiles {
  const BackwardArgs& args;
  Head head;  // the one the next tile belongs to
  int j0, last_head;
  Band band;
  TileRange range;
  int m;

  SACCADE_DEVICE_MEMBER QueryTiles(const BackwardArgs& all, int b, int hk, int first_key)
      : args(all), j0(first_key) {
    const int group = int(args.p.heads / args.p.heads_k);
    head = head_of(args.p, args.terms, b, hk * group);
    last_head = hk * group + group - 1;
    enter();
  }
  SACCADE_DEVICE_MEMBER void enter() {
    for (;; ++head.h) {
      band = band_of(args.p.mask, args.terms, head);
      const int key = anew(j0);
      range = query_tiles_of<Shape::kBlockM>(band, key, key + Shape::kBlockN, head.seqlen_q);
      m = range.first;
      if (m < range.last || head.h == last_head) return;
    }
  }
  SACCADE_DEVICE_MEMBER bool valid() const { return m < range.last; }
  SACCADE_DEVICE_MEMBER QueryTile tile() const {
    return {head.h, m, band.low, band.high, m >= range.full_first && m < range.full_last};
  }
  SACCADE_DEVICE_MEMBER Band band_of_tile(const QueryTile& tile) const {
    return {tile.low, tile.high, band.keys, band.shift, band.size, band.left};
  }
  SACCADE_DEVICE_MEMBER void next() {
    if (++m == range.last && head.h < last_head) {
      ++head.h;
      enter();
    }
  }
};

}  // namespace saccade
