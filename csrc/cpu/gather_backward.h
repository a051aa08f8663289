// The gather body, backward. Rows first: dQ, and per edge and head its weight and score gradient. Then
// columns, over the transposed graph: dK and dV are sums of those over the queries that attend to a key. No
// atomics; every sum has one order.
#pragma once
#include "gather_edges.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// The pass over rows, with one thread's scratch. Numbers of pairs and of heads lie as HeadLanes has them.
template <typename T, typename S>
struct RowPass {
  const GatherParams& p;
  GatherScratch<T, S> w;
  T *dout_rows, *dout_edge_rows, *own, *lse, *low, *delta, *drop, *cap, *dP, *g, *joined;
  int64_t ldq;
  WeightOf<T> weight_of{false, T(1)};  // edges carry natural logits
  HeadRows<T> dout, dout_edge;

  RowPass(const GatherParams& params, Arena& a) : p(params), w(params, a) {
    const int64_t pairs = w.heads.size(kEdgeLanes), lanes = w.heads.lanes();
    ldq = round_up(p.head_dim, kLanes<T>);
    dout_rows = a.take<T>(p.heads * round_up(p.head_dim_v, kLanes<T>));
    dout_edge_rows = a.take<T>(p.heads * w.lde);
    own = a.take<T>(EdgeNumbers<T>::piece_size(p));
    lse = a.take<T>(lanes);
    low = a.take<T>(lanes);
    delta = a.take<T>(lanes);
    drop = a.take<T>(p.dropout_p > 0 ? pairs : 0);
    cap = a.take<T>(p.softcap != 0 ? pairs : 0);
    dP = a.take<T>(pairs);
    g = a.take<T>(pairs + kLanes<T>);
    joined = a.take<T>(2 * pairs + kLanes<T>);
  }

