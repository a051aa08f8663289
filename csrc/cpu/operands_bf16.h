// How tiles become operands of a bf16 product with fp32 sums: A is rows [m][k] with k contiguous, B holds
// pairs of k next to each other
// ([k/2][n][2], what AMX and AVX512-BF16 both want). Twin of operands.h. The portable build emulates the
// product in plain C++, so that packing, padding and the kernels around it are tested on any processor.
#pragma once
#include "rows.h"

#if defined(SACCADE_ISA_AMX) || defined(SACCADE_ISA_AVX512BF16)
#include <immintrin.h>
#endif

namespace saccade {
namespace SACCADE_ISA {
namespace {

#if defined(SACCADE_ISA_AVX512BF16)
constexpr int64_t kDepthStep = 2, kRowStep = 1;  // k comes in pairs
#else
constexpr int64_t kDepthStep = 32, kRowStep = 16;  // one AMX tile
#endif

SACCADE_FORCE int64_t whole(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

struct RowsBf16 {
  const bf16* p;
  int64_t ld;
};
struct PairsBf16 {
  const bf16* p;
  int64_t ld;  // n
};

#if defined(SACCADE_ISA_AMX)

// The compiler's tile intrinsics do not say what memory they read: everything stored before must be in memory
// when they run.
SACCADE_FORCE void settle(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// Tile registers 0..3 accumulate 32 x 32, 4 and 5 hold A, 6 and 7 hold B. The configuration lives as long as
// a work item.
struct TileScope {
  TileScope() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.bytes[t] = 64, config.rows[t] = 16;
    settle(&config);
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};

template <bool Add, int MT, int NT>
static void amx_block(int64_t K, RowsBf16 a, PairsBf16 b, float* c, int64_t ldc) {
  const int64_t c_bytes = ldc * 4, a_bytes = a.ld * 2, b_bytes = b.ld * 4;
  if constexpr (Add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (NT > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (MT > 1) _tile_loadd(2, c + 16 * ldc, c_bytes);
    if constexpr (MT > 1 && NT > 1) _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += 32) {
    _tile_loadd(4, a.p + k, a_bytes);
    _tile_loadd(6, b.p + k * b.ld, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (NT > 1) {
      _tile_loadd(7, b.p + k * b.ld + 32, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (MT > 1) {
      _tile_loadd(5, a.p + 16 * a.ld + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (NT > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (NT > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (MT > 1) _tile_stored(2, c + 16 * ldc, c_bytes);
  if constexpr (MT > 1 && NT > 1) _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

template <bool Add>
static void product_bf16(int64_t M, int64_t N, int64_t K, RowsBf16 a, PairsBf16 b, float* c, int64_t ldc) {
  settle(b.p);
  for (int64_t n = 0; n < N; n += 32) {
    const bool wide = N - n > 16;
    for (int64_t m = 0; m < M; m += 32) {
      const RowsBf16 am{a.p + m * a.ld, a.ld};
      const PairsBf16 bn{b.p + 2 * n, b.ld};
      float* cm = c + m * ldc + n;
      if (M - m > 16)
        wide ? amx_block<Add, 2, 2>(K, am, bn, cm, ldc) : amx_block<Add, 2, 1>(K, am, bn, cm, ldc);
      else
        wide ? amx_block<Add, 1, 2>(K, am, bn, cm, ldc) : amx_block<Add, 1, 1>(K, am, bn, cm, ldc);
    }
  }
  settle(c);
}

#elif defined(SACCADE_ISA_AVX512BF16)

struct TileScope {
  TileScope() {}
};

template <bool Add, int MR, int NV>
static void dot_block(int64_t K, const bf16* __restrict__ a, int64_t lda, const bf16* __restrict__ b,
                      int64_t ldb, float* __restrict__ c, int64_t ldc) {
  __m512 acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[m][n] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 2) {
    __m512bh bv[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) bv[n] = (__m512bh)_mm512_loadu_si512(b + k * ldb + 32 * n);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      int32_t pair;
      memcpy(&pair, a + m * lda + k, 4);
      const __m512bh av = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], av, bv[n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      float* to = c + m * ldc + 16 * n;
      _mm512_storeu_ps(to, Add ? _mm512_add_ps(_mm512_loadu_ps(to), acc[m][n]) : acc[m][n]);
    }
}

template <bool Add, int MR, int NV>
static void dot_rest(int64_t m, int64_t K, RowsBf16 a, PairsBf16 b, float* c, int64_t ldc) {
  if constexpr (MR > 0) {
    if (m == MR)
      dot_block<Add, MR, NV>(K, a.p, a.ld, b.p, b.ld, c, ldc);
    else
      dot_rest<Add, MR - 1, NV>(m, K, a, b, c, ldc);
  }
}

template <bool Add, int NV>
static void dot_panel(int64_t M, int64_t K, RowsBf16 a, PairsBf16 b, float* c, int64_t ldc) {
  constexpr int R = NV == 4 ? 6 : NV == 3 ? 8 : NV == 2 ? 12 : 14;
  int64_t m = 0;
  for (; m + R <= M; m += R) dot_block<Add, R, NV>(K, a.p + m * a.ld, a.ld, b.p, b.ld, c + m * ldc, ldc);
  dot_rest<Add, R - 1, NV>(M - m, K, {a.p + m * a.ld, a.ld}, b, c + m * ldc, ldc);
}

template <bool Add>
static void product_bf16(int64_t M, int64_t N, int64_t K, RowsBf16 a, PairsBf16 b, float* c, int64_t ldc) {
  int64_t n = 0;
  for (; n + 64 <= N; n += 64) dot_panel<Add, 4>(M, K, a, {b.p + 2 * n, b.ld}, c + n, ldc);
  const PairsBf16 rest{b.p + 2 * n, b.ld};
  if (N - n == 48) dot_panel<Add, 3>(M, K, a, rest, c + n, ldc);
  if (N - n == 32) dot_panel<Add, 2>(M, K, a, rest, c + n, ldc);
  if (N - n == 16) dot_panel<Add, 1>(M, K, a, rest, c + n, ldc);
}

#else

struct TileScope {
  TileScope() {}
};

// What AMX does, tile for tile: whole tiles of 16 rows and 32 k are read and written, padding included.
template <bool Add>
static void product_bf16(int64_t M, int64_t N, int64_t K, RowsBf16 a, PairsBf16 b, float* c, int64_t ldc) {
  for (int64_t m = 0; m < whole(M, kRowStep); ++m)
    for (int64_t n = 0; n < N; ++n) {
      float sum = Add ? c[m * ldc + n] : 0.f;
      for (int64_t k = 0; k < whole(K, kDepthStep); ++k)
        sum += widen(a.p[m * a.ld + k]) * widen(b.p[(k & ~int64_t(1)) * b.ld + 2 * n + (k & 1)]);
      c[m * ldc + n] = sum;
    }
}

#endif

// Two rows of floats to one row of bf16 pairs, rounded to nearest even.
SACCADE_FORCE void pair_rows(const float* low, const float* high, uint32_t* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t a = bits<uint32_t>(low[i]), b = bits<uint32_t>(high[i]);
    out[i] = (a + 0x7FFF + ((a >> 16) & 1)) >> 16 | ((b + 0x7FFF + ((b >> 16) & 1)) & 0xFFFF0000);
  }
}
SACCADE_FORCE void narrow_row(const float* x, bf16* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t a = bits<uint32_t>(x[i]);
    out[i] = bf16((a + 0x7FFF + ((a >> 16) & 1)) >> 16);
  }
}

struct Bf16 {
  using T = float;
  using Element = bf16;
  using A = RowsBf16;
  using B = PairsBf16;
  using Scope = TileScope;
  static constexpr int64_t kPad = 16;
  static constexpr bool kSharesTile = false;
  static constexpr int64_t kPartKeys = 32;  // each part is packed by itself

  template <bool Add>
  static void product(int64_t M, int64_t N, int64_t K, A a, B b, float* c, int64_t ldc) {
    product_bf16<Add>(M, N, K, a, b, c, ldc);
  }

  // S[j][i] = a_j . b_i.
  static void scores(int64_t n, int64_t lanes, int64_t d, A a, B b, float* S, int64_t ld) {
    product_bf16<false>(n, lanes, d, a, b, S, ld);
  }

  static constexpr int64_t kDepth = kDepthStep;
  static A skip_rows(A a, int64_t j) { return {a.p + j * a.ld, a.ld}; }
  static B skip_lanes(B b, int64_t n) { return {b.p + 2 * n, b.ld}; }
  static B skip_depth(B b, int64_t k) { return {b.p + k * b.ld, b.ld}; }

  static int64_t rows_size(int64_t n, int64_t d) { return whole(n, 16) * whole(d, 32); }
  static int64_t columns_size(int64_t n, int64_t d) {
    return 2 * whole(d, 16) * whole(n, 32);
  }  // the result and its untransposed pairs
  static int64_t packed_size(int64_t k, int64_t n) { return 2 * whole(k, 32) * whole(n, 16); }

  static A rows(const Params& p, const Rows& x, const Sequence& s, int64_t b, int64_t h, int64_t j0,
                int64_t n, int64_t d, const bool* dead, bf16* buffer) {
    if (x.col == 1 && !dead && !scattered(p) && d % kDepthStep == 0 && n % kRowStep == 0)
      return {reinterpret_cast<const bf16*>(row_at(x, b, h, s.k_begin + j0)), x.row};
    const int64_t ld = whole(d, kDepthStep);
    for (int64_t j = 0; j < whole(n, kRowStep); ++j) {
      bf16* to = buffer + j * ld;
      const bool empty = j >= n || (dead && dead[j]);
      const bf16* from = empty ? nullptr : reinterpret_cast<const bf16*>(cache_row(p, x, s, b, h, j0 + j));
      for (int64_t c = 0; c < ld; ++c) to[c] = empty || c >= d ? bf16(0) : from[c * x.col];
    }
    return {buffer, ld};
  }
  static A row(const void* src, DType, int64_t d, bf16* buffer) {
    const int64_t ld = whole(d, kDepthStep);
    memset(buffer, 0, size_t(kRowStep * ld) * sizeof(bf16));
    memcpy(buffer, src, size_t(d) * sizeof(bf16));
    return {buffer, ld};
  }
  // [d][n] from [n][d]: rows are paired, then the pairs are transposed as 32-bit numbers.
  static A columns(A rows, int64_t n, int64_t d, bf16* buffer) {
    const int64_t ld = whole(n, kDepthStep), pairs = ld / 2;
    uint32_t* paired = reinterpret_cast<uint32_t*>(buffer + whole(d, 16) * whole(n, 32));
    for (int64_t j = 0; j < pairs; ++j) {
      const bf16 *low = rows.p + 2 * j * rows.ld, *high = low + rows.ld;
      uint32_t* out = paired + j * d;
      if (2 * j + 1 < n)
        for (int64_t c = 0; c < d; ++c) out[c] = uint32_t(low[c]) | uint32_t(high[c]) << 16;
      else if (2 * j < n)
        for (int64_t c = 0; c < d; ++c) out[c] = low[c];
      else
        memset(out, 0, size_t(d) * 4);
    }
    transpose(reinterpret_cast<const float*>(paired), d, reinterpret_cast<float*>(buffer), pairs, pairs, d);
    if (whole(d, kRowStep) > d)
      memset(buffer + d * ld, 0, size_t((whole(d, kRowStep) - d) * ld) * sizeof(bf16));
    return {buffer, ld};
  }

  static B pack_columns(const float* rows, int64_t ld, int64_t count, int64_t lanes, int64_t d,
                        bf16* buffer) {
    const int64_t depth = whole(d, kDepthStep), pairs = depth / 2;
    bf16* narrowed = buffer + whole(d, 32) * lanes;
    for (int64_t i = 0; i < lanes; ++i) {
      bf16* to = narrowed + i * depth;
      const int64_t held = i < count ? d : 0;
      narrow_row(rows + i * ld, to, held);
      memset(to + held, 0, size_t(depth - held) * sizeof(bf16));
    }
    transpose(reinterpret_cast<const float*>(narrowed), pairs, reinterpret_cast<float*>(buffer), lanes, lanes,
              pairs);
    return {buffer, lanes};
  }
  static B pack_rows(const float* rows, int64_t ld, int64_t count, int64_t width, bf16* buffer) {
    return pair_up(rows, ld, count, width, buffer);
  }
  static B tile_b(const float* x, int64_t ld, int64_t n, int64_t lanes, bf16* buffer) {
    return pair_up(x, ld, n, lanes, buffer);
  }
  static A tile_a(const float* x, int64_t ld, int64_t n, int64_t count, bf16* buffer) {
    const int64_t depth = whole(count, kDepthStep);
    for (int64_t j = 0; j < whole(n, kRowStep); ++j) {
      const int64_t held = j < n ? count : 0;
      narrow_row(x + j * ld, buffer + j * depth, held);
      memset(buffer + j * depth + held, 0, size_t(depth - held) * sizeof(bf16));
    }
    return {buffer, depth};
  }

 private:
  static B pair_up(const float* rows, int64_t ld, int64_t count, int64_t width, bf16* buffer) {
    uint32_t* out = reinterpret_cast<uint32_t*>(buffer);
    for (int64_t k = 0; k < whole(count, kDepthStep); k += 2, out += width) {
      if (k + 1 < count) {
        pair_rows(rows + k * ld, rows + (k + 1) * ld, out, width);
      } else {
        memset(out, 0, size_t(width) * 4);
        if (k < count)
          for (int64_t c = 0; c < width; ++c) {
            bf16 x;
            narrow_row(rows + k * ld + c, &x, 1);
            out[c] = x;
          }
      }
    }
    return {buffer, width};
  }
};

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
