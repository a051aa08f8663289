// C[m][n] (+)= sum_k A(m, k) B[k][n]: the one product of every tile. The sum starts from zero and joins C at
// its end, so that rounding grows with the length of a tile and the number of tiles, not with their product.
// The lanes run along n, A is broadcast, so A may have any strides and needs no packing; B and C are rows of
// whole vectors.
#pragma once
#include "vec.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// Accumulators fill the register file: rows x vectors, plus the vectors of B and one broadcast.
#if defined(__AVX512F__)
constexpr int kBlockVectors = 4;
constexpr int kBlockRows[5] = {0, 14, 12, 8, 6};
#elif defined(__AVX2__) || !defined(__aarch64__)
constexpr int kBlockVectors = 2;
constexpr int kBlockRows[3] = {0, 8, 5};
#else
constexpr int kBlockVectors = 4;
constexpr int kBlockRows[5] = {0, 14, 12, 8, 6};
#endif

// Where an operand that is broadcast lies: element (m, k) at p[m * row + k * col].
template <typename T>
struct Broadcast {
  const T* p;
  int64_t row, col;
};

template <typename T, int M, int NV, bool Add>
static void gemm_block(int64_t K, const T* __restrict__ a, int64_t a_row, int64_t a_col,
                       const T* __restrict__ b, int64_t ldb, T* __restrict__ c, int64_t ldc) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[M][NV];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[m][n] = Vec<T>{};
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> bv[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) bv[n] = load(b + n * L);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec<T> av = splat<T>(a[m * a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[m][n] += av * bv[n];
    }
    a += a_col;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      T* to = c + m * ldc + n * L;
      store(to, Add ? load(to) + acc[m][n] : acc[m][n]);
    }
}

template <typename T, int M, int NV, bool Add>
static void gemm_tail(int64_t m, int64_t K, Broadcast<T> a, const T* b, int64_t ldb, T* c, int64_t ldc) {
  if constexpr (M > 0) {
    if (m == M)
      gemm_block<T, M, NV, Add>(K, a.p, a.row, a.col, b, ldb, c, ldc);
    else
      gemm_tail<T, M - 1, NV, Add>(m, K, a, b, ldb, c, ldc);
  }
}

template <typename T, int NV, bool Add>
static void gemm_panel(int64_t M, int64_t K, Broadcast<T> a, const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int R = kBlockRows[NV];
  int64_t m = 0;
  for (; m + R <= M; m += R)
    gemm_block<T, R, NV, Add>(K, a.p + m * a.row, a.row, a.col, b, ldb, c + m * ldc, ldc);
  gemm_tail<T, R - 1, NV, Add>(M - m, K, {a.p + m * a.row, a.row, a.col}, b, ldb, c + m * ldc, ldc);
}

template <typename T, int NV, bool Add>
static void gemm_last(int64_t nv, int64_t M, int64_t K, Broadcast<T> a, const T* b, int64_t ldb, T* c,
                      int64_t ldc) {
  if constexpr (NV > 0) {
    if (nv == NV)
      gemm_panel<T, NV, Add>(M, K, a, b, ldb, c, ldc);
    else
      gemm_last<T, NV - 1, Add>(nv, M, K, a, b, ldb, c, ldc);
  }
}

// N is a multiple of kLanes<T>.
template <bool Add, typename T>
static void gemm(int64_t M, int64_t N, int64_t K, Broadcast<T> a, const T* b, int64_t ldb, T* c,
                 int64_t ldc) {
  constexpr int64_t W = kBlockVectors * kLanes<T>;
  int64_t n = 0;
  for (; n + W <= N; n += W) gemm_panel<T, kBlockVectors, Add>(M, K, a, b + n, ldb, c + n, ldc);
  gemm_last<T, kBlockVectors - 1, Add>((N - n) / kLanes<T>, M, K, a, b + n, ldb, c + n, ldc);
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
