// How tiles become operands of the product in the accumulator type itself. gemm() wants A broadcast (any
// strides) and B as rows of whole vectors, so keys and values of the right dtype are used where they lie. The
// bf16 twin of this file is operands_bf16.h.
#pragma once
#include "gemm.h"
#include "rows.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// What bf16 needs around a work item (AMX's tile configuration); nothing here.
struct NoScope {
  NoScope() {}
};

// With so few queries most lanes would idle: then they run along head_dim instead. Decode's logits are the
// same, bit for bit, so that the weights which the backward pass takes from its lse are those of its forward
// pass.
constexpr int64_t kNarrow = 8;

template <typename Acc>
struct Plain {
  using T = Acc;
  using Element = Acc;
  using A = Broadcast<T>;
  using Scope = NoScope;
  // `rows` is the same operand before packing, [count][ld_rows]; null where it was never in that form.
  struct B {
    const T* p;
    int64_t ld;
    const T* rows = nullptr;
    int64_t ld_rows = 0, count = 0;
  };
  static constexpr int64_t kPad = kLanes<T>;  // rows of B are whole vectors
  static constexpr bool kSharesTile = true;   // weights serve as operands where they stand
  static constexpr int64_t kPartKeys = 16;    // at the edge of a band; measured, window of +-64

  template <bool Add>
  static void product(int64_t M, int64_t N, int64_t K, A a, B b, T* c, int64_t ldc) {
    gemm<Add, T>(M, N, K, a, b.p, b.ld, c, ldc);
  }

  static bool narrow(A a, B b) { return b.rows && b.count <= kNarrow && a.col == 1; }

  // S[j][i] = a_j . b_i.
  static void scores(int64_t n, int64_t lanes, int64_t d, A a, B b, T* S, int64_t ld) {
    if (narrow(a, b))
      dot_scores<T>(n, b.count, lanes, d, [a](int64_t j) { return a.p + j * a.row; }, b.rows, b.ld_rows, S);
    else
      gemm<false, T>(n, lanes, d, a, b.p, b.ld, S, ld);
  }

  // Operands from row j, lane n, or depth k on.
  static constexpr int64_t kDepth = 1;  // k must be a multiple of this
  static A skip_rows(A a, int64_t j) { return {a.p + j * a.row, a.row, a.col}; }
  static B skip_lanes(B b, int64_t n) { return {b.p + n, b.ld, nullptr, 0, 0}; }
  static B skip_depth(B b, int64_t k) { return {b.p + k * b.ld, b.ld, nullptr, 0, 0}; }

  // Element counts of the buffers below.
  static int64_t rows_size(int64_t n, int64_t d) { return n * d; }
  static int64_t columns_size(int64_t, int64_t) { return 0; }
  static int64_t packed_size(int64_t k, int64_t n) { return k * n; }

  // n rows of keys or values as A(m = row, k = column). `dead` (may be null) marks rows to be read as zeros.
  static A rows(const Params& p, const Rows& x, const Sequence& s, int64_t b, int64_t h, int64_t j0,
                int64_t n, int64_t d, const bool* dead, T* buffer) {
    if (x.dtype == AccumulatorOf<T>::value && !dead && !scattered(p))
      return {reinterpret_cast<const T*>(row_at(x, b, h, s.k_begin + j0)), x.row, x.col};
    for (int64_t j = 0; j < n; ++j) {
      if (dead && dead[j])
        memset(buffer + j * d, 0, size_t(d) * sizeof(T));
      else
        read_row(buffer + j * d, cache_row(p, x, s, b, h, j0 + j), x.dtype, x.col, d);
    }
    return {buffer, d, 1};
  }
  // One row given by itself (the extra key).
  static A row(const void* src, DType t, int64_t d, T* buffer) {
    read_row(buffer, src, t, 1, d);
    return {buffer, d, 1};
  }
  // The same rows as A(m = column, k = row).
  static A columns(A rows, int64_t, int64_t, T*) { return {rows.p, rows.col, rows.row}; }

  // B[k = column][n = row] of `count` rows, rows beyond it zero up to `lanes`.
  static B pack_columns(const T* rows, int64_t ld, int64_t count, int64_t lanes, int64_t d, T* buffer) {
    transpose(rows, ld, buffer, lanes, count, d);
    if (count < lanes)
      for (int64_t c = 0; c < d; ++c)
        memset(buffer + c * lanes + count, 0, size_t(lanes - count) * sizeof(T));
    return {buffer, lanes, rows, ld, count};
  }
  // B[k = row][n = column]: rows already padded to whole vectors.
  static B pack_rows(const T* rows, int64_t ld, int64_t, int64_t, T*) { return {rows, ld, nullptr, 0, 0}; }

  // A tile X[j][i] as B[k = j][n = i] and as A(m = j, k = i).
  static B tile_b(const T* x, int64_t ld, int64_t, int64_t, T*) { return {x, ld, nullptr, 0, 0}; }
  static A tile_a(const T* x, int64_t ld, int64_t, int64_t, T*) { return {x, ld, 1}; }
};

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
