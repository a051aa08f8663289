// The end of the gather body's backward: what belongs to single edges, and the weights of scores and
// features.
#pragma once
#include "gather_columns.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

static int64_t row_of_edge(const GatherParams& p, int64_t edge) {
  int64_t row = 0, high = p.seqlen_q;
  while (high - row > 1) {
    const int64_t mid = (row + high) / 2;
    (p.indptr[mid] <= edge ? row : high) = mid;
  }
  return row;
}

// What belongs to single edges: dedge_bias, dedge_x; and, in the last item, the weight of the score.
template <typename T>
static void gather_edges_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  Arena arena{scratch}, shared{workspace};
  EdgeNumbers<T> numbers(p, shared);
  const int64_t H = p.heads;
  if (item == edge_items(p)) {
    if (!(p.needs & kNeedWeight)) return;
    const int64_t n = H * p.head_dim, parts = p.batch * row_split<T>(p).items();
    T* dw = static_cast<T*>(p.dweight);
    for (int64_t x = 0; x < n; ++x) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += numbers.dweight[part * n + x];
      dw[x] = T(sum);
    }
    return;
  }
  const int64_t lde = round_up(p.edge_dim, kLanes<T>);
  T *query = arena.take<T>(lde), *grad = arena.take<T>(lde), *sums = arena.take<T>(lde);
  int64_t row = 0;
  for (int64_t e = item * kEdgeItem; e < min64(p.edges, (item + 1) * kEdgeItem); ++e) {
    const int64_t id = p.edge_ids ? p.edge_ids[e] : e;
    if (p.needs & kNeedEdgeBias) {
      T* out = static_cast<T*>(p.dedge_bias);
      T all = T(0);
      for (int64_t h = 0; h < H; ++h) {
        T sum = T(0);
        for (int64_t b = 0; b < p.batch; ++b) sum += numbers.logit[(b * p.edges + e) * numbers.pitch + h];
        if (p.edge_bias_head) out[h * p.edge_bias_head + id] = sum;
        all += sum;
      }
      if (!p.edge_bias_head) out[id] = all;
    }
    if (p.edge_dim && p.needs & kNeedEdgeX) {
      if (e == item * kEdgeItem) row = row_of_edge(p, e);
      while (p.indptr[row + 1] <= e) ++row;
      for (int64_t c = 0; c < lde; ++c) sums[c] = T(0);
      for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < H; ++h) {
          const T* pair = numbers.of(b, e) + h;
          const T weight = pair[0], g = pair[numbers.pitch];
          if (weight == T(0) && g == T(0)) continue;  // a masked edge, whose query may be NaN
          read_row(query, row_at(p.edge_q, b, h, row), p.edge_q.dtype, p.edge_q.col, p.edge_dim);
          read_row(grad, row_at(p.dout_edge, b, h, row), p.dout_edge.dtype, p.dout_edge.col, p.edge_dim);
          for (int64_t c = 0; c < p.edge_dim; ++c) sums[c] += g * query[c] + weight * grad[c];
        }
      memcpy(static_cast<T*>(p.dedge_x) + id * p.edge_dim, sums, size_t(p.edge_dim) * sizeof(T));
    }
  }
}

// Features that join the score, of one item's edges, 16 at a time whatever rows they belong to: the gradient
// J of each edge's q + k + W e, summed over the batch, gives de = J W and the item's part of dW = J e^T.
template <typename T, typename S>
struct JointPass {
  static constexpr int64_t L = kLanes<T>;
  const GatherParams& p;
  HeadLanes<T> heads;
  JointFeatures<T> joint;
  RowReader<T, S> read_q;
  T *sums, *de;   // J [kEdgeLanes][H][ld]
  Vec<T>* parts;  // of de of four edges
  const int64_t width, lde;
  const bool far;

  JointPass(const GatherParams& params, Arena& a)
      : p(params),
        heads(params),
        joint(params, a),
        read_q(a, false, params.heads, params.head_dim),
        width(params.heads * joint.ld),
        lde(round_up(params.joint_dim, L)),
        far(rows_outgrow(kNearBytes, params, params.seqlen_k, params.heads_k)) {
    sums = a.take<T>(kEdgeLanes * width);
    de = a.take<T>(lde);
    parts = a.take<Vec<T>>(4 * lde);
    if (a.base) memset(parts, 0, size_t(4 * lde) * sizeof(Vec<T>));
  }
  int64_t id(int64_t edge) const { return p.edge_ids ? p.edge_ids[edge] : edge; }

