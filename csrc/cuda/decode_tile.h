// What the decode body's kernels share: the rows of a tile, where keys lie, what becomes of a finished row.
#pragma once
#include "softmax.h"
#include "tile_sm80.h"
#include "vectors.h"

namespace saccade {

constexpr int kDecodeRows = 16;  // of a tile: row r is query r / group, query head r % group of the key head

template <int kHeadDim>
struct DecodeShape {
  static constexpr int kKeys = kHeadDim <= 64 ? 32 : 16;  // of a warp's tile
  static constexpr int kWarps = kHeadDim <= 128 ? 4 : 2, kThreads = kWarps * 32;
  static constexpr int kQueryBytes = kDecodeRows * kHeadDim * 2, kTileBytes = kKeys * kHeadDim * 2;
  static constexpr int kWarpBytes = 4 * kTileBytes;  // two stages of keys and of values
  static constexpr int kSharedBytes = kQueryBytes + kWarps * kWarpBytes;
  // A warp leaves its state where its tiles were: maxima, sums, then rows of kPitch numbers.
  static constexpr int kPitch = kHeadDim + 8;
  static_assert(2 * kDecodeRows * 4 + kDecodeRows * kPitch * 4 <= kWarpBytes, "a state fits");
  static_assert(kSharedBytes <= 99 << 10, "the least shared memory of the devices it is for");
};

struct DecodeArgs {
  Params p;
  Terms terms;
  const int64_t* seed;  // on the device; null: p.seed
  int group, row_tiles, splits;
  // With several splits: sums [tiles, splits, 16, kHeadDim], then maxima and sums [tiles, splits, 2, 16].
  float *sums, *peaks;
  bool aligned_q, aligned_k, aligned_v, aligned_out;
};

// ---- the rows of a tile ----

// Query i of one head; alive: there is one.
struct DecodeRow {
  Head x;
  int i;
  bool alive;
};
SACCADE_DEVICE DecodeRow decode_row(const DecodeArgs& args, int64_t tile, int r) {
  const Params& p = args.p;
  const int64_t heads = tile / args.row_tiles;
  const int b = int(heads / p.heads_k), hk = int(heads % p.heads_k);
  const int row = int(tile % args.row_tiles) * kDecodeRows + r;
  Head x{b, hk * args.group + row % args.group, hk, int(p.seqlen_q), int(p.seqlen_k), 0, 0};
  if (p.seqused_k)  // what lies beyond the cache cannot be read
    x.seqlen_k = int(most64(0, least64(load_global(p.seqused_k + b), p.seqlen_k)));
  return {x, row / args.group, row / args.group < x.seqlen_q};
}

// ---- where a key lies ----

struct Place {
  int outer, inner;  // page or cache row, and the key in it
};
SACCADE_DEVICE Place place_of(const Params& p, int b, int j) {
  if (p.page_table) {
    const int size = int(p.page_size);
    return {load_global(p.page_table + b * p.page_table_batch + j / size), j % size};
  }
  return {p.beam ? load_global(p.beam + b * p.beam_batch + j) : b, j};
}

// A warp's tile of keys [j0, j0 + kKeys) of one head, `base` its row 0; zero outside [begin, end) and beyond
// `dim`. Lane l has looked up the place of key j0 + l % kKeys.
template <typename T, int kKeys, int kHeadDim>
SACCADE_DEVICE void load_cached(uint32_t tile, const T* base, const Rows& x, Place mine, int j0, int begin,
                                int end, int dim, bool aligned) {
  constexpr int kChunks = kHeadDim / 8;
  const int l = thread_index() % 32;
  if (aligned) {
    SACCADE_UNROLL_BY_4
    for (int c = l; c < kKeys * kChunks; c += 32) {
      const int r = c / kChunks, column = c % kChunks * 8, left = least(8, dim - column);
      const int outer = shuffle(mine.outer, r), inner = shuffle(mine.inner, r);
      const bool inside = j0 + r >= begin && j0 + r < end && left > 0;
      copy_async(chunk_at<kHeadDim>(tile, r, c % kChunks),
                 inside ? base + outer * x.batch + inner * x.row + column : base, inside ? left * 2 : 0);
    }
    return;
  }
  SACCADE_ROLLED
  for (int e = l; e < kKeys * kHeadDim; e += 32) {
    const int r = e / kHeadDim, column = e % kHeadDim;
    const int outer = shuffle(mine.outer, r), inner = shuffle(mine.inner, r);
    const bool inside = j0 + r >= begin && j0 + r < end && column < dim;
    store_shared(
        chunk_at<kHeadDim>(tile, r, column / 8) + uint32_t(column % 8) * 2,
        inside ? load_global(base + outer * x.batch + inner * x.row + column * x.col) : from_float<T>(0.0f));
  }
}

// 0 x NaN is NaN: the values of keys that no row of the tile keeps become zero. Bit 2 t + c of `alive`:
// column 8 t + l % 4 * 2 + c has a row that keeps it.
template <int kKeys, int kHeadDim>
SACCADE_DEVICE void zero_dead_values(uint32_t alive, uint32_t values) {
  const int l = thread_index() % 32;
  for (int mask = 4; mask < 32; mask *= 2) alive |= shuffle_xor(alive, mask);
  constexpr int kChunks = kHeadDim / 8;
  SACCADE_ROLLED
  for (int c = l; c < kKeys * kChunks; c += 32) {
    const int j = c / kChunks;
    const uint32_t flags = shuffle(alive, j % 8 / 2);
    if (!(flags >> (j / 8 * 2 + j % 2) & 1))
      store_shared(chunk_at<kHeadDim>(values, j, c % kChunks), uint4{0, 0, 0, 0});
  }
  sync_warp();
}

// ---- results ----

// Columns of a whole row; column 0 brings lse along.
template <typename T>
SACCADE_DEVICE void finish_four(const DecodeArgs& args, const DecodeRow& row, int column, float top,
                                float total, const float4& x) {
  float scale;
  const double lse = finish_row(args.terms, top, total, sink_of(args.p, row.x.h), scale);
  if (column == 0) store_global(args.p.lse + lse_at(args.p, row.x) + row.i, lse);
  const Rows& out = args.p.out;
  store_four(rows_at<T>(out, row.x.b, row.x.h, row.i) + column * out.col, out.col,
             int(args.p.head_dim_v) - column, args.aligned_out, times(x, scale));
}

}  // namespace saccade
