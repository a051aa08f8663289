// dQ: a block owns kBlockM queries of one head and streams its keys, as the forward body does.
#pragma once
#include <type_traits>

#include "backward.h"

namespace saccade {

template <int kSize>
struct QueriesShape80 {
  static constexpr int kHeadDim = kSize;
  static constexpr int kBlockM = 64, kBlockN = kHeadDim <= 128 ? 64 : 16, kThreads = kBlockM * 2;
  static constexpr int kQueryBytes = kBlockM * kHeadDim * 2, kTileBytes = kBlockN * kHeadDim * 2;
  static constexpr int kStage = 2 * kQueryBytes, kFlags = kStage + 4 * kTileBytes;
  static constexpr int kSharedBytes = kFlags + kThreads / 32 * 16;
  static_assert(kSharedBytes <= 99 << 10, "the least shared memory of the devices it is for");
};

template <typename T, typename Shape, bool kGeneral>
SACCADE_KERNEL(Shape::kThreads, 1)
backward_queries_sm80(SACCADE_PARAM BackwardArgs args) {
  constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kHeadDim = Shape::kHeadDim,
                kTiles = kBlockN / 8;
  const GradParams& p = args.p;
  const int64_t heads = block_index() / args.blocks;
  const Head x = head_of(p, args.terms, int(heads / p.heads), int(heads % p.heads));
  const int i0 = (args.blocks - 1 - int(block_index() % args.blocks)) * kBlockM;
  if (i0 >= x.seqlen_q) return;
  const Band band = band_of(p.mask, args.terms, x);
  const TileRange range = tiles_of<kBlockN>(band, i0, least(i0 + kBlockM, x.seqlen_q));

  const uint32_t queries = shared_memory(), douts = queries + Shape::kQueryBytes,
                 flags = queries + Shape::kFlags;
  const auto keys_in = [&](int n) {
    return queries + Shape::kStage + uint32_t(n & 1) * 2 * Shape::kTileBytes;
  };
  const int head_dim = int(p.head_dim), head_dim_v = int(p.head_dim_v);
  const auto load_keys = [&](int n) {
    load_rows<T, kBlockN, kHeadDim, Shape::kThreads>(keys_in(n), rows_at<T>(p.k, x.b, x.hk, x.k_begin), p.k,
                                                     n * kBlockN, range.begin, range.end, head_dim,
                                                     args.aligned_k);
    load_rows<T, kBlockN, kHeadDim, Shape::kThreads>(keys_in(n) + Shape::kTileBytes,
                                                     rows_at<T>(p.v, x.b, x.hk, x.k_begin), p.v, n * kBlockN,
                                                     range.begin, range.end, head_dim_v, args.aligned_v);
    copy_commit();
  };
  load_rows<T, kBlockM, kHeadDim, Shape::kThreads>(queries, rows_at<T>(p.q, x.b, x.h, x.q_begin), p.q, i0, 0,
                                                   x.seqlen_q, head_dim, args.aligned_q);
  load_rows<T, kBlockM, kHeadDim, Shape::kThreads>(douts, rows_at<T>(p.dout, x.b, x.h, x.q_begin), p.dout, i0,
                                                   0, x.seqlen_q, head_dim_v, args.aligned_dout);
  load_keys(most(range.last - 1, 0));
  copy_wait<0>();
  sync_threads();

  const int l = thread_index() % 32, warp_row = thread_index() / 32 * 16,
            i = i0 + warp_row + l / 4;  // and i + 8
  const RowStats row[2] = {stats_of(args, x, i), stats_of(args, x, i + 8)};
  const uint64_t seed = kGeneral && args.terms.dropout ? seed_of(args) : 0;
  const bool may_be_dead = kGeneral && args.terms.may_be_dead;
  float dq[kHeadDim / 8][4] = {};

  const auto step = [&](int n, auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    if (n > range.first) load_keys(n - 1);
    const int j0 = n * kBlockN + l % 4 * 2;
    float s[kTiles][4], dp[kTiles][4];
    multiply_rows<T, kHeadDim, kBlockN>(s, queries, warp_row, keys_in(n));
    multiply_rows<T, kHeadDim, kBlockN>(dp, douts, warp_row, keys_in(n) + Shape::kTileBytes);
    int begin[2], end[2];
    for (int half = 0; kMasked && half < 2; ++half) {
      begin[half] = first_key(band, i + half * 8);
      end[half] = i + half * 8 < x.seqlen_q ? end_key(band, i + half * 8) : 0;
    }
    uint32_t alive = 0, undropped = ~0u;
    if (kGeneral && args.terms.dropout)
      undropped =
          undropped_entries<kTiles * 4>(seed, args.terms.threshold, x, [&](int e, int& query, int& key) {
            query = i + e / 2 % 2 * 8;
            key = j0 + e / 4 * 8 + e % 2;
          });
    SACCADE_UNROLL
    for (int t = 0; t < kTiles; ++t)
      for (int e = 0; e < 4; ++e) {
        const int query = i + e / 2 * 8, key = j0 + t * 8 + e % 2;
        bool kept = !kMasked || (key >= begin[e / 2] && key < end[e / 2]);
        if (kGeneral) kept = kept && keeps_pair(p.mask, x.b, query, key);
        float slope = 0, weight = 0;
        if (kept) weight = pair_weight<kGeneral>(args, x, s[t][e], query, key, row[e / 2], slope);
        const bool keep = undropped >> (4 * t + e) & 1;
        dp[t][e] = pair_gradient<kGeneral>(args.terms, weight, dp[t][e], keep, row[e / 2].delta);
        if (kGeneral) dp[t][e] = weight == 0 ? 0.0f : dp[t][e] * slope;
        if (kGeneral && weight != 0) alive |= 1u << (2 * t + e % 2);
      }
    if (may_be_dead) zero_dead_rows<kBlockN, kHeadDim, Shape::kThreads>(alive, flags, keys_in(n), 0);
    add_weighted<T, kHeadDim, kBlockN, kHeadDim>(dq, dp, keys_in(n), 0);
    copy_wait<0>();
    sync_threads();
  };
  for (int n = range.last - 1; n >= range.first; --n) {
    if (!kGeneral && n >= range.full_first && n < range.full_last)
      step(n, std::bool_constant<kGeneral>());
    else
      step(n, std::true_type());
  }

  SACCADE_UNROLL
  for (int d = 0; d < kHeadDim / 8; ++d)
    for (int e = 0; e < 4; ++e) dq[d][e] *= args.terms.unit;
  store_rows<T, kHeadDim, kHeadDim>(queries, dq, rows_at<T>(p.dq, x.b, x.h, x.q_begin), p.dq, warp_row, 0, i0,
                                    x.seqlen_q, head_dim, args.aligned_dq);
}

}  // namespace saccade