  // n edges from `at` on; `row` is the first one's.
  void group(const EdgeNumbers<T>& numbers, int64_t row, int64_t at, int64_t n, double* dW) {
    int32_t rows[kEdgeLanes];
    OwnRows<T> q;
    for (int64_t e = 0; e < n; ++e) {
      while (p.indptr[row + 1] <= at + e) ++row;
      rows[e] = int32_t(row);
    }
    memset(sums, 0, size_t(kEdgeLanes * width) * sizeof(T));
    bool live[kEdgeLanes] = {};
    for (int64_t b = 0; b < p.batch; ++b) {
      const RowsAhead ask(far, p.k, b, p.heads_k, p.head_dim, p.indices, at, n, p.edges);
      for (int64_t e = 0; e < ask.n; ++e) ask(e);
      read_q.read(p.q, b, rows, n, q);
      const EdgeRows<S> keys(p.k, b, p.indices + at, n);
      const JointRows<T> own = joint.join(p, q, 1, n, [&](int64_t e) { return id(at + e); });
      EdgeRows<S> key;
      JointRows<T> mine;
      key.head = keys.head, mine.rows.head = own.rows.head, mine.group = own.group;
      for (int64_t e = 0; e < n; ++e) {
        key.at[0] = keys.at[e], mine.rows.at[0] = own.rows.at[e];
        for (int64_t h = 0; h < p.heads; ++h) {
          const T grad = numbers.of(b, at + e)[heads.pitch + h];
          if (grad == T(0)) continue;
          live[e] = true;
          additive_edge_gradient<T, S>(p, h, mine, key, heads.key(h), 1, false,
                                       sums + e * width + h * joint.ld, nullptr, &grad, 1);
        }
      }
    }
    for (int64_t e = 0; e < n; ++e)
      if (!live[e]) memset(joint.features + e * joint.dim, 0, size_t(joint.dim) * sizeof(T));
    for (int64_t e = 0; p.needs & kNeedEdgeX && e < n; e += 4) write_features(e, min64(4, n - e), at);
    for (int64_t c = 0; dW && c < joint.dim; c += joint.dim - c >= 4 ? 4 : 1)
      joint.dim - c >= 4 ? add_weights<4>(c, n, dW) : add_weights<1>(c, n, dW);
  }

 private:
  // de of up to four edges.
  void write_features(int64_t e, int64_t n, int64_t at) {
    for (int64_t c = 0; c < joint.dim; ++c) {
      Vec<T> sum[4] = {};
      for (int64_t h = 0; h < p.heads; ++h)
        for (int64_t d = 0; d < joint.ld; d += L) {
          const Vec<T> w = load(joint.weights + (h * joint.dim + c) * joint.ld + d);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sum[i] += load(sums + (e + i) * width + h * joint.ld + d) * w;
        }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) parts[i * lde + c] = sum[i];
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < joint.dim; c += L)
        store_sums<T>(parts + i * lde + c, min64(L, joint.dim - c), de + c);
      memcpy(static_cast<T*>(p.dedge_x) + id(at + e + i) * joint.dim, de, size_t(joint.dim) * sizeof(T));
    }
  }
  // The part of n edges in C columns of dW.
  template <int C>
  void add_weights(int64_t c, int64_t n, double* dW) {
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t d = 0; d < joint.ld; d += L) {
        Vec<T> sum[C] = {};
        for (int64_t e = 0; e < n; ++e) {
          const Vec<T> J = load(sums + e * width + h * joint.ld + d);
#pragma GCC unroll 4
          for (int i = 0; i < C; ++i) sum[i] += joint.features[e * joint.dim + c + i] * J;
        }
#pragma GCC unroll 4
        for (int i = 0; i < C; ++i) add_wide<T>(dW + (h * joint.dim + c + i) * joint.ld + d, sum[i], L);
      }
  }
};

template <typename T, typename S>
static void gather_joint_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  Arena arena{scratch}, shared{workspace};
  const EdgeNumbers<T> numbers(p, shared);
  JointPass<T, S> pass(p, arena);
  const int64_t size = pass.joint.weights_size(), end = min64(p.edges, (item + 1) * kEdgeItem);
  double* dW = p.needs & kNeedEdgeQ ? numbers.joint + item * size : nullptr;
  if (dW) memset(dW, 0, size_t(size) * sizeof(double));
  int64_t row = row_of_edge(p, item * kEdgeItem);
  for (int64_t at = item * kEdgeItem, n; at < end; at += n) {
    while (p.indptr[row + 1] <= at) ++row;
    n = min64(kEdgeLanes, end - at);
    pass.group(numbers, row, at, n, dW);
  }
}

// dW [H][D][De], the items' parts in their order.
template <typename T>
static void gather_joint_sum(const GatherParams& p, int64_t h, char*, char* workspace) {
  Arena shared{workspace};
  const EdgeNumbers<T> numbers(p, shared);
  const int64_t ld = round_up(p.head_dim, kLanes<T>), size = p.heads * p.joint_dim * ld;
  for (int64_t d = 0; d < p.head_dim; ++d)
    for (int64_t c = 0; c < p.joint_dim; ++c) {
      double sum = 0;
      for (int64_t item = 0; item < edge_items(p); ++item)
        sum += numbers.joint[item * size + (h * p.joint_dim + c) * ld + d];
      reinterpret_cast<T*>(row_at(p.dedge_q, 0, h, d))[c * p.dedge_q.col] = T(sum);
    }
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
