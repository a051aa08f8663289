// Weighted sums of the rows of edges.
#pragma once
#include "edge_dots.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// What becomes of a sum: it is added to those before it, it is the first, or the only one, for whose place no
// cache has room.
enum class Sum { kMore, kFirst, kOnly };
SACCADE_FORCE Sum sum_from(bool first, bool only) {
  return only ? Sum::kOnly : first ? Sum::kFirst : Sum::kMore;
}
template <typename T>
SACCADE_FORCE void put(T* y, Sum kind, Vec<T> sum) {
  if (kind == Sum::kOnly) return stream(y, sum);
  store(y, kind == Sum::kFirst ? sum : load(y) + sum);
}

// sum + w * row; unless all edges are live, sum where w is 0: what stands in the row, NaN perhaps, must not
// reach it.
template <bool All, typename T>
SACCADE_FORCE Vec<T> add_edge(Vec<T> sum, T w, Vec<T> row) {
  const Vec<T> weight = splat<T>(w), more = sum + weight * row;
  return All || weight != T(0) ? more : sum;
}

// y[v] += sum_e w[e] row_e[v], or y =, for V vectors: those of one head, or, H of them to a
// head, those of V / H heads, whose weights lie side by side. The edges' sum is formed apart and then added:
// of many steps, that rounds less.
template <bool All, int V, int H, typename T, typename S>
static void edge_sum_part(T* y, Sum kind, const EdgeRows<S>& rows, int64_t at, int64_t n, const T* weight,
                          int64_t pitch) {
  constexpr int L = kLanes<T>;
  Vec<T> a[V] = {};
  for (int64_t e = 0; e < n; ++e) {
    const S* row = rows.at[e] + at;
    const T* w = weight + e * pitch;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) a[v] = add_edge<All>(a[v], w[v / H], load_as<T>(row + v * L));
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) put(y + v * L, kind, a[v]);
}

// y += sum_e weight[e * pitch] row e of key head k, or y =; y is padded to whole vectors.
template <bool All, typename T, typename S>
static void edge_sum(T* y, Sum kind, const EdgeRows<S>& rows, int64_t k, int64_t n, int64_t d,
                     const T* weight, int64_t pitch) {
  constexpr int L = kLanes<T>;
  const int64_t at = k * rows.head;
  int64_t c = 0;
  for (; c + 8 * L <= d; c += 8 * L) edge_sum_part<All, 8, 8>(y + c, kind, rows, at + c, n, weight, pitch);
  if (c + 4 * L <= d) {
    edge_sum_part<All, 4, 4>(y + c, kind, rows, at + c, n, weight, pitch);
    c += 4 * L;
  }
  if (c + 2 * L <= d) {
    edge_sum_part<All, 2, 2>(y + c, kind, rows, at + c, n, weight, pitch);
    c += 2 * L;
  }
  if (c + L <= d) {
    edge_sum_part<All, 1, 1>(y + c, kind, rows, at + c, n, weight, pitch);
    c += L;
  }
  if (c == d) return;
  Vec<T> a{};
  for (int64_t e = 0; e < n; ++e)
    a = add_edge<All>(a, weight[e * pitch], load_part<T>(rows.at[e] + at + c, d - c));
  put(y + c, kind, a);
}

// How many heads are summed in one walk over the edges: eight or four vectors of them where heads lie side by
// side.
template <typename T>
SACCADE_FORCE int64_t heads_together(const HeadLanes<T>& x, int64_t head, int64_t d) {
  constexpr int64_t L = kLanes<T>;
  if (x.group != 1 || head != d || (d != L && d != 2 * L && d != 4 * L)) return 1;
  const int64_t vectors = d / L;
  return x.heads * vectors % 8 == 0 ? 8 / vectors : x.heads * vectors % 4 == 0 ? 4 / vectors : 1;
}

template <bool ToKeys, bool All, typename T, typename S>
static void edge_sums_of(const HeadLanes<T>& lanes, T* y, int64_t ld, Sum kind, const EdgeRows<S>& rows,
                         int64_t n, int64_t d, const T* weight, int64_t pitch) {
  const int64_t together = heads_together(lanes, rows.head, d), vectors = d / kLanes<T>;
  for (int64_t h = 0; h < lanes.heads; h += together, weight += together) {
    const int64_t k = lanes.key(h), from = ToKeys ? h : k;
    T* const to = y + (ToKeys ? k : h) * ld;
    const Sum its = !ToKeys || lanes.group == 1             ? kind
                    : kind == Sum::kMore || !lanes.opens(h) ? Sum::kMore
                                                            : Sum::kFirst;
    if (together == 1)
      edge_sum<All>(to, its, rows, from, n, d, weight, pitch);
    else if (together * vectors == 8)
      (vectors == 1   ? &edge_sum_part<All, 8, 1, T, S>
       : vectors == 2 ? &edge_sum_part<All, 8, 2, T, S>
                      : &edge_sum_part<All, 8, 4, T, S>)(to, its, rows, h * d, n, weight, pitch);
    else
      (vectors == 1 ? &edge_sum_part<All, 4, 1, T, S> : &edge_sum_part<All, 4, 2, T, S>)(to, its, rows, h * d,
                                                                                         n, weight, pitch);
  }
}
// The sums of rows of edges by the weights of their heads, weight[e * pitch + h]: one for each head of the
// edges' query, of its key head's rows; or, ToKeys, one for each key head, of its heads' rows. Over all
// edges, or over those whose weight is not 0. y lies by `ld`.
template <bool ToKeys, typename T, typename S>
SACCADE_FORCE void edge_sums(const HeadLanes<T>& lanes, bool all, T* y, int64_t ld, Sum kind,
                             const EdgeRows<S>& rows, int64_t n, int64_t d, const T* weight, int64_t pitch) {
  (all ? &edge_sums_of<ToKeys, true, T, S> : &edge_sums_of<ToKeys, false, T, S>)(lanes, y, ld, kind, rows, n,
                                                                                 d, weight, pitch);
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
