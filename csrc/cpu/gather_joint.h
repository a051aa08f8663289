// Edge features that join an additive score, w . phi(q + k + W e): W e is formed 16 edges at a time, and kept
// for a block of rows at most.
#pragma once
#include "edge_features.h"

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
  int64_t dim, ld, heads, width;  // of all heads: H * ld
  T *weights, *rows;              // [De][H][ld], [edges][H][ld]
  FeatureReader<T> features;

  // Room for the rows of so many edges; none: it joins nothing.
  JointFeatures(const GatherParams& p, Arena& a, int64_t edges)
      : dim(edges ? p.joint_dim : 0),
        ld(round_up(p.head_dim, kLanes<T>)),
        heads(p.heads),
        width(heads * ld),
        features(p, a, dim) {
    weights = a.take<T>(dim * width);
    rows = a.take<T>(dim ? edges * width : 0);
    T* const row = a.take<T>(dim);
    if (!a.base || !dim) return;
    memset(weights, 0, size_t(dim * width) * sizeof(T));
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < p.head_dim; ++d) {
        read_row(row, row_at(p.edge_q, 0, h, d), p.edge_q.dtype, p.edge_q.col, dim);
        for (int64_t c = 0; c < dim; ++c) weights[c * width + h * ld + d] = row[c];
      }
  }

  // own_e[h / group] + W[h] e of n edges, numbers and `ahead` as FeatureReader has them; kept from `place`
  // on.
  template <typename Id>
  JointRows<T> join(const OwnRows<T>& own, int64_t group, int64_t n, int64_t ahead, Id id,
                    int64_t place = 0) {
    if (!dim) return {own, group};
    constexpr int64_t L = kLanes<T>;
    features.read(n, ahead, id);
    const JointRows<T> from{own, group};
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < ld; d += 2 * L)
        for (int64_t e = 0; e < n; e += 4)
          if (d + L < ld)
            join_some<2>(from, h, d, e, n - e, place);
          else
            join_some<1>(from, h, d, e, n - e, place);
    return joined(place, n);
  }
  // What was joined there.
  JointRows<T> joined(int64_t place, int64_t n) const {
    JointRows<T> found;
    for (int64_t e = 0; e < n; ++e) found.rows.at[e] = rows + (place + e) * width;
    found.rows.head = ld;
    found.group = 1;
    return found;
  }

 private:
  // V vectors of the rows of up to four edges.
  template <int V>
  SACCADE_MEMBER void join_some(const JointRows<T>& own, int64_t h, int64_t d, int64_t e, int64_t n,
                                int64_t place) {
    if (n >= 4) return join_tile<4, V>(own, h, d, e, place);
    if (n >= 2) join_tile<2, V>(own, h, d, e, place);
    if (n % 2) join_tile<1, V>(own, h, d, e + n / 2 * 2, place);
  }
  template <int E, int V>
  SACCADE_MEMBER void join_tile(const JointRows<T>& own, int64_t h, int64_t d, int64_t e, int64_t place) {
    constexpr int64_t L = kLanes<T>;
    Vec<T> sum[E][V];
#pragma GCC unroll 4
    for (int i = 0; i < E; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] = load(own.of(e + i, h) + d + v * L);
    for (int64_t c = 0; c < dim; ++c) {
      const T* w = weights + c * width + h * ld + d;
#pragma GCC unroll 4
      for (int i = 0; i < E; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[i][v] += features.rows.at[e + i][c] * load(w + v * L);
    }
#pragma GCC unroll 4
    for (int i = 0; i < E; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(rows + (place + e + i) * width + h * ld + d + v * L, sum[i][v]);
  }
};

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
