// The end of the gather body's backward: what belongs to single edges, and the weights of scores and
// features.
#pragma once
#include "gather_columns.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// f(rows, at, n) for the edges of an item, up to 16 from `at` on at a time, and the row of each.
template <typename F>
static void for_each_group(const GatherParams& p, int64_t item, F f) {
  const int64_t begin = item * kEdgeItem, end = min64(p.edges, begin + kEdgeItem);
  int64_t row = 0, high = p.seqlen_q;
  while (high - row > 1) {
    const int64_t mid = (row + high) / 2;
    (p.indptr[mid] <= begin ? row : high) = mid;
  }
  for (int64_t at = begin, n; at < end; at += n) {
    int32_t rows[kEdgeLanes];
    n = min64(kEdgeLanes, end - at);
    for (int64_t e = 0; e < n; ++e) {
      while (p.indptr[row + 1] <= at + e) ++row;
      rows[e] = int32_t(row);
    }
    f(rows, at, n);
  }
}

// dedge_bias of an item's edges, summed over the batch.
template <typename T>
static void edge_bias_gradients(const GatherParams& p, const EdgeNumbers<T>& numbers, int64_t item) {
  for (int64_t e = item * kEdgeItem; e < min64(p.edges, (item + 1) * kEdgeItem); ++e) {
    T* out = static_cast<T*>(p.dedge_bias) + edge_id(p, e);
    T all = T(0);
    for (int64_t h = 0; h < p.heads; ++h) {
      T sum = T(0);
      for (int64_t b = 0; b < p.batch; ++b) sum += numbers.logit[(b * p.edges + e) * numbers.pitch + h];
      if (p.edge_bias_head) out[h * p.edge_bias_head] = sum;
      all += sum;
    }
    if (!p.edge_bias_head) *out = all;
  }
}

// The gradient of features beside the keys, of 16 edges at a time whatever rows they belong to.
template <typename T, typename S>
struct FeaturePass {
  const GatherParams& p;
  RowReader<T, S> read_query, read_grad;
  int64_t lde;
  T* sums;  // [kEdgeLanes][lde]

  FeaturePass(const GatherParams& params, Arena& a)
      : p(params),
        read_query(a, false, p.heads, p.edge_dim),
        read_grad(a, false, p.heads, p.edge_dim),
        lde(round_up(p.edge_dim, kLanes<T>)),
        sums(a.take<T>(kEdgeLanes * lde)) {}

  // dedge_x of n edges from `at` on, summed over heads and batch.
  void group(const EdgeNumbers<T>& numbers, const int32_t* rows, int64_t at, int64_t n) {
    memset(sums, 0, size_t(kEdgeLanes * lde) * sizeof(T));
    for (int64_t b = 0; b < p.batch; ++b) {
      OwnRows<T> query, grad;
      read_query.read(p.edge_q, b, rows, n, query);
      read_grad.read(p.dout_edge, b, rows, n, grad);
      for (int64_t e = 0; e < n; ++e)
        for (int64_t c = 0; c < lde; c += kLanes<T>)
          add(numbers.of(b, at + e), numbers.pitch, query.of(e), grad.of(e), c, sums + e * lde + c);
    }
    for (int64_t e = 0; e < n; ++e)
      memcpy(static_cast<T*>(p.dedge_x) + edge_id(p, at + e) * p.edge_dim, sums + e * lde,
             size_t(p.edge_dim) * sizeof(T));
  }

 private:
  // A vector of one edge's. Of a masked edge, whose query may be NaN, nothing.
  SACCADE_MEMBER void add(const T* pair, int64_t pitch, HeadRows<T> query, HeadRows<T> grad, int64_t c,
                          T* to) {
    Vec<T> sum = load(to);
    for (int64_t h = 0; h < p.heads; ++h) {
      sum = add_edge<false>(sum, pair[pitch + h], load(query[h] + c));
      sum = add_edge<false>(sum, pair[h], load(grad[h] + c));
    }
    store(to, sum);
  }
};

