// Edge features that join an additive score, w . phi(q + k + W e): W e is formed anew wherever it is needed,
// 16 edges at a time, and never held for all edges.
#pragma once
#include "edge_sums.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// What meets a key (or a query) in an additive score: of each edge, a row of each head.
template <typename T>
struct JointRows {
  OwnRows<T> rows;
  int64_t group;
  SACCADE_MEMBER const T* of(int64_t e, int64_t h) const { return rows.of(e)[key_head(h, group)]; }
};

// One thread's W, transposed, and the features and rows of a step.
template <typename T>
struct JointFeatures {
  int64_t dim, ld, heads;
  T *weights, *features, *rows;  // [H][De][ld], [kEdgeLanes][De], [kEdgeLanes][H][ld]

  JointFeatures(const GatherParams& p, Arena& a)
      : dim(p.joint_dim), ld(round_up(p.head_dim, kLanes<T>)), heads(p.heads) {
    weights = a.take<T>(weights_size());
    features = a.take<T>(kEdgeLanes * dim);
    rows = a.take<T>(dim ? kEdgeLanes * heads * ld : 0);
    if (!a.base || !dim) return;
    memset(weights, 0, size_t(weights_size()) * sizeof(T));
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < p.head_dim; ++d) {
        read_row(features, row_at(p.edge_q, 0, h, d), p.edge_q.dtype, p.edge_q.col, dim);
        for (int64_t c = 0; c < dim; ++c) weights[(h * dim + c) * ld + d] = features[c];
      }
  }
  int64_t weights_size() const { return heads * dim * ld; }

  // own_e[h / group] + W[h] e of n edges, the e-th of which the user numbers id(e).
  template <typename Id>
  JointRows<T> join(const GatherParams& p, const OwnRows<T>& own, int64_t group, int64_t n, Id id) {
    if (!dim) return {own, group};
    constexpr int64_t L = kLanes<T>;
    for (int64_t e = 0; e < n; ++e)
      read_row(features + e * dim, row_at(p.edge_x, 0, 0, id(e)), p.edge_x.dtype, p.edge_x.col, dim);
    const JointRows<T> from{own, group};
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < ld; d += 2 * L)
        for (int64_t e = 0; e < n; e += 4)
          if (d + L < ld)
            join_some<2>(from, h, d, e, n - e);
          else
            join_some<1>(from, h, d, e, n - e);
    JointRows<T> joined;
    for (int64_t e = 0; e < n; ++e) joined.rows.at[e] = rows + e * heads * ld;
    joined.rows.head = ld;
    joined.group = 1;
    return joined;
  }

 private:
  // V vectors of the rows of up to four edges.
  template <int V>
  SACCADE_MEMBER void join_some(const JointRows<T>& own, int64_t h, int64_t d, int64_t e, int64_t n) {
    if (n >= 4) return join_tile<4, V>(own, h, d, e);
    if (n >= 2) join_tile<2, V>(own, h, d, e);
    if (n % 2) join_tile<1, V>(own, h, d, e + n / 2 * 2);
  }
  template <int E, int V>
  SACCADE_MEMBER void join_tile(const JointRows<T>& own, int64_t h, int64_t d, int64_t e) {
    constexpr int64_t L = kLanes<T>;
    Vec<T> sum[E][V];
#pragma GCC unroll 4
    for (int i = 0; i < E; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] = load(own.of(e + i, h) + d + v * L);
    for (int64_t c = 0; c < dim; ++c) {
      const T* w = weights + (h * dim + c) * ld + d;
#pragma GCC unroll 4
      for (int i = 0; i < E; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[i][v] += features[(e + i) * dim + c] * load(w + v * L);
    }
#pragma GCC unroll 4
    for (int i = 0; i < E; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(rows + ((e + i) * heads + h) * ld + d + v * L, sum[i][v]);
  }
};

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
