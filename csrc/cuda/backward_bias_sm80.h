// The gradient of a bias of any broadcast shape. A block owns a tile of dbias and sums what every pair that
// reads it contributes, over batch, heads, queries or keys where the bias has size 1, in a fixed order; the
// tiles of logits are formed once more for it.
#pragma once
#include "backward.h"

namespace saccade {

template <int kSize>
struct BiasShape80 {
  static constexpr int kHeadDim = kSize;
  static constexpr int kBlockM = 64, kBlockN = kHeadDim <= 128 ? 64 : 32, kThreads = kBlockM * 2;
  static constexpr int kQueryBytes = kBlockM * kHeadDim * 2, kTileBytes = kBlockN * kHeadDim * 2;
  static constexpr int kSums = 2 * kQueryBytes + 2 * kTileBytes,
                       kSharedBytes = kSums + kThreads / 32 * kBlockN * 4;
  static_assert(kSharedBytes <= 99 << 10, "the least shared memory of the devices it is for");
};

// The tiles of one dimension that a block sums over: one of them, or all where the bias has size 1.
struct Extent {
  int begin, end;
};
SACCADE_DEVICE Extent extent_of(int64_t& index, int64_t size, int count) {
  if (size == 1) return {0, count};
  const int at = int(index % count);
  index /= count;
  return {at, at + 1};
}

template <typename T, typename Shape>
SACCADE_KERNEL(Shape::kThreads, 1)
backward_bias_sm80(SACCADE_PARAM BackwardArgs args) {
  constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kHeadDim = Shape::kHeadDim,
                kTiles = kBlockN / 8;
  const GradParams& p = args.p;
  const int seqlen_q = int(p.seqlen_q), seqlen_k = int(p.seqlen_k);
  int64_t index = block_index();
  const Extent ns = extent_of(index, p.dbias_size[3], (seqlen_k + kBlockN - 1) / kBlockN);
  const Extent ms = extent_of(index, p.dbias_size[2], (seqlen_q + kBlockM - 1) / kBlockM);
  const Extent hs = extent_of(index, p.dbias_size[1], int(p.heads));
  const Extent bs = extent_of(index, p.dbias_size[0], int(p.batch));

  const uint32_t queries = shared_memory(), douts = queries + Shape::kQueryBytes;
  const uint32_t keys = douts + Shape::kQueryBytes, values = keys + Shape::kTileBytes,
                 sums = queries + Shape::kSums;
  const int l = thread_index() % 32, warp = thread_index() / 32, row0 = warp * 16 + l / 4;
  const uint64_t seed = args.terms.dropout ? seed_of(args) : 0;
  float sum[kTiles][4] = {};

  const auto add_tile = [&](const Head& x, const Band& band, const TileRange& range, int m, int n) {
    sync_threads();  // nobody reads the tiles before any more
    load_rows<T, kBlockM, kHeadDim, Shape::kThreads>(queries, rows_at<T>(p.q, x.b, x.h, 0), p.q, m * kBlockM,
                                                     0, seqlen_q, int(p.head_dim), args.aligned_q);
    load_rows<T, kBlockM, kHeadDim, Shape::kThreads>(douts, rows_at<T>(p.dout, x.b, x.h, 0), p.dout,
                                                     m * kBlockM, 0, seqlen_q, int(p.head_dim_v),
                                                     args.aligned_dout);
    load_rows<T, kBlockN, kHeadDim, Shape::kThreads>(keys, rows_at<T>(p.k, x.b, x.hk, 0), p.k, n * kBlockN,
                                                     range.begin, range.end, int(p.head_dim), args.aligned_k);
    load_rows<T, kBlockN, kHeadDim, Shape::kThreads>(values, rows_at<T>(p.v, x.b, x.hk, 0), p.v, n * kBlockN,
                                                     range.begin, range.end, int(p.head_dim_v),
                                                     args.aligned_v);
    copy_commit();
    copy_wait<0>();
    sync_threads();
    const int i = m * kBlockM + row0, j0 = n * kBlockN + l % 4 * 2;
    const RowStats row[2] = {stats_of(args, x, i), stats_of(args, x, i + 8)};
    const int begin[2] = {first_key(band, i), first_key(band, i + 8)};
    const int end[2] = {i < seqlen_q ? end_key(band, i) : 0, i + 8 < seqlen_q ? end_key(band, i + 8) : 0};
    float s[kTiles][4], dp[kTiles][4];
    multiply_rows<T, kHeadDim, kBlockN>(s, queries, warp * 16, keys);
    multiply_rows<T, kHeadDim, kBlockN>(dp, douts, warp * 16, values);
    uint32_t undropped = ~0u;
    if (args.terms.dropout)
      undropped =
          undropped_entries<kTiles * 4>(seed, args.terms.threshold, x, [&](int e, int& query, int& key) {
            query = i + e / 2 % 2 * 8;
            key = j0 + e / 4 * 8 + e % 2;
          });
    SACCADE_UNROLL
    for (int t = 0; t < kTiles; ++t)
      for (int e = 0; e < 4; ++e) {
        const int query = i + e / 2 * 8, key = j0 + t * 8 + e % 2;
        const bool kept = key >= begin[e / 2] && key < end[e / 2] && keeps_pair(p.mask, x.b, query, key);
        float slope, weight = 0;
        if (kept) weight = pair_weight<true>(args, x, s[t][e], query, key, row[e / 2], slope);
        const bool keep = undropped >> (4 * t + e) & 1;
        sum[t][e] += pair_gradient<true>(args.terms, weight, dp[t][e], keep, row[e / 2].delta);
      }
  };
  for (int b = bs.begin; b < bs.end; ++b)
    for (int h = hs.begin; h < hs.end; ++h) {
      const Head x = head_of(p, args.terms, b, h);
      const Band band = band_of(p.mask, args.terms, x);
      for (int m = ms.begin; m < ms.end; ++m) {
        const TileRange range = tiles_of<kBlockN>(band, m * kBlockM, least((m + 1) * kBlockM, seqlen_q));
        for (int n = most(ns.begin, range.first); n < least(ns.end, range.last); ++n)
          add_tile(x, band, range, m, n);
      }
    }

  const bool one_row = p.dbias_size[2] == 1, one_column = p.dbias_size[3] == 1;
  if (one_column) {
    for (int half = 0; half < 2; ++half) {
      float total = 0;
      SACCADE_UNROLL
      for (int t = 0; t < kTiles; ++t) total += sum[t][2 * half] + sum[t][2 * half + 1];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      sum[0][2 * half] = total;
    }
  }
  if (one_row) {
    SACCADE_UNROLL
    for (int t = 0; t < kTiles; ++t)
      for (int c = 0; c < 2; ++c) {
        float total = sum[t][c] + sum[t][2 + c];
        for (int mask = 4; mask < 32; mask *= 2) total += shuffle_xor(total, mask);
        if (l < 4) store_shared(sums + uint32_t(warp * kBlockN + t * 8 + l * 2 + c) * 4, total);
      }
    sync_threads();
    for (int c = thread_index(); c < kBlockN; c += Shape::kThreads) {
      float total = 0;
      for (int w = 0; w < Shape::kThreads / 32; ++w)
        total += load_shared<float>(sums + uint32_t(w * kBlockN + c) * 4);
      store_shared(sums + uint32_t(c) * 4, total);  // of warp 0's row only this thread reads
    }
    sync_threads();
  }
  // Who owns an element writes it: all rows or the first, all columns or the first.
  const int64_t b = p.dbias_size[0] == 1 ? 0 : bs.begin, h = p.dbias_size[1] == 1 ? 0 : hs.begin;
  float* to = static_cast<float*>(p.dbias) + (b * p.dbias_size[1] + h) * p.dbias_size[2] * p.dbias_size[3];
  SACCADE_UNROLL
  for (int t = 0; t < kTiles; ++t)
    for (int e = 0; e < 4; ++e) {
      const int row = row0 + e / 2 * 8, column = t * 8 + l % 4 * 2 + e % 2;
      const int i = one_row ? row : ms.begin * kBlockM + row,
                j = one_column ? column : ns.begin * kBlockN + column;
      if (i < p.dbias_size[2] && j < p.dbias_size[3])
        store_global(to + i * p.dbias_size[3] + j,
                     one_row ? load_shared<float>(sums + uint32_t(column) * 4) : sum[t][e]);
    }
}

}  // namespace saccade