  void read_douts(int64_t b, int64_t row) {
    dout = read_heads<T, S>(p.dout, b, row, p.heads, p.head_dim_v, dout_rows);
    if (p.edge_dim) dout_edge = read_heads<T, S>(p.dout_edge, b, row, p.heads, p.edge_dim, dout_edge_rows);
  }
  // What belongs to the row as a whole.
  void prepare(int64_t b, int64_t row) {
    const HeadLanes<T>& heads = w.heads;
    read_douts(b, row);
    w.read_queries(p, b, row);
    if (!is_softmax(p)) return;
    pair_sums(heads, 1, w.parts, delta, [&](int64_t, Vec<T>* into) {
      for (int64_t h = 0; h < p.heads; ++h) {
        into[h] = dot_part<T, S>(dout[h], typed_row<S>(p.out, b, h, row), p.head_dim_v);
        if (p.edge_dim)
          into[h] += dot_part<T, S>(dout_edge[h], typed_row<S>(p.out_edge, b, h, row), p.edge_dim);
      }
    });
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t at = b * p.lse_batch + h * p.lse_head + row;
      weight_of.split(p.lse[at], lse[h], low[h]);
      if (p.dlse) delta[h] -= T(p.dlse[at]);
    }
    for (int64_t h = p.heads; h < heads.pitch; ++h) lse[h] = low[h] = T(0);
    T* const numbers[] = {lse, low, delta};
    for (T* x : numbers)
      if (heads.pitch < kLanes<T>) store(x, repeat_heads<T>(load(x), heads.pitch));
  }

  // dP of the edges of one piece, to where a pass over keys will find it: each group's numbers begin with it.
  void value_piece(int64_t b, RowSplit::Piece piece, const EdgeNumbers<T>& numbers) {
    for (int64_t at = piece.begin; at < piece.end; at += kEdgeLanes) {
      const EdgeGroup e16(p, b, piece.row, at, piece.end, w.live);
      w.read_features(p, e16);
      value_dots(e16);
      copy_numbers(numbers.of(b, at), dP, e16.n * w.heads.pitch);
    }
  }

  // The edges of one piece: their numbers, and their part of dQ (and of the edge queries' gradient, behind
  // it).
  void piece(int64_t b, RowSplit::Piece piece, const EdgeNumbers<T>& numbers, T* dq, double* dW) {
    const HeadLanes<T>& heads = w.heads;
    for (int64_t at = piece.begin; at < piece.end; at += kEdgeLanes) {
      const EdgeGroup e16(p, b, piece.row, at, piece.end, w.live);
      const EdgeRows<S> keys(p.k, b, p.indices + at, e16.n);
      const int64_t pairs = e16.n * heads.pitch;
      w.read_features(p, e16);
      if (w.far)
        copy_numbers(dP, numbers.of(b, at), pairs);
      else
        value_dots(e16);
      edge_logits<T, S>(p, e16, keys, w, cap);
      if (p.dropout_p > 0) {
        for (int64_t c = 0; c < heads.size(e16.n); ++c) drop[c] = T(1);
        drop_edges(p, e16, heads.pitch, drop);
      }
      weigh(heads.size(e16.n));
      join_numbers(e16.n);
      copy_numbers(numbers.of(b, at), joined, 2 * pairs);
      if (p.needs & kNeedEdgeBias) copy_numbers(numbers.logit + (b * p.edges + at) * heads.pitch, dP, pairs);
      if (p.needs & (kNeedQ | kNeedEdgeQ | kNeedWeight)) add_queries(e16, keys, at == piece.begin, dq, dW);
    }
  }

 private:
  // dP[pair] = dout . value, and its part through the edges' features.
  void value_dots(const EdgeGroup& g) {
    const EdgeRows<S> values(p.v, g.b, p.indices + g.begin, g.n);
    const int64_t ahead = w.far ? edges_ahead(g.begin, g.n, p.edges) : 0;
    pair_dots<T, S>(w.heads, dout, values, g.n, p.head_dim_v, w.parts, dP, [&](int64_t e) {
      if (e < ahead)
        prefetch_rows<S>(p.v, g.b, 0, p.heads_k, p.indices[g.begin + kEdgeLanes + e], p.head_dim_v);
    });
    w.add_feature_dots(p, dout_edge, g.n, dP);
  }
  // w.s: logits to weights after dropout; dP to the gradient of the logit; g that of the bare score. Exactly
  // 0 where an edge is masked.
  void weigh(int64_t size) {
    constexpr int L = kLanes<T>;
    const int64_t step = w.heads.lanes();
    const Vec<T> none{};
    for (int64_t c = 0, h = 0; c < size; c += L, h = h + L < step ? h + L : 0) {
      const Vec<T> logit = load(w.s + c);
      Vec<T> d = load(dP + c), weight, grad;
      if (p.dropout_p > 0) d = d * load(drop + c);
      if (is_softmax(p)) {
        weight = weight_of(logit, load(lse + h), load(low + h));
        grad = weight * (d - load(delta + h));
      } else {
        weight = activate<T>(p.activation, logit);
        grad = p.activation == Activation::kReLU ? (weight > T(0) ? d : none) : weight * (T(1) - weight) * d;
      }
      if (p.dropout_p > 0) weight = weight * load(drop + c);
      grad = logit == -kInf<T> ? none : grad;
      store(w.s + c, logit == -kInf<T> ? none : weight);
      store(dP + c, grad);
      Vec<T> raw = grad * T(p.scale);
      if (p.softcap != 0) {
        const Vec<T> t = load(cap + c);
        raw = raw == T(0) ? none : raw * (T(1) - t * t);  // a masked edge's t may be NaN
      }
      store(g + c, raw);
    }
  }
  // Weights and score gradients edge by edge; a vector that reaches too far is written over by the next.
  void join_numbers(int64_t n) {
    const int64_t pitch = w.heads.pitch;
    for (int64_t e = 0; e < n; ++e)
      for (int64_t part = 0; part < 2; ++part)
        for (int64_t c = 0; c < pitch; c += kLanes<T>)
          store(joined + (2 * e + part) * pitch + c, load((part ? g : w.s) + e * pitch + c));
  }
  void add_queries(const EdgeGroup& e16, const EdgeRows<S>& keys, bool fresh, T* dq, double* dW) {
    const HeadLanes<T>& heads = w.heads;
    T* dqe = dq + p.heads * ldq;
    if (p.score != Score::kDot) {
      for (int64_t h = 0; h < p.heads; ++h)
        additive_edge_gradient<T, S>(p, h, w.own, keys, heads.key(h), e16.n, fresh, dq + h * ldq,
                                     dW + h * p.head_dim, g + h, heads.pitch);
      return;
    }
    const int64_t together = heads_together(e16.live, heads, keys.head, p.head_dim);
    for (int64_t h = 0; h < p.heads; h += together)
      edge_sums<T, S>(together, e16.live, dq + h * ldq, fresh, keys, heads.key(h), e16.n, p.head_dim, g + h,
                      heads.pitch, w.zeros);
    for (int64_t h = 0; p.edge_dim && h < p.heads; ++h)
      edge_sums<T, T>(1, e16.live, dqe + h * w.lde, fresh, w.feature_rows, 0, e16.n, p.edge_dim, g + h,
                      heads.pitch, w.zero_features);
  }
};

template <typename T, typename S>
static void write_queries(const GatherParams& p, int64_t b, int64_t row, const T* dq, int64_t ldq,
                          int64_t lde) {
  if (p.needs & kNeedQ) write_heads<T, S>(p.dq, b, row, p.heads, dq, ldq, nullptr, p.head_dim);
  if (p.edge_dim && p.needs & kNeedEdgeQ)
    write_heads<T, S>(p.dedge_q, b, row, p.heads, dq + p.heads * ldq, lde, nullptr, p.edge_dim);
}

