// What the decode body does with a tile of keys and a few queries. The tile lies S[r][j], a query's numbers
// one after the other: the lanes run along head_dim in the products and over keys in the softmax, so that
// none idles however few queries there are.
#pragma once
#include "tiled_forward.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// Registers for the sums of R rows: R times as many columns' vectors as fit.
constexpr int kSumRegisters = kVectorBytes == 64 ? 16 : 8;
constexpr int kMostRows = 4;  // that are multiplied with a key as it is read

// S[r][j] = key j . query r for R rows; V whole vectors of columns, 0: any d. Keys are read up to the end of
// the vector. Every sum is that of dot_part (rows.h), bit for bit: the backward pass takes logits from there,
// and weights from the difference of its logits to the forward pass's lse.
template <typename T, typename E, int R, int V>
static void key_dots(const E* const* keys, int64_t n, int64_t d, const T* queries, int64_t ldq, T* S) {
  constexpr int L = kLanes<T>;
  for (int64_t j0 = 0; j0 < n; j0 += L) {
    Vec<T> sums[R][L];
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      const E* key = keys[j0 + l];
      if constexpr (V == 0) {
        for (int r = 0; r < R; ++r) sums[r][l] = dot_part<T>(queries + r * ldq, key, d);
      } else {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r][l] = Vec<T>{};
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const Vec<T> x = load_as<T>(key + v * L);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sums[r][l] += load(queries + r * ldq + v * L) * x;
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(S + r * kBlockN + j0, sum_each<T, L>(sums[r]));
  }
}
template <typename T, typename E, int R>
static void key_dots_of(const E* const* keys, int64_t n, int64_t d, const T* queries, int64_t ldq, T* S) {
  constexpr int64_t L = kLanes<T>;
  const auto dots = d == L       ? &key_dots<T, E, R, 1>
                    : d == 2 * L ? &key_dots<T, E, R, 2>
                    : d == 4 * L ? &key_dots<T, E, R, 4>
                    : d == 8 * L ? &key_dots<T, E, R, 8>
                                 : &key_dots<T, E, R, 0>;
  dots(keys, n, d, queries, ldq, S);
}

// O[r][c] += sum_j w[r][j] value_j[c] for R rows and U vectors of columns, of which the last may be a part.
template <typename T, typename E, int R, int U, bool Part>
static void add_values(const E* const* values, int64_t n, int64_t c, int64_t width, const T* w, T* O,
                       int64_t ldo) {
  constexpr int L = kLanes<T>;
  constexpr int P =
      2 * R * U <= kSumRegisters ? 2 : 1;  // sums of every P-th key: additions wait for each other
  Vec<T> sum[P][R][U] = {};
  const auto add = [&](int64_t j, Vec<T>(&to)[R][U]) __attribute__((always_inline)) {
    const E* value = values[j] + c;
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      const Vec<T> x = Part ? load_part<T>(value, width) : load_as<T>(value + u * L);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) to[r][u] += w[r * kBlockN + j] * x;
    }
  };
  int64_t j = 0;
  for (; j + P <= n; j += P)
#pragma GCC unroll 2
    for (int x = 0; x < P; ++x) add(j + x, sum[x]);
  if (j < n) add(j, sum[0]);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      T* o = O + r * ldo + c + u * L;
      store(o, load(o) + (P == 2 ? sum[0][r][u] + sum[P - 1][r][u] : sum[0][r][u]));
    }
}
template <typename T, typename E, int R, int U = kSumRegisters / R < 8 ? kSumRegisters / R : 8>
static void add_values_of(const E* const* values, int64_t n, int64_t c, int64_t d, const T* w, T* O,
                          int64_t ldo) {
  constexpr int64_t L = kLanes<T>;
  for (; c + U * L <= d; c += U * L) add_values<T, E, R, U, false>(values, n, c, 0, w, O, ldo);
  if constexpr (U > 1)
    add_values_of<T, E, R, U / 2>(values, n, c, d, w, O, ldo);
  else if (c < d)
    add_values<T, E, R, 1, true>(values, n, c, d - c, w, O, ldo);
}

// f(first row, R) for rows in groups of 4, 2 and 1; R is known when compiled.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <int R = kMostRows, typename F>
SACCADE_FORCE void for_row_groups(int64_t rows, F f, int64_t r = 0) {
  for (; r + R <= rows; r += R) f(r, Count<R>{});
  if constexpr (R > 1) for_row_groups<R / 2>(rows, f, r);
}

// The logits of query i of the block in natural units, as finish_logits (logits.h) has them.
template <typename T>
static void finish_row(const Params& p, const QueryBlock& q, const KeyTile& t, int64_t i, T* s, T* buffer) {
  const Bend<T> bend(p);
  if (p.bias) read_row(buffer, bias_at(p, q, i, t.j0), p.bias_dtype, p.bias_stride[3], t.n);
  for (int64_t j = 0; j < t.n; j += kLanes<T>) {
    Vec<T> cap{}, logit = bend(load(s + j), cap);
    if (p.bias) logit = with_bias<T>(logit, load(buffer + j));
    store(s + j, logit);
  }
  if (!p.rel_bias) return;
  const T* rel = static_cast<const T*>(p.rel_bias);
  if (is_by_query(p)) {
    add_clipped<T, 1>(p, rel + rel_row_at(p, q.b, q.h, q.seq.q_begin + q.i0 + i),
                      t.j0 - (q.i0 + i + q.seq.seqlen_k - q.seq.seqlen_q), t.n, 1, 1, s);
  } else {
    rel += q.h * p.rel_size + rel_index<T>(p, q, t.j0, i);
    for (int64_t j = 0; j < t.n; ++j) s[j] += rel[j];
  }
}

// Pairs of query i that the mask drops get -inf, as apply_mask (logits.h) has it.
template <typename T>
static void mask_row(const Params& p, const QueryBlock& q, const KeyTile& t, int64_t i, T* s) {
  const MaskParams& m = p.mask;
  const int64_t begin = min64(max64(q.begin[i] - t.j0, 0), t.n),
                end = max64(begin, min64(q.end[i] - t.j0, t.n));
  for (int64_t j = 0; j < begin; ++j) s[j] = -kInf<T>;
  for (int64_t j = end; j < t.n; ++j) s[j] = -kInf<T>;
  if (irregular(m))
    for (int64_t j = begin; j < end; ++j)
      if (!keeps_pair(m, q.b, q.i0 + i, t.j0 + j)) s[j] = -kInf<T>;
}

// s becomes the weights of a row, m and l move on. Returns what older sums are to be multiplied by.
template <typename T>
static T softmax_row(int64_t n, T factor, T* s, T& m, T& l) {
  constexpr int L = kLanes<T>;
  Vec<T> top = splat<T>(m), sum{};
  for (int64_t j = 0; j < n; j += L) top = vmax<T>(load(s + j), top);
  const T now = largest_lane<T>(top), pivot = now == -kInf<T> ? T(0) : now;
  for (int64_t j = 0; j < n; j += L) {
    const Vec<T> w = exp2v<T>((load(s + j) - pivot) * factor);
    store(s + j, w);
    sum += w;
  }
  const T alpha = now == m ? T(1) : exp2v<T>(splat<T>((m - pivot) * factor))[0];
  l = l * alpha + sum_each<T, 1>(&sum)[0];
  m = now;
  return alpha;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
