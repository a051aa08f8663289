// The gather body's backward, of features that join an additive score, and of their W.
#pragma once
#include "gather_edges.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// Features that join the score, of one item's edges, 16 at a time whatever rows they belong to: the gradient
// J of each edge's q + k + W e, summed over the batch, gives de = J W and the item's part of dW = J e^T.
template <typename T, typename S>
struct JointPass {
  static constexpr int64_t L = kLanes<T>;
  static constexpr int kFeatures = kVectorBytes == 64 ? 4 : 2;  // as many as registers hold sums of
  static constexpr int64_t kSteps = 16;                         // whose sums in T then go to doubles
  const GatherParams& p;
  HeadLanes<T> heads;
  JointFeatures<T> joint;
  RowReader<T, S> read_q;
  const int64_t width, lde;
  const bool far;
  T *sums, *de, *dW;  // J [kEdgeLanes][width]; dW [De][width] of the last steps
  Vec<T>* parts;      // of de of four edges
  int64_t steps = 0;
  EdgeRows<S> keys;    // of a step's edges, without slopes
  JointRows<T> own{};  // their q + W e

  JointPass(const GatherParams& params, Arena& a)
      : p(params),
        heads(params),
        joint(params, a, kEdgeLanes),
        read_q(a, false, params.heads, params.head_dim),
        width(joint.width),
        lde(round_up(params.joint_dim, L)),
        far(rows_outgrow(kNearBytes, params, params.seqlen_k, params.heads_k)) {
    sums = a.take<T>(kEdgeLanes * width);
    de = a.take<T>(lde);
    dW = a.take<T>(joint.dim * width);
    parts = a.take<Vec<T>>(4 * lde);
    if (!a.base) return;
    memset(dW, 0, size_t(joint.dim * width) * sizeof(T));
    memset(parts, 0, size_t(4 * lde) * sizeof(Vec<T>));
  }

  void group(const EdgeNumbers<T>& numbers, const EdgeGroup& g, double* all_dW) {
    const Slopes<T>& slopes = numbers.slopes;
    memset(sums, 0, size_t(kEdgeLanes * width) * sizeof(T));
    bool live[kEdgeLanes] = {};
    if (slopes.kept && all_dW) joint.features.read(g.n, g.ahead(), [&](int64_t e) { return g.id(e); });
    for (int64_t b = 0; b < p.batch; ++b) {
      if (!slopes.kept) read_rows(b, g);
      for (int64_t e = 0; e < g.n; ++e)
        for (int64_t h = 0; h < p.heads; ++h) {
          const T grad = numbers.grads[numbers.at(b, g.begin + e) + h];
          if (grad == T(0)) continue;
          live[e] = true;
          add_edge_gradient(slopes, b, g.begin + e, e, h, grad);
        }
    }
    for (int64_t e = 0; p.needs & kNeedEdgeX && e < g.n; e += 4) {
      for (int64_t c = 0; c < joint.dim; c += joint.dim - c >= kFeatures ? kFeatures : 1)
        joint.dim - c >= kFeatures ? feature_parts<kFeatures>(e, c) : feature_parts<1>(e, c);
      write_features(g, e, min64(4, g.n - e));
    }
    if (!all_dW) return;
    for (int64_t e = 0; e < g.n; ++e)
      if (!live[e]) joint.features.drop(e);
    for (int64_t c = 0; c < joint.dim; c += joint.dim - c >= 4 ? 4 : 1)
      joint.dim - c >= 4 ? add_weights<4>(c, g.n) : add_weights<1>(c, g.n);
    if (++steps == kSteps) finish_weights(all_dW);
  }
  // What the last steps left joins the item's part of dW.
  void finish_weights(double* all_dW) {
    for (int64_t x = 0; x < joint.dim * width; x += L) {
      add_wide<T>(all_dW + x, load(dW + x), L);
      store(dW + x, Vec<T>{});
    }
    steps = 0;
  }