template <typename T, typename S>
static void gather_values_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  const RowSplit split(p.indptr, p.seqlen_q, p.edges);
  const int64_t b = item / split.items(), t = item % split.items();
  Arena arena{scratch}, shared{workspace};
  RowPass<T, S> pass(p, arena);
  const EdgeNumbers<T> numbers(p, shared);
  split.for_each(t, [&](RowSplit::Piece piece) {
    if (piece.begin < piece.end) pass.read_douts(b, piece.row);
    pass.value_piece(b, piece, numbers);
  });
}

template <typename T, typename S>
static void gather_rows_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  const RowSplit split(p.indptr, p.seqlen_q, p.edges);
  const int64_t b = item / split.items(), t = item % split.items(), size = EdgeNumbers<T>::piece_size(p);
  Arena arena{scratch}, shared{workspace};
  RowPass<T, S> pass(p, arena);
  EdgeNumbers<T> numbers(p, shared);
  double* dW = p.weight ? numbers.dweight + item * p.heads * p.head_dim : nullptr;
  if (dW) memset(dW, 0, size_t(p.heads * p.head_dim) * sizeof(double));
  split.for_each(t, [&](RowSplit::Piece piece) {
    const bool entire = piece.first && piece.last;
    T* const place = entire && p.edge_dim == 0 && p.needs & kNeedQ
                         ? sums_in_place<T, S>(p.dq, b, piece.row, p.heads, p.head_dim)
                         : nullptr;
    T* dq = place    ? place
            : entire ? pass.own
                     : shared_piece(numbers.pieces, size, split.items(), b, t, piece.first ? 1 : 0);
    if (piece.begin == piece.end) memset(dq, 0, size_t(size) * sizeof(T));
    pass.prepare(b, piece.row);
    pass.piece(b, piece, numbers, dq, dW);
    if (entire && !place) write_queries<T, S>(p, b, piece.row, dq, pass.ldq, pass.w.lde);
  });
}

template <typename T, typename S>
static void gather_rows_merge(const GatherParams& p, int64_t item, char*, char* workspace) {
  const RowSplit split(p.indptr, p.seqlen_q, p.edges);
  Arena shared{workspace};
  const EdgeNumbers<T> numbers(p, shared);
  T* sum;
  const int64_t b = item / split.items(), t = item % split.items();
  const int64_t row = sum_pieces(split, b, t, numbers.pieces, EdgeNumbers<T>::piece_size(p), sum);
  if (row >= 0)
    write_queries<T, S>(p, b, row, sum, round_up(p.head_dim, kLanes<T>), round_up(p.edge_dim, kLanes<T>));
}

template <typename T, typename S>
static Plan<GatherParams> gather_backward_plan(const GatherParams& p) {
  Plan<GatherParams> plan;
  const RowSplit rows(p.indptr, p.seqlen_q, p.edges), columns(p.t_indptr, p.seqlen_k, p.edges);
  Arena a{nullptr}, b{nullptr}, c{nullptr}, shared{nullptr};
  const RowPass<T, S> row_pass(p, a);
  const ColumnPass<T, S> column_pass(p, b);
  const JointPass<T, S> joint_pass(p, c);
  const EdgeNumbers<T> numbers(p, shared);
  b.take<T>(3 * round_up(p.edge_dim, kLanes<T>) + 64);
  plan.scratch_bytes = size_t(max64(a.used, max64(b.used, c.used)));
  plan.workspace_bytes = shared.used;
  if (row_pass.w.far) plan.add(p.batch * rows.items(), &gather_values_item<T, S>);
  plan.add(p.batch * rows.items(), &gather_rows_item<T, S>);
  if (rows.items() > 1) plan.add(p.batch * rows.items(), &gather_rows_merge<T, S>);
  if (const int64_t both = p.needs & (kNeedK | kNeedV)) {
    if (both == (kNeedK | kNeedV) && !column_pass.far)
      plan.add(p.batch * columns.items(), &gather_columns_item<T, S, kNeedK | kNeedV>);
    else {
      if (both & kNeedK) plan.add(p.batch * columns.items(), &gather_columns_item<T, S, kNeedK>);
      if (both & kNeedV) plan.add(p.batch * columns.items(), &gather_columns_item<T, S, kNeedV>);
    }
    if (columns.items() > 1) plan.add(p.batch * columns.items(), &gather_columns_merge<T, S>);
  }
  if (p.needs & (kNeedEdgeBias | kNeedWeight) || (p.edge_dim && p.needs & kNeedEdgeX))
    plan.add(edge_items(p) + 1, &gather_edges_item<T>);
  if (p.joint_dim && p.needs & (kNeedEdgeQ | kNeedEdgeX)) {
    plan.add(edge_items(p), &gather_joint_item<T, S>);
    if (p.needs & kNeedEdgeQ) plan.add(p.heads, &gather_joint_sum<T>);
  }
  return plan;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
