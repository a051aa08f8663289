// dK and dV: a block owns kBlockN keys of one key head and meets the queries of every head that reads them.
// The tile is held transposed, keys by queries, so that P and dS are left operands as they stand.
#pragma once
#include <type_traits>

#include "backward.h"

namespace saccade {

template <int kSize, bool kGeneralTerms>
struct KeysShape80 {
  static constexpr int kHeadDim = kSize;
  static constexpr bool kGeneral = kGeneralTerms;
  static constexpr int kBlockN = 64,
                       kBlockM = kHeadDim + (kGeneral ? 64 : 0) <= 128 ? 32 : 16;  // what registers allow
  // 256 columns of dK and dV are more than the registers of one warp: two share them, each with all weights.
  static constexpr int kParts = kHeadDim <= 128 ? 1 : 2, kColumns = kHeadDim / kParts;
  static constexpr int kThreads = kBlockN * 2 * kParts;
  static constexpr int kKeyBytes = kBlockN * kHeadDim * 2, kQueryBytes = kBlockM * kHeadDim * 2;
  static constexpr int kStage = 2 * kKeyBytes, kSharedBytes = kStage + 4 * kQueryBytes;
  static_assert(kSharedBytes <= 99 << 10, "the least shared memory of the devices it is for");
};

template <typename T, typename Shape>
SACCADE_KERNEL(Shape::kThreads, 1)
backward_keys_sm80(SACCADE_PARAM BackwardArgs args) {
  constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kHeadDim = Shape::kHeadDim;
  constexpr int kTiles = kBlockM / 8, kColumns = Shape::kColumns;
  constexpr bool kGeneral = Shape::kGeneral;
  const GradParams& p = args.p;
  const int64_t heads = block_index() / args.blocks;
  const int b = int(heads / p.heads_k), hk = int(heads % p.heads_k),
            j0 = int(block_index() % args.blocks) * kBlockN;
  QueryTiles<Shape> at(args, b, hk, j0);
  const int seqlen_k = at.head.seqlen_k;
  const int64_t k_begin = at.head.k_begin;
  if (j0 >= seqlen_k) return;

  const uint32_t keys = shared_memory(), values = keys + Shape::kKeyBytes;
  const auto queries_in = [&](int stage) {
    return keys + Shape::kStage + uint32_t(stage) * 2 * Shape::kQueryBytes;
  };
  const int head_dim = int(p.head_dim), head_dim_v = int(p.head_dim_v);
  const auto load_queries = [&](int stage) {
    const Head& x = at.head;
    const int row0 = at.m * kBlockM;
    load_rows<T, kBlockM, kHeadDim, Shape::kThreads>(queries_in(stage), rows_at<T>(p.q, x.b, x.h, x.q_begin),
                                                     p.q, row0, at.range.begin, at.range.end, head_dim,
                                                     args.aligned_q);
    load_rows<T, kBlockM, kHeadDim, Shape::kThreads>(
        queries_in(stage) + Shape::kQueryBytes, rows_at<T>(p.dout, x.b, x.h, x.q_begin), p.dout, row0,
        at.range.begin, at.range.end, head_dim_v, args.aligned_dout);
    copy_commit();
  };
  load_rows<T, kBlockN, kHeadDim, Shape::kThreads>(keys, rows_at<T>(p.k, b, hk, k_begin), p.k, j0, 0,
                                                   seqlen_k, head_dim, args.aligned_k);
  load_rows<T, kBlockN, kHeadDim, Shape::kThreads>(values, rows_at<T>(p.v, b, hk, k_begin), p.v, j0, 0,
                                                   seqlen_k, head_dim_v, args.aligned_v);
  copy_commit();
  if (at.valid()) load_queries(0);
  copy_wait<0>();
  sync_threads();

  const int l = thread_index() % 32, warp = thread_index() / 32;
  const int warp_row = warp % (kBlockN / 16) * 16, column0 = warp / (kBlockN / 16) * kColumns;
  const int j = j0 + warp_row + l / 4;  // and j + 8
  const uint64_t seed = kGeneral && args.terms.dropout ? seed_of(args) : 0;
  float dk[kColumns / 8][4] = {}, dv[kColumns / 8][4] = {};

  const auto step = [&](const QueryTile& tile, int stage, auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    Head x = at.head;
    x.h = tile.h;
    const int i0 = tile.m * kBlockM + l % 4 * 2;
    const Band band = at.band_of_tile(tile);
    int begin[2], end[2];
    for (int half = 0; kMasked && half < 2; ++half) {
      begin[half] = first_query(band, j + half * 8);
      end[half] = end_query(band, j + half * 8, x.seqlen_q);
    }
    float s[kTiles][4], dp[kTiles][4], slope[kTiles][4];
    multiply_rows<T, kHeadDim, kBlockM>(s, keys, warp_row, queries_in(stage));
    SACCADE_UNROLL
    for (int n = 0; n < kTiles; ++n)
      for (int e = 0; e < 4; ++e) {
        const int i = i0 + n * 8 + e % 2, key = j + e / 2 * 8;
        bool kept = !kMasked || (i >= begin[e / 2] && i < end[e / 2]);
        if (kGeneral) kept = kept && keeps_pair(p.mask, x.b, i, key);
        s[n][e] =
            kept ? pair_weight<kGeneral>(args, x, s[n][e], i, key, stats_of(args, x, i), slope[n][e]) : 0.0f;
      }
    uint32_t undropped = ~0u;
    if (kGeneral) {
      if (args.terms.dropout)
        undropped =
            undropped_entries<kTiles * 4>(seed, args.terms.threshold, x, [&](int e, int& i, int& key) {
              i = i0 + e / 4 * 8 + e % 2;
              key = j + e / 2 % 2 * 8;
            });
      SACCADE_UNROLL
      for (int n = 0; n < kTiles; ++n)
        for (int e = 0; e < 4; ++e) {
          dp[n][e] = undropped >> (4 * n + e) & 1 ? s[n][e] : 0;
          s[n][e] = s[n][e] == 0 ? 0 : s[n][e] * slope[n][e];  // all that dK still needs of it
        }
    }
    add_weighted<T, kHeadDim, kBlockM, kColumns>(dv, kGeneral ? dp : s,
                                                 queries_in(stage) + Shape::kQueryBytes, column0);
    multiply_rows<T, kHeadDim, kBlockM>(dp, values, warp_row, queries_in(stage) + Shape::kQueryBytes);
    SACCADE_UNROLL
    for (int n = 0; n < kTiles; ++n)
      for (int e = 0; e < 4; ++e) {
        const float delta = stats_of(args, x, i0 + n * 8 + e % 2).delta;
        const bool keep = undropped >> (4 * n + e) & 1;
        dp[n][e] = pair_gradient<kGeneral>(args.terms, s[n][e], dp[n][e], keep, delta);
      }
    add_weighted<T, kHeadDim, kBlockM, kColumns>(dk, dp, queries_in(stage), column0);
  };
  for (int stage = 0; at.valid(); stage ^= 1) {
    const QueryTile tile = at.tile();
    at.next();
    if (at.valid()) load_queries(stage ^ 1);
    if (!kGeneral && tile.whole)
      step(tile, stage, std::bool_constant<kGeneral>());
    else
      step(tile, stage, std::true_type());
    copy_wait<0>();
    sync_threads();
  }

  SACCADE_UNROLL
  for (int n = 0; n < kColumns / 8; ++n)
    for (int c = 0; c < 4; ++c) {
      dk[n][c] *= args.terms.unit;
      dv[n][c] *= args.terms.keep_scale;
    }
  if (p.dk.data)
    store_rows<T, kHeadDim, kColumns>(keys, dk, rows_at<T>(p.dk, b, hk, k_begin), p.dk, warp_row, column0, j0,
                                      seqlen_k, head_dim, args.aligned_dk);
  if (p.dv.data)
    store_rows<T, kHeadDim, kColumns>(values, dv, rows_at<T>(p.dv, b, hk, k_begin), p.dv, warp_row, column0,
                                      j0, seqlen_k, head_dim_v, args.aligned_dv);
}

}  // namespace saccade
