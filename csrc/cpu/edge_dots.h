// Products of the rows of edges with those they belong to.
#pragma once
#include "head_lanes.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// The sums of the lanes of r[l] for l < n, by the smallest tree; the vector repeats them.
template <typename T, int N = kLanes<T>>
SACCADE_FORCE Vec<T> sum_first(Vec<T>* r, int64_t n) {
  if constexpr (N > 1)
    if (n <= N / 2) return sum_first<T, N / 2>(r, n);
  return sum_each<T, N>(r);
}
template <typename T>
static void store_sums(const Vec<T>* parts, int64_t n, T* to) {
  Vec<T> r[kLanes<T>];
#pragma GCC unroll 16
  for (int l = 0; l < kLanes<T>; ++l) r[l] = l < n ? parts[l] : Vec<T>{};
  store(to, sum_first<T>(r, n));
}

// to[e * pitch + h] = the sum of the lanes of what part(e, into) puts into into[h], for n edges; what follows
// up to the end of the vector repeats those. parts: lanes() vectors, those of no head always 0.
template <typename T, typename Part>
SACCADE_FORCE void pair_sums(const HeadLanes<T>& x, int64_t n, Vec<T>* parts, T* to, Part part) {
  constexpr int64_t L = kLanes<T>;
  const int64_t together = x.pitch < L ? L / x.pitch : 1;
  for (int64_t e0 = 0; e0 < n; e0 += together) {
    const int64_t count = min64(together, n - e0);
    for (int64_t e = 0; e < count; ++e) part(e0 + e, parts + e * x.pitch);
    for (int64_t c = 0; c < count * x.pitch; c += L)
      store_sums<T>(parts + c, min64(L, count * x.pitch - c), to + e0 * x.pitch + c);
  }
}

// to[h] = the products of x[h] and the row of h's key head, added up along d; V whole vectors, 0: any d.
template <typename T, typename S, int V>
static void edge_products(const HeadLanes<T>& lanes, HeadRows<T> x, const S* row, int64_t head, int64_t d,
                          Vec<T>* to) {
  for (int64_t k = 0; k < lanes.heads_k; ++k, row += head)
    for (int64_t g = 0; g < lanes.group; ++g, x.at += x.head, ++to) {
      if constexpr (V == 0) {
        *to = dot_part<T, S>(x.at, row, d);
      } else {
        Vec<T> sum = load(x.at) * load_as<T>(row);
#pragma GCC unroll 4
        for (int v = 1; v < V; ++v) sum += load(x.at + v * kLanes<T>) * load_as<T>(row + v * kLanes<T>);
        *to = sum;
      }
    }
}
template <typename T, typename S>
using EdgeProducts = void (*)(const HeadLanes<T>&, HeadRows<T>, const S*, int64_t, int64_t, Vec<T>*);
template <typename T, typename S>
SACCADE_FORCE EdgeProducts<T, S> edge_products_for(int64_t d) {
  return d == kLanes<T>       ? &edge_products<T, S, 1>
         : d == 2 * kLanes<T> ? &edge_products<T, S, 2>
         : d == 4 * kLanes<T> ? &edge_products<T, S, 4>
                              : &edge_products<T, S, 0>;
}

// The same where L / P edges of P heads give a vector of L numbers, a head's row is V whole vectors, and
// heads lie side by side: nothing passes through memory.
template <typename T, typename S, int P, int V>
static void dot_tiles(const OwnRows<T>& x, const EdgeRows<S>& rows, int64_t n, RowsAhead ask, T* to) {
  constexpr int L = kLanes<T>, edges = L / P;
  for (int64_t e0 = 0; e0 < n; e0 += edges, to += L) {
    for (int64_t e = e0; e < e0 + edges; ++e) ask(e);
    Vec<T> r[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      const T* own = x.at[e0 + i / P] + i % P * V * L;
      const S* row = rows.at[e0 + i / P] + i % P * V * L;
      r[i] = load(own) * load_as<T>(row);
#pragma GCC unroll 8
      for (int v = 1; v < V; ++v) r[i] += load(own + v * L) * load_as<T>(row + v * L);
    }
    store(to, sum_each<T, L>(r));
  }
}
template <typename T, typename S>
using DotTiles = void (*)(const OwnRows<T>&, const EdgeRows<S>&, int64_t, RowsAhead, T*);
template <typename T, typename S, int P>
SACCADE_FORCE DotTiles<T, S> dot_tiles_of(int64_t d) {
  constexpr int64_t L = kLanes<T>;
  if constexpr (P <= L)
    return d == L       ? &dot_tiles<T, S, P, 1>
           : d == 2 * L ? &dot_tiles<T, S, P, 2>
           : d == 4 * L ? &dot_tiles<T, S, P, 4>
           : d == 8 * L ? &dot_tiles<T, S, P, 8>
                        : nullptr;
  return nullptr;
}
template <typename T, typename S>
SACCADE_FORCE DotTiles<T, S> dot_tiles_for(const HeadLanes<T>& x, int64_t head_x, int64_t head, int64_t d) {
  if (x.group != 1 || x.heads != x.pitch || (x.heads > 1 && (head_x != d || head != d))) return nullptr;
  return x.heads == 1    ? dot_tiles_of<T, S, 1>(d)
         : x.heads == 2  ? dot_tiles_of<T, S, 2>(d)
         : x.heads == 4  ? dot_tiles_of<T, S, 4>(d)
         : x.heads == 8  ? dot_tiles_of<T, S, 8>(d)
         : x.heads == 16 ? dot_tiles_of<T, S, 16>(d)
                         : nullptr;
}

// to[e * pitch + h] = x_e[h] . row e of h's key head, for up to kEdgeLanes edges. Rows that will follow are
// asked for.
template <typename T, typename S>
static void pair_dots(const HeadLanes<T>& lanes, const OwnRows<T>& x, const EdgeRows<S>& rows, int64_t n,
                      int64_t d, RowsAhead ask, Vec<T>* parts, T* to) {
  if (const DotTiles<T, S> tiles = dot_tiles_for<T, S>(lanes, x.head, rows.head, d)) {
    if (n == kEdgeLanes) return tiles(x, rows, n, ask, to);
    OwnRows<T> own = x;
    EdgeRows<S> filled = rows;
    for (int64_t e = n; e < kEdgeLanes; ++e) own.at[e] = x.at[n - 1], filled.at[e] = rows.at[n - 1];
    return tiles(own, filled, n, ask, to);
  }
  const EdgeProducts<T, S> products = edge_products_for<T, S>(d);
  pair_sums(lanes, n, parts, to, [&](int64_t e, Vec<T>* into) {
    ask(e), products(lanes, x.of(e), rows.at[e], rows.head, d, into);
  });
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