// What belongs to single edges; and, in the last item, the weight of the score.
template <typename T, typename S>
static void gather_edges_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  Arena arena{scratch}, shared{workspace};
  const EdgeNumbers<T> numbers(p, shared);
  if (item < edge_items(p)) {
    if (p.needs & kNeedEdgeBias) edge_bias_gradients(p, numbers, item);
    if (!p.edge_dim || !(p.needs & kNeedEdgeX)) return;
    FeaturePass<T, S> pass(p, arena);
    return for_each_group(
        p, item, [&](const int32_t* rows, int64_t at, int64_t n) { pass.group(numbers, rows, at, n); });
  }
  if (!(p.needs & kNeedWeight)) return;
  const int64_t n = p.heads * p.head_dim, parts = p.batch * row_split<T>(p).items();
  T* dw = static_cast<T*>(p.dweight);
  for (int64_t x = 0; x < n; ++x) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += numbers.dweight[part * n + x];
    dw[x] = T(sum);
  }
}

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
  EdgeRows<S> keys;  // of the edges of a step, as are their q + W e
  JointRows<T> own{};

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

  // n edges from `at` on.
  void group(const EdgeNumbers<T>& numbers, const int32_t* rows, int64_t at, int64_t n, double* all_dW) {
    const auto id = [&](int64_t e) { return edge_id(p, at + e); };
    const int64_t more = min64(kEdgeLanes, p.edges - at - n);
    memset(sums, 0, size_t(kEdgeLanes * width) * sizeof(T));
    bool live[kEdgeLanes] = {};
    if (numbers.slopes.base) joint.features.read(n, more, id);
    for (int64_t b = 0; b < p.batch; ++b) {
      if (!numbers.slopes.base) read_rows(b, rows, at, n, more);
      for (int64_t e = 0; e < n; ++e)
        for (int64_t h = 0; h < p.heads; ++h) {
          const T grad = numbers.of(b, at + e)[heads.pitch + h];
          if (grad == T(0)) continue;
          live[e] = true;
          add_edge_gradient(numbers.slopes, b, at, e, h, grad);
        }
    }
    for (int64_t e = 0; e < n; ++e)
      if (!live[e]) joint.features.drop(e);
    for (int64_t e = 0; p.needs & kNeedEdgeX && e < n; e += 4) {
      for (int64_t c = 0; c < joint.dim; c += joint.dim - c >= kFeatures ? kFeatures : 1)
        joint.dim - c >= kFeatures ? feature_parts<kFeatures>(e, c) : feature_parts<1>(e, c);
      write_features(e, min64(4, n - e), at);
    }
    if (!all_dW) return;
    for (int64_t c = 0; c < joint.dim; c += joint.dim - c >= 4 ? 4 : 1)
      joint.dim - c >= 4 ? add_weights<4>(c, n) : add_weights<1>(c, n);
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
  void read_rows(int64_t b, const int32_t* rows, int64_t at, int64_t n, int64_t more) {
    const RowsAhead ask(far, p.k, b, p.heads_k, p.head_dim, p.indices, at, n, p.edges);
    for (int64_t e = 0; e < ask.n; ++e) ask(e);
    OwnRows<T> q;
    read_q.read(p.q, b, rows, n, q);
    keys = EdgeRows<S>(p.k, b, p.indices + at, n);
    own = joint.join(q, 1, n, more, [&](int64_t e) { return edge_id(p, at + e); });
  }
  // J of edge e and head h.
  void add_edge_gradient(const Slopes<T>& slopes, int64_t b, int64_t at, int64_t e, int64_t h, T grad) {
    T* const to = sums + e * width + h * joint.ld;
    if (slopes.base) {
      const LaneBits<T>* bits = slopes.of(b, at + e);
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
  void write_features(int64_t e, int64_t n, int64_t at) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < joint.dim; c += L)
        store_sums<T>(parts + i * lde + c, min64(L, joint.dim - c), de + c);
      memcpy(static_cast<T*>(p.dedge_x) + edge_id(p, at + e + i) * joint.dim, de,
             size_t(joint.dim) * sizeof(T));
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
  for_each_group(p, item,
                 [&](const int32_t* rows, int64_t at, int64_t n) { pass.group(numbers, rows, at, n, dW); });
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