 private:
  void read_rows(int64_t b, const EdgeGroup& g) {
    const RowsAhead ask(far, p.k, b, p.heads_k, p.head_dim, p.indices, g.begin, g.n, p.edges);
    for (int64_t e = 0; e < ask.n; ++e) ask(e);
    OwnRows<T> q;
    read_q.read(p.q, b, g.rows, g.n, q);
    keys = EdgeRows<S>(p.k, b, p.indices + g.begin, g.n);
    own = joint.join(q, 1, g.n, g.ahead(), [&](int64_t e) { return g.id(e); });
  }
  // J of head h of the step's edge e, which is `edge` of the graph.
  void add_edge_gradient(const Slopes<T>& slopes, int64_t b, int64_t edge, int64_t e, int64_t h, T grad) {
    T* const to = sums + e * width + h * joint.ld;
    if (slopes.kept) {
      const MaskBits<T>* bits = slopes.of(b, edge);
      return slopes.add(p, h, &bits, 1, false, to, &grad, 1);
    }
    EdgeRows<S> key;
    JointRows<T> mine;
    key.at[0] = keys.at[e], key.head = keys.head;
    mine.rows.at[0] = own.rows.at[e], mine.rows.head = own.rows.head, mine.group = own.group;
    additive_edge_gradient<T, S>(p, h, mine, key, heads.key(h), 1, false, to, nullptr, &grad, 1);
  }
  // Of C features of four edges: de before its lanes are summed.
  template <int C>
  void feature_parts(int64_t e, int64_t c) {
    Vec<T> sum[4][C] = {};
    const T *J = sums + e * width, *w = joint.weights + c * width;
    for (int64_t x = 0; x < width; x += L)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) {
        const Vec<T> weight = load(w + j * width + x);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[i][j] += load(J + i * width + x) * weight;
      }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) parts[i * lde + c + j] = sum[i][j];
  }
  void write_features(const EdgeGroup& g, int64_t e, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < joint.dim; c += L)
        store_sums<T>(parts + i * lde + c, min64(L, joint.dim - c), de + c);
      memcpy(static_cast<T*>(p.dedge_x) + g.id(e + i) * joint.dim, de, size_t(joint.dim) * sizeof(T));
    }
  }
  // The part of n edges in C rows of dW.
  template <int C>
  void add_weights(int64_t c, int64_t n) {
    for (int64_t x = 0; x < width; x += L) {
      Vec<T> sum[C] = {};
      for (int64_t e = 0; e < n; ++e) {
        const Vec<T> J = load(sums + e * width + x);
        const T* feature = joint.features.rows.at[e] + c;
#pragma GCC unroll 4
        for (int i = 0; i < C; ++i) sum[i] += feature[i] * J;
      }
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) {
        T* const to = dW + (c + i) * width + x;
        store(to, load(to) + sum[i]);
      }
    }
  }
};

template <typename T, typename S>
static void gather_joint_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  Arena arena{scratch}, shared{workspace};
  const EdgeNumbers<T> numbers(p, shared);
  JointPass<T, S> pass(p, arena);
  const int64_t size = p.joint_dim * pass.width;
  double* dW = p.needs & kNeedEdgeQ ? numbers.joint + item * size : nullptr;
  if (dW) memset(dW, 0, size_t(size) * sizeof(double));
  for_each_group(p, item, [&](const EdgeGroup& g) { pass.group(numbers, g, dW); });
  if (dW) pass.finish_weights(dW);
}

// dW [H][D][De], the items' parts in their order.
template <typename T>
static void gather_joint_sum(const GatherParams& p, int64_t h, char*, char* workspace) {
  Arena shared{workspace};
  const EdgeNumbers<T> numbers(p, shared);
  const int64_t ld = round_up(p.head_dim, kLanes<T>), width = p.heads * ld;
  for (int64_t d = 0; d < p.head_dim; ++d)
    for (int64_t c = 0; c < p.joint_dim; ++c) {
      double sum = 0;
      for (int64_t item = 0; item < edge_items(p); ++item)
        sum += numbers.joint[(item * p.joint_dim + c) * width + h * ld + d];
      reinterpret_cast<T*>(row_at(p.dedge_q, 0, h, d))[c * p.dedge_q.col] = T(sum);
    }
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
