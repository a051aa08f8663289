// What the decode body's kernels share: the rows of a tile, where keys lie, what becomes of a finished row.
#pragma once
#include "softmax.h"
#include "tile_sm80.h"
#include "vectors.h"

namespace saccade {

constexpr int kDecodeRows = 16;  // of a tile: row r is query r / group, query head r % group of the key head

template <typename T, int kHeadDim>
struct DecodeShape {
  static constexpr int kKeys = (kHeadDim <= 64 ? 32 : 16) / (sizeof(T) == 4 ? 2 : 1);  // of a warp's tile
  static constexpr int kWarps = kHeadDim <= 128 ? 4 : 2, kThreads = kWarps * 32;
  static constexpr int kQueryBytes = kDecodeRows * kHeadDim * int(sizeof(T)),
                       kTileBytes = kKeys * kHeadDim * int(sizeof(T));
  static constexpr int kWarpBytes = 4 * kTileBytes;  // two stages of keys and of values
  static constexpr int kSharedBytes = kQueryBytes + kWarps * kWarpBytes;
  // A warp leaves its state where its tiles were: maxima, sums, then rows of kPitch numbers.
  static constexpr int kPitch = kHeadDim + 8;
  static_assert(2 * kDecodeRows * 4 + kDecodeRows * kPitch * 4 <= kWarpBytes, "a state fits");
  static_assert(kSharedBytes <= 99 << 10, "the least shared memory of the devices it is for");
};

// A row of a tile in 16-bit numbers, as chunk_at counts them.
template <typename T, int kHeadDim>
constexpr int kWidth = kHeadDim * int(sizeof(T)) / 2;

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
  constexpr int kMany = kVector<T>, kChunks = kHeadDim / kMany;
  const int l = thread_index() % 32;
  if (aligned) {
    SACCADE_UNROLL_BY(4)
    for (int c = l; c < kKeys * kChunks; c += 32) {
      const int r = c / kChunks, column = c % kChunks * kMany, left = least(kMany, dim - column);
      const int outer = shuffle(mine.outer, r), inner = shuffle(mine.inner, r);
      const bool inside = j0 + r >= begin && j0 + r < end && left > 0;
      copy_async(chunk_at<kWidth<T, kHeadDim>>(tile, r, c % kChunks),
                 inside ? base + outer * x.batch + inner * x.row + column : base,
                 inside ? left * int(sizeof(T)) : 0);
    }
    return;
  }
  SACCADE_ROLLED
  for (int e = l; e < kKeys * kHeadDim; e += 32) {
    const int r = e / kHeadDim, column = e % kHeadDim;
    const int outer = shuffle(mine.outer, r), inner = shuffle(mine.inner, r);
    const bool inside = j0 + r >= begin && j0 + r < end && column < dim;
    store_shared(
        chunk_at<kWidth<T, kHeadDim>>(tile, r, column / kMany) + uint32_t(column % kMany * sizeof(T)),
        inside ? load_global(base + outer * x.batch + inner * x.row + column * x.col) : from_float<T>(0.0f));
  }
}

// 0 x NaN is NaN: the values of keys that no row of the tile keeps become zero. Bit 2 t + c of `alive`:
// column 8 t + l % 4 * 2 + c has a row that keeps it.
template <int kKeys, int kColumns>
SACCADE_DEVICE void zero_dead_values(uint32_t alive, uint32_t values) {
  const int l = thread_index() % 32;
  for (int mask = 4; mask < 32; mask *= 2) alive |= shuffle_xor(alive, mask);
  constexpr int kChunks = kColumns / 8;
  SACCADE_ROLLED
  for (int c = l; c < kKeys * kChunks; c += 32) {
    const int j = c / kChunks;
    const uint32_t flags = shuffle(alive, j % 8 / 2);
    if (!(flags >> (j / 8 * 2 + j % 2) & 1))
      store_shared(chunk_at<kColumns>(values, j, c % kChunks), uint4{0, 0, 0, 0});
  }
  sync_warp();
}

// ---- fp32: exact products, their sums in the places where mma leaves its own. Unless `many`, only the first
// eight rows of the tile count. ----

// In four chains, whose error is that of a quarter of the columns.
SACCADE_DEVICE void add_products(float4& sum, const float4& x, const float4& y) {
  sum = {fmaf(x.x, y.x, sum.x), fmaf(x.y, y.y, sum.y), fmaf(x.z, y.z, sum.z), fmaf(x.w, y.w, sum.w)};
}
template <int kHeadDim, int kKeys>
SACCADE_DEVICE void multiply_exactly(float (&s)[kKeys / 8][4], uint32_t queries, uint32_t keys, bool many) {
  constexpr int kColumns = 2 * kHeadDim;
  const int l = thread_index() % 32;
  float4 sums[kKeys / 8][4];
  SACCADE_UNROLL
  for (int n = 0; n < kKeys / 8; ++n)
    for (int c = 0; c < 4; ++c) sums[n][c] = {0, 0, 0, 0};
  SACCADE_UNROLL_BY(kHeadDim <= 128 ? 4 : 1)  // at 256 the output takes half of the registers
  for (int d = 0; d < kHeadDim / 4; ++d) {
    const float4 low = load_shared<float4>(chunk_at<kColumns>(queries, l / 4, d)),
                 high = load_shared<float4>(chunk_at<kColumns>(queries, l / 4 + 8, d));
    SACCADE_UNROLL
    for (int n = 0; n < kKeys / 8; ++n)
      for (int c = 0; c < 2; ++c) {
        const float4 key = load_shared<float4>(chunk_at<kColumns>(keys, n * 8 + l % 4 * 2 + c, d));
        add_products(sums[n][c], low, key);
        if (many) add_products(sums[n][2 + c], high, key);
      }
  }
  SACCADE_UNROLL
  for (int n = 0; n < kKeys / 8; ++n)
    for (int c = 0; c < 4; ++c) s[n][c] = (sums[n][c].x + sums[n][c].y) + (sums[n][c].z + sums[n][c].w);
}
// sums += weights times values. The four lanes of a row have its weights.
template <int kHeadDim, int kKeys>
SACCADE_DEVICE void add_exactly(float (&sums)[kHeadDim / 8][4], const float (&weights)[kKeys / 8][4],
                                uint32_t values, bool many) {
  const int l = thread_index() % 32;
  SACCADE_UNROLL
  for (int n = 0; n < kKeys / 8; ++n)
    SACCADE_ROLLED  // or the values of all keys would be loaded ahead, and registers spilled
        for (int c = 0; c < 8; ++c) {
      const int j = n * 8 + c, lane = l / 4 * 4 + c / 2;
      const float low = shuffle(c % 2 ? weights[n][1] : weights[n][0], lane),
                  high = shuffle(c % 2 ? weights[n][3] : weights[n][2], lane);
      SACCADE_UNROLL
      for (int d = 0; d < kHeadDim / 8; ++d) {
        const float2 value =
            load_shared<float2>(chunk_at<2 * kHeadDim>(values, j, 2 * d + l % 4 / 2) + uint32_t(l % 2) * 8);
        sums[d][0] = fmaf(low, value.x, sums[d][0]);
        sums[d][1] = fmaf(low, value.y, sums[d][1]);
        if (many) sums[d][2] = fmaf(high, value.x, sums[d][2]);
        if (many) sums[d][3] = fmaf(high, value.y, sums[d][3]);
      }
    }
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
