// The gather body's backward, of single edges: gradients of their biases and features, and the weight of
// scores.
#pragma once
#include "gather_columns.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// f(EdgeGroup) for the edges of an item, up to 16 at a time; of the first batch entry.
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
    f(EdgeGroup{&p, 0, at, n, rows});
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

  // dedge_x of the edges, summed over heads and batch.
  void group(const EdgeNumbers<T>& numbers, const EdgeGroup& g) {
    memset(sums, 0, size_t(kEdgeLanes * lde) * sizeof(T));
    for (int64_t b = 0; b < p.batch; ++b) {
      OwnRows<T> query, grad;
      read_query.read(p.edge_q, b, g.rows, g.n, query);
      read_grad.read(p.dout_edge, b, g.rows, g.n, grad);
      for (int64_t e = 0; e < g.n; ++e)
        for (int64_t c = 0; c < lde; c += kLanes<T>)
          add(numbers, numbers.at(b, g.begin + e), query.of(e), grad.of(e), c, sums + e * lde + c);
    }
    for (int64_t e = 0; e < g.n; ++e)
      memcpy(static_cast<T*>(p.dedge_x) + g.id(e) * p.edge_dim, sums + e * lde,
             size_t(p.edge_dim) * sizeof(T));
  }

 private:
  // A vector of one edge's. Of a masked edge, whose query may be NaN, nothing.
  SACCADE_MEMBER void add(const EdgeNumbers<T>& numbers, int64_t at, HeadRows<T> query, HeadRows<T> grad,
                          int64_t c, T* to) {
    Vec<T> sum = load(to);
    for (int64_t h = 0; h < p.heads; ++h) {
      sum = add_edge<false>(sum, numbers.grads[at + h], load(query[h] + c));
      sum = add_edge<false>(sum, numbers.weights[at + h], load(grad[h] + c));
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
    return for_each_group(p, item, [&](const EdgeGroup& g) { pass.group(numbers, g); });
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

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
