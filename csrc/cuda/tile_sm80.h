// Tiles of the sm_80 kernels: 16-bit rows in shared memory under an XOR swizzle, moved by cp.async, read by
// ldmatrix, multiplied by mma.sync m16n8k16. A warp owns 16 rows; of a 16 x 8 block of sums, lane l holds
// rows l / 4 and l / 4 + 8, columns l % 4 * 2 and the next.
#pragma once
#include "tile.h"

namespace saccade {

// 16-byte chunk `chunk` of a row; eight rows of one chunk lie in eight different banks.
template <int kHeadDim>
SACCADE_DEVICE uint32_t chunk_at(uint32_t tile, int row, int chunk) {
  constexpr int kChunks = kHeadDim / 8;
  const int twist = kChunks >= 8 ? row & 7 : row >> 1 & 3;
  return tile + uint32_t(row) * (kHeadDim * 2) + uint32_t(chunk ^ twist) * 16;
}

// Rows [row0, row0 + kRows) of `x`, whose row 0 is at `base`; zero outside [begin, end) and beyond `dim`.
template <typename T, int kRows, int kHeadDim, int kThreads>
SACCADE_DEVICE void load_rows(uint32_t tile, const T* base, const Rows& x, int row0, int begin, int end,
                              int dim, bool aligned) {
  constexpr int kChunks = kHeadDim / 8;
  if (aligned) {
    SACCADE_UNROLL_BY(4)
    for (int c = thread_index(); c < kRows * kChunks; c += kThreads) {
      const int r = c / kChunks, column = c % kChunks * 8, row = row0 + r, left = least(8, dim - column);
      const bool inside = row >= begin && row < end && left > 0;
      copy_async(chunk_at<kHeadDim>(tile, r, c % kChunks), inside ? base + row * x.row + column : base,
                 inside ? left * 2 : 0);
    }
    return;
  }
  SACCADE_ROLLED
  for (int e = thread_index(); e < kRows * kHeadDim; e += kThreads) {
    const int r = e / kHeadDim, column = e % kHeadDim, row = row0 + r;
    const bool inside = row >= begin && row < end && column < dim;
    store_shared(chunk_at<kHeadDim>(tile, r, column / 8) + uint32_t(column % 8) * 2,
                 inside ? load_global(base + row * x.row + column * x.col) : from_float<T>(0.0f));
  }
}

// Sums of a warp's 16 rows, as mma leaves them, to rows of `x` through the warp's rows of a tile.
template <typename T, int kHeadDim, int kColumns>
SACCADE_DEVICE void store_rows(uint32_t tile, const float (&sums)[kColumns / 8][4], T* base, const Rows& x,
                               int warp_row, int column0, int row0, int end, int dim, bool aligned) {
  const int l = thread_index() % 32;
  SACCADE_UNROLL
  for (int n = 0; n < kColumns / 8; ++n)
    for (int half = 0; half < 2; ++half)
      store_shared(
          chunk_at<kHeadDim>(tile, warp_row + l / 4 + half * 8, column0 / 8 + n) + uint32_t(l % 4) * 4,
          pack<T>(sums[n][2 * half], sums[n][2 * half + 1]));
  sync_warp();
  constexpr int kChunks = kColumns / 8;
  SACCADE_ROLLED
  for (int c = l; c < 16 * kChunks; c += 32) {
    const int r = warp_row + c / kChunks, row = row0 + r, column = column0 + c % kChunks * 8;
    if (row >= end || column >= dim) continue;
    const uint32_t from = chunk_at<kHeadDim>(tile, r, column / 8);
    T* to = base + row * x.row + column * x.col;
    if (aligned && column + 8 <= dim) {
      store_global(reinterpret_cast<uint4*>(to), load_shared<uint4>(from));
      continue;
    }
    SACCADE_ROLLED
    for (int i = 0; i < 8 && column + i < dim; ++i)
      store_global(to + i * x.col, load_shared<T>(from + uint32_t(i) * 2));
  }
}

// ---- fragments ----

// Rows [row0, row0 + 16), columns [16 k, 16 k + 16) as the left operand.
template <int kHeadDim>
SACCADE_DEVICE void load_left(uint32_t tile, int row0, int k, uint32_t (&a)[4]) {
  const int l = thread_index() % 32;
  load_matrix_x4<false>(chunk_at<kHeadDim>(tile, row0 + l % 16, 2 * k + l / 16), a);
}
// Rows [row0, row0 + 16) as 16 columns of the right operand, depth [16 k, 16 k + 16).
template <int kHeadDim>
SACCADE_DEVICE void load_right(uint32_t tile, int row0, int k, uint32_t (&b)[4]) {
  const int l = thread_index() % 32;
  load_matrix_x4<false>(chunk_at<kHeadDim>(tile, row0 + l / 16 * 8 + l % 8, 2 * k + l / 8 % 2), b);
}
// Rows [row0, row0 + 16) as the depth of the right operand, columns [column0, column0 + 16).
template <int kHeadDim>
SACCADE_DEVICE void load_right_transposed(uint32_t tile, int row0, int column0, uint32_t (&b)[4]) {
  const int l = thread_index() % 32;
  load_matrix_x4<true>(chunk_at<kHeadDim>(tile, row0 + l % 16, column0 / 8 + l / 16), b);
}

// ---- products ----

// s[16 x kN] = A B^T over head_dim; A: a warp's rows of tile `a`, B: rows [0, kN) of tile `b`.
template <typename T, int kHeadDim, int kN>
SACCADE_DEVICE void multiply_rows(float (&s)[kN / 8][4], uint32_t a, int row0, uint32_t b) {
  SACCADE_UNROLL
  for (int n = 0; n < kN / 8; ++n)
    for (int i = 0; i < 4; ++i) s[n][i] = 0;
  SACCADE_UNROLL_BY(4)
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t left[4];
    load_left<kHeadDim>(a, row0, k, left);
    SACCADE_UNROLL
    for (int n = 0; n < kN / 16; ++n) {
      uint32_t right[4];
      load_right<kHeadDim>(b, n * 16, k, right);
      mma_16x8x16<T>(s[2 * n], left, right[0], right[1]);
      mma_16x8x16<T>(s[2 * n + 1], left, right[2], right[3]);
    }
  }
}

