// The tiled body on mma.sync: a block owns kBlockM queries of one head and streams its keys through two
// stages of shared memory, from the last tile to the first. Serves every GPU from sm_80 on, 99 KB of shared
// memory included.
#pragma once
#include <type_traits>

#include "softmax.h"
#include "tile_sm80.h"

namespace saccade {

template <int kHeadDim>
struct ForwardShape80 {
  static constexpr int kBlockM = kHeadDim <= 64 ? 128 : 64;
  static constexpr int kBlockN = kHeadDim <= 128 ? 64 : 32;
  static constexpr int kThreads = kBlockM * 2;
  static constexpr int kQueryBytes = kBlockM * kHeadDim * 2, kTileBytes = kBlockN * kHeadDim * 2;
  static constexpr int kStage = kQueryBytes, kFlags = kStage + 4 * kTileBytes;
  static constexpr int kSharedBytes = kFlags + kThreads / 32 * 16;
  static_assert(kSharedBytes <= 99 << 10, "the least shared memory of the devices it is for");
};

template <typename T, int kHeadDim, bool kGeneral>
SACCADE_KERNEL(ForwardShape80<kHeadDim>::kThreads, 1)
forward_sm80(SACCADE_PARAM TiledArgs args) {
  using Shape = ForwardShape80<kHeadDim>;
  constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kTiles = kBlockN / 8;
  const Params& p = args.p;
  const int64_t heads = block_index() / args.blocks;
  const Head x = head_of(p, args.terms, int(heads / p.heads), int(heads % p.heads));
  // The last block, the longest of a causal mask, first.
  const int i0 = (args.blocks - 1 - int(block_index() % args.blocks)) * kBlockM;
  if (i0 >= x.seqlen_q) return;
  const Band band = band_of(p.mask, args.terms, x);
  const int i1 = least(i0 + kBlockM, x.seqlen_q);
  const TileRange range = tiles_of<kBlockN>(band, i0, i1);

  const uint32_t queries = shared_memory(), flags = queries + Shape::kFlags;
  const auto keys_in = [&](int n) {
    return queries + Shape::kStage + uint32_t(n & 1) * 2 * Shape::kTileBytes;
  };
  const T* q = rows_at<T>(p.q, x.b, x.h, x.q_begin);
  const T* k = rows_at<T>(p.k, x.b, x.hk, x.k_begin);
  const T* v = rows_at<T>(p.v, x.b, x.hk, x.k_begin);
  const int head_dim = int(p.head_dim), head_dim_v = int(p.head_dim_v);
  const auto load_keys = [&](int n) {
    load_rows<T, kBlockN, kHeadDim, Shape::kThreads>(keys_in(n), k, p.k, n * kBlockN, range.begin, range.end,
                                                     head_dim, args.aligned_k);
    load_rows<T, kBlockN, kHeadDim, Shape::kThreads>(keys_in(n) + Shape::kTileBytes, v, p.v, n * kBlockN,
                                                     range.begin, range.end, head_dim_v, args.aligned_v);
    copy_commit();
  };
  load_rows<T, kBlockM, kHeadDim, Shape::kThreads>(queries, q, p.q, i0, 0, x.seqlen_q, head_dim,
                                                   args.aligned_q);
  load_keys(most(range.last - 1, 0));
  copy_wait<0>();
  sync_threads();

  const int l = thread_index() % 32, warp_row = thread_index() / 32 * 16;
  int row[2], begin[2], end[2];
  for (int half = 0; half < 2; ++half) {
    row[half] = i0 + warp_row + l / 4 + half * 8;
    begin[half] = first_key(band, row[half]);
    end[half] = row[half] < x.seqlen_q ? end_key(band, row[half]) : 0;
  }
  const uint64_t seed = kGeneral && args.terms.dropout ? seed_of(args) : 0;
  const bool may_be_dead = kGeneral && args.terms.may_be_dead;
  RunningSoftmax softmax;
  float out[kHeadDim / 8][4] = {};

  const auto step = [&](int n, auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    if (n > range.first) load_keys(n - 1);
    float s[kTiles][4];
    multiply_rows<T, kHeadDim, kBlockN>(s, queries, warp_row, keys_in(n));
    uint32_t alive = 0;
    if (kMasked || kGeneral) {
      SACCADE_UNROLL
      for (int t = 0; t < kTiles; ++t)
        for (int c = 0; c < 4; ++c) {
          const int j = n * kBlockN + t * 8 + l % 4 * 2 + c % 2, i = row[c / 2];
          bool kept = !kMasked || (j >= begin[c / 2] && j < end[c / 2]);
          if (kGeneral) {
            kept = kept && i < x.seqlen_q && keeps_pair(p.mask, x.b, i, j);
            float slope;
            if (kept && !args.terms.bare) s[t][c] = logit_of(p, args.terms, x, s[t][c], i, j, slope);
          }
          if (!kept) s[t][c] = -kInfinity;
          if (kGeneral && s[t][c] != -kInfinity) alive |= 1u << (2 * t + c % 2);
        }
    }
    float rescale[2];
    softmax.weigh<kGeneral>(flat(s), args.terms.factor, rescale);
    SACCADE_UNROLL
    for (int d = 0; d < kHeadDim / 8; ++d)
      for (int c = 0; c < 4; ++c) out[d][c] *= rescale[c / 2];
    if (kGeneral && args.terms.dropout) {
      SACCADE_UNROLL
      for (int t = 0; t < kTiles; ++t)
        for (int half = 0; half < 2; ++half) {
          const uint32_t word = dropout_word(seed, x, row[half], n * kBlockN + t * 8 + l % 4 * 2);
          for (int c = 0; c < 2; ++c)
            if (!keeps_half(word, c, args.terms.threshold)) s[t][2 * half + c] = 0;
        }
    }
    if (may_be_dead)
      zero_dead_rows<kBlockN, kHeadDim, Shape::kThreads>(alive, flags, keys_in(n) + Shape::kTileBytes, 0);
    add_weighted<T, kHeadDim, kBlockN, kHeadDim>(out, s, keys_in(n) + Shape::kTileBytes, 0);
    copy_wait<0>();
    sync_threads();
  };
  for (int n = range.last - 1; n >= range.first; --n) {
    // Tiles that every row keeps whole are never tested. (The general form tests pairs anyway.)
    if (!kGeneral && n >= range.full_first && n < range.full_last)
      step(n, std::bool_constant<kGeneral>());
    else
      step(n, std::true_type());
  }

  for (int half = 0; half < 2; ++half) {
    float scale;
    const double lse = softmax.finish(args.terms, sink_of(p, x.h), half, scale);
    if (l % 4 == 0 && row[half] < x.seqlen_q) store_global(p.lse + lse_at(p, x) + row[half], lse);
    SACCADE_UNROLL
    for (int d = 0; d < kHeadDim / 8; ++d)
      for (int c = 2 * half; c < 2 * half + 2; ++c) out[d][c] *= scale;
  }
  store_rows<T, kHeadDim, kHeadDim>(queries, out, rows_at<T>(p.out, x.b, x.h, x.q_begin), p.out, warp_row, 0,
                                    i0, x.seqlen_q, head_dim_v, args.aligned_out);
}

}  // namespace saccade
