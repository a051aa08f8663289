// Edge features that join an additive score, w . phi(q + k + W e): W e is formed anew wherever it is needed,
// 16 edges at a time, and never held for all edges.
#pragma once
#include "edges.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// What meets a key (or a query) in an additive score: a row of each head, or, with features, of each head and
// edge.
template <typename T>
struct JointRows {
  const T* at;
  int64_t head, edge, group;  // edge is 0 where all edges have the same
  SACCADE_MEMBER const T* of(int64_t e, int64_t h) const { return at + e * edge + h / group * head; }
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
    memset(features, 0, size_t(kEdgeLanes * dim) * sizeof(T));
  }
  int64_t weights_size() const { return heads * dim * ld; }

  // own[h / group] + W[h] e of n edges, the e-th of which the user numbers id(e).
  template <typename Id>
  JointRows<T> join(const GatherParams& p, HeadRows<T> own, int64_t group, int64_t n, Id id) {
    constexpr int64_t L = kLanes<T>;
    if (!dim) return {own.at, own.head, 0, group};
    for (int64_t e = 0; e < n; ++e)
      read_row(features + e * dim, row_at(p.edge_x, 0, 0, id(e)), p.edge_x.dtype, p.edge_x.col, dim);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < ld; d += L)
        for (int64_t e = 0; e < n; e += 4) {  // up to three rows too many: there is room for 16
          Vec<T> sum[4];
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) sum[v] = load(own[h / group] + d);
          for (int64_t c = 0; c < dim; ++c) {
            const Vec<T> w = load(weights + (h * dim + c) * ld + d);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) sum[v] += features[(e + v) * dim + c] * w;
          }
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) store(rows + ((e + v) * heads + h) * ld + d, sum[v]);
        }
    return {rows, ld, heads * ld, 1};
  }
};

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