// A 16 x kN block of sums, rounded, is a left operand as it stands.
template <typename T, int kN>
SACCADE_DEVICE void left_from_sums(const float (&s)[kN / 8][4], uint32_t (&a)[kN / 16][4]) {
  SACCADE_UNROLL
  for (int k = 0; k < kN / 16; ++k) {
    a[k][0] = pack<T>(s[2 * k][0], s[2 * k][1]);
    a[k][1] = pack<T>(s[2 * k][2], s[2 * k][3]);
    a[k][2] = pack<T>(s[2 * k + 1][0], s[2 * k + 1][1]);
    a[k][3] = pack<T>(s[2 * k + 1][2], s[2 * k + 1][3]);
  }
}

// sums[16 x kColumns] += P X; P: 16 x kN from registers, X: rows [0, kN), columns from column0 on, of a tile.
template <typename T, int kHeadDim, int kN, int kColumns>
SACCADE_DEVICE void add_weighted(float (&sums)[kColumns / 8][4], const float (&p)[kN / 8][4], uint32_t tile,
                                 int column0) {
  uint32_t left[kN / 16][4];
  left_from_sums<T, kN>(p, left);
  SACCADE_UNROLL
  for (int k = 0; k < kN / 16; ++k) {
    SACCADE_UNROLL
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t right[4];
      load_right_transposed<kHeadDim>(tile, k * 16, column0 + n * 16, right);
      mma_16x8x16<T>(sums[2 * n], left[k], right[0], right[1]);
      mma_16x8x16<T>(sums[2 * n + 1], left[k], right[2], right[3]);
    }
  }
}

// ---- rows that nobody keeps ----

// 0 x NaN is NaN: what stands in a key that no row of the block keeps must be gone before it is multiplied,
// even by 0. `alive` has bit 2 n + c where some row of this thread keeps column n * 8 + l % 4 * 2 + c. Zeroes
// the other rows of the tiles; `flags` is room for four words of each warp. Ends with all threads in step.
template <int kN, int kHeadDim, int kThreads>
SACCADE_DEVICE void zero_dead_rows(uint32_t alive, uint32_t flags, uint32_t tile0, uint32_t tile1) {
  static_assert(kN / 4 <= 32, "a bit for each of a thread's columns");
  const int t = thread_index(), l = t % 32;
  for (int mask = 4; mask < 32; mask *= 2) alive |= shuffle_xor(alive, mask);
  if (l < 4) store_shared(flags + uint32_t(t / 32 * 4 + l) * 4, alive);
  sync_threads();
  constexpr int kChunks = kHeadDim / 8;
  SACCADE_ROLLED
  for (int c = t; c < kN * kChunks; c += kThreads) {
    const int row = c / kChunks;
    uint32_t any = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp)
      any |= load_shared<uint32_t>(flags + uint32_t(warp * 4 + row % 8 / 2) * 4);
    if (any >> (row / 8 * 2 + row % 2) & 1) continue;
    store_shared(chunk_at<kHeadDim>(tile0, row, c % kChunks), uint4{0, 0, 0, 0});
    if (tile1) store_shared(chunk_at<kHeadDim>(tile1, row, c % kChunks), uint4{0, 0, 0, 0});
  }
  sync_threads();
}

}  // namespace saccade
