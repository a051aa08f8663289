// The gather body, backward. Rows first: dQ, and per edge and head its weight and score gradient (E x H
// numbers). Then columns, over the transposed graph: dK and dV are sums of those over the queries that attend
// to a key. No atomics; every sum has one order.
#pragma once
#include "gather_forward.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

template <typename T>
struct EdgeNumbers {
  T *weight, *score, *logit;  // [B][E][H]: after dropout; gradient of the bare score; of the natural logit
                              // (with edge_bias only)
  T* pieces;
  double* dweight;  // cut rows; partial gradients of the score's weight, [B x items][H][D]
  T* columns;       // cut columns

  static int64_t piece_size(const GatherParams& p) {
    return p.heads * (round_up(p.head_dim, kLanes<T>) + round_up(p.edge_dim, kLanes<T>));
  }
  static int64_t column_size(const GatherParams& p) {
    return p.heads_k * (round_up(p.head_dim, kLanes<T>) + round_up(p.head_dim_v, kLanes<T>));
  }
  EdgeNumbers(const GatherParams& p, Arena& a) {
    const int64_t numbers = p.batch * p.edges * p.heads;
    const int64_t items = RowSplit(p.indptr, p.seqlen_q, p.edges).items(),
                  t_items = RowSplit(p.t_indptr, p.seqlen_k, p.edges).items();
    weight = a.take<T>(numbers);
    score = a.take<T>(numbers);
    logit = a.take<T>(p.needs & kNeedEdgeBias ? numbers : 0);
    pieces = a.take<T>(p.batch * items * 2 * piece_size(p));
    dweight = a.take<double>(p.weight ? p.batch * items * p.heads * p.head_dim : 0);
    columns = a.take<T>(p.batch * t_items * 2 * column_size(p));
  }
};

// y += sum_e g(e) w phi'(q + k_e), and dw += sum_e g(e) phi(q + k_e) where asked: the additive scores'
// gradient towards q (or k).
template <typename T, typename S, typename G>
static void additive_edge_gradient(const GatherParams& p, const T* w, const T* q, const EdgeRows<S>& rows,
                                   int64_t n, T* y, double* dw, G g) {
  constexpr int L = kLanes<T>;
  const T slope = T(p.slope);
  for (int64_t c = 0; c < p.head_dim; c += L) {
    const int64_t width = min64(L, p.head_dim - c);
    const Vec<T> weight = width == L ? load(w + c) : load_part<T>(w + c, width), own = load(q + c);
    Vec<T> sum = load(y + c), sum_w{};
    for (int64_t e = 0; e < n; ++e) {
      if (g(e) == T(0)) continue;  // a masked edge: phi may be NaN where its key is
      const Vec<T> x =
          own + (width == L ? load_as<T>(rows.row(e) + c) : load_part<T>(rows.row(e) + c, width));
      Vec<T> phi, slope_of;
      if (p.score == Score::kAdditive) {
        phi = tanhv<T>(x);
        slope_of = T(1) - phi * phi;
      } else {
        phi = x > T(0) ? x : slope * x;
        slope_of = x > T(0) ? splat<T>(T(1)) : splat<T>(slope);
      }
      sum += g(e) * weight * slope_of;
      sum_w += g(e) * phi;
    }
    store(y + c, sum);
    if (dw)
      for (int64_t l = 0; l < width; ++l) dw[c + l] += double(sum_w[int(l)]);
  }
}

template <typename T, typename S>
struct RowPass {
  const GatherParams& p;
  int64_t b;
  GatherScratch<T, S>& w;
  EdgeNumbers<T>& numbers;
  T *dout, *dout_edge, *dq, *dqe;  // [H][ld]; dq and dqe one piece
  double* dW;
  T *lse, *low, *delta, *cap, *dP, *g;
  int64_t ldv;
  WeightOf<T> weight_of{false, T(1)};  // edges carry natural logits

  void prepare(int64_t row) {
    read_heads<T, S>(p.dout, b, row, p.heads, p.head_dim_v, ldv, dout);
    if (p.edge_dim) read_heads<T, S>(p.dout_edge, b, row, p.heads, p.edge_dim, w.lde, dout_edge);
    w.read_queries(p, b, row);
    for (int64_t h = 0; h < p.heads; ++h) {
      lse[h] = low[h] = delta[h] = T(0);
      if (!is_softmax(p)) continue;
      const int64_t at = b * p.lse_batch + h * p.lse_head + row;
      weight_of.split(p.lse[at], lse[h], low[h]);
      T sum = lanes_sum<T>(dot_part<T>(dout + h * ldv, typed_row<S>(p.out, b, h, row), p.head_dim_v));
      if (p.edge_dim)
        sum +=
            lanes_sum<T>(dot_part<T>(dout_edge + h * w.lde, typed_row<S>(p.out_edge, b, h, row), p.edge_dim));
      delta[h] = sum - (p.dlse ? T(p.dlse[at]) : T(0));
    }
  }

  void piece(RowSplit::Piece piece) {
    const int64_t group = p.heads / p.heads_k;
    const bool far = rows_lie_far(p, p.seqlen_k, p.heads_k);
    for (int64_t at = piece.begin; at < piece.end; at += kEdgeLanes) {
      const EdgeGroup e16 = edge_group(p, b, piece.row, at, piece.end);
      const int32_t* later = p.indices + at + kEdgeLanes;
      const int64_t ahead = edges_ahead(at, e16.n, p.edges);
      w.read_features(p, e16);
      w.rows = w.point(p.k, e16, b);
      EdgeRows<S> values = w.point(p.v, e16, b);
      for (int64_t h = 0; h < p.heads; ++h) {
        w.rows.offset = h / group * p.k.head;
        values.offset = h / group * p.v.head;
        if (far && h % group == 0) {
          prefetch_rows<S>(p.k, b, h / group, later, ahead, p.head_dim);
          prefetch_rows<S>(p.v, b, h / group, later, ahead, p.head_dim_v);
        }
        edge_dots<T, S>(dout + h * ldv, values, e16.n, p.head_dim_v, dP);
        if (p.edge_dim) {
          T extra[kEdgeLanes];
          edge_dots<T, T>(dout_edge + h * w.lde, w.feature_rows, e16.n, p.edge_dim, extra);
          for (int64_t e = 0; e < e16.n; ++e) dP[e] += extra[e];
        }
        edge_logits<T, S>(p, e16, h, w, w.s, cap);
        weigh(piece.row, e16, h);
        add_queries(at, e16, h);
      }
    }
  }

 private:
  // w.s: logits to weights after dropout; dP to the gradient of the logit; g that of the bare score. Exactly
  // 0 where an edge is masked.
  void weigh(int64_t row, const EdgeGroup& e16, int64_t h) {
    T z[kEdgeLanes];
    for (int64_t e = 0; e < kEdgeLanes; ++e)
      z[e] = p.dropout_p > 0 && e < e16.n ? dropout_factor<T>(p, b, h, row, e16.key[e]) : T(1);
    for (int64_t c = 0; c < kEdgeLanes; c += kLanes<T>) {
      const Vec<T> logit = load(w.s + c), drop = load(z + c), d = load(dP + c) * drop, none{};
      Vec<T> weight, grad;
      if (is_softmax(p)) {
        weight = weight_of(logit, splat<T>(lse[h]), splat<T>(low[h]));
        grad = weight * (d - delta[h]);
      } else {
        weight = activate<T>(p.activation, logit);
        grad = p.activation == Activation::kReLU ? (weight > T(0) ? d : none) : weight * (T(1) - weight) * d;
      }
      grad = logit == -kInf<T> ? none : grad;
      store(w.s + c, logit == -kInf<T> ? none : weight * drop);
      store(dP + c, grad);
      Vec<T> raw = grad * T(p.scale);
      if (p.softcap != 0) {
        const Vec<T> t = load(cap + c);
        raw = raw == T(0) ? none : raw * (T(1) - t * t);  // a masked edge's t may be NaN
      }
      store(g + c, raw);
    }
  }
  // One head's numbers go to memory and into dQ.
  void add_queries(int64_t at, const EdgeGroup& e16, int64_t h) {
    const int64_t to = (b * p.edges + at) * p.heads + h;
    for (int64_t e = 0; e < e16.n; ++e) {
      numbers.weight[to + e * p.heads] = w.s[e];
      numbers.score[to + e * p.heads] = g[e];
    }
    if (p.needs & kNeedEdgeBias)
      for (int64_t e = 0; e < e16.n; ++e) numbers.logit[to + e * p.heads] = dP[e];
    const T* grad = g;
    const auto factor = [grad](int64_t e) { return grad[e]; };
    const EdgeRows<S> keys = e16.live ? w.rows : live_rows<T, S>(w.rows, factor, e16.n, w.zeros);
    if (p.score == Score::kDot) {
      edge_sum<T, S>(dq + h * w.ldq, keys, e16.n, p.head_dim, factor);
      if (p.edge_dim)
        edge_sum<T, T>(dqe + h * w.lde, live_rows<T, T>(w.feature_rows, factor, e16.n, w.zero_features),
                       e16.n, p.edge_dim, factor);
    } else {
      additive_edge_gradient<T, S>(p, static_cast<const T*>(p.weight) + h * p.head_dim, w.q + h * w.ldq, keys,
                                   e16.n, dq + h * w.ldq, dW + h * p.head_dim, factor);
    }
  }
};

template <typename T>
static void write_queries(const GatherParams& p, int64_t b, int64_t row, const T* dq, const T* dqe,
                          int64_t ldq, int64_t lde) {
  for (int64_t h = 0; h < p.heads; ++h) {
    if (p.needs & kNeedQ) write_row(row_at(p.dq, b, h, row), p.dq.dtype, p.dq.col, dq + h * ldq, p.head_dim);
    if (p.needs & kNeedEdgeQ)
      write_row(row_at(p.dedge_q, b, h, row), p.dedge_q.dtype, p.dedge_q.col, dqe + h * lde, p.edge_dim);
  }
}

template <typename T, typename S>
struct RowPassScratch {
  GatherScratch<T, S> w;
  T *dout, *dout_edge, *piece, *lse, *low, *delta, *cap, *dP, *g;
  int64_t ldv;
  RowPassScratch(const GatherParams& p, Arena& a) : w(p, a), ldv(round_up(p.head_dim_v, kLanes<T>)) {
    dout = a.take<T>(p.heads * ldv);
    dout_edge = a.take<T>(p.heads * w.lde);
    piece = a.take<T>(EdgeNumbers<T>::piece_size(p));
    lse = a.take<T>(p.heads);
    low = a.take<T>(p.heads);
    delta = a.take<T>(p.heads);
    cap = a.take<T>(kEdgeLanes);
    dP = a.take<T>(kEdgeLanes);
    g = a.take<T>(kEdgeLanes);
  }
};

template <typename T, typename S>
static void gather_rows_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  const RowSplit split(p.indptr, p.seqlen_q, p.edges);
  const int64_t b = item / split.items(), t = item % split.items(), size = EdgeNumbers<T>::piece_size(p);
  Arena arena{scratch}, shared{workspace};
  RowPassScratch<T, S> x(p, arena);
  EdgeNumbers<T> numbers(p, shared);
  double* dW = p.weight ? numbers.dweight + item * p.heads * p.head_dim : nullptr;
  if (dW) memset(dW, 0, size_t(p.heads * p.head_dim) * sizeof(double));
  split.for_each(t, [&](RowSplit::Piece piece) {
    const bool entire = piece.first && piece.last;
    T* dq = entire ? x.piece : shared_piece(numbers.pieces, size, split.items(), b, t, piece.first ? 1 : 0);
    memset(dq, 0, size_t(size) * sizeof(T));
    T* dqe = dq + p.heads * x.w.ldq;
    RowPass<T, S> pass{p,  b,     x.w,   numbers, x.dout, x.dout_edge, dq,  dqe,
                       dW, x.lse, x.low, x.delta, x.cap,  x.dP,        x.g, x.ldv};
    pass.prepare(piece.row);
    pass.piece(piece);
    if (entire) write_queries<T>(p, b, piece.row, dq, dqe, x.w.ldq, x.w.lde);
  });
}

template <typename T>
static void gather_rows_merge(const GatherParams& p, int64_t item, char*, char* workspace) {
  const RowSplit split(p.indptr, p.seqlen_q, p.edges);
  const int64_t b = item / split.items(), t = item % split.items(), size = EdgeNumbers<T>::piece_size(p);
  int64_t end = 0;
  const int64_t row = split.cut_row(t, end);
  if (row < 0) return;
  Arena shared{workspace};
  EdgeNumbers<T> numbers(p, shared);
  T* sum = shared_piece(numbers.pieces, size, split.items(), b, t, 1);
  for (int64_t other = t + 1; other <= end; ++other) {
    const T* part = shared_piece(numbers.pieces, size, split.items(), b, other, 0);
    for (int64_t x = 0; x < size; ++x) sum[x] += part[x];
  }
  const int64_t ldq = round_up(p.head_dim, kLanes<T>);
  write_queries<T>(p, b, row, sum, sum + p.heads * ldq, ldq, round_up(p.edge_dim, kLanes<T>));
}

template <typename T>
static void write_keys(const GatherParams& p, int64_t b, int64_t key, const T* sums, int64_t ldk,
                       int64_t ldv) {
  for (int64_t h = 0; h < p.heads_k; ++h) {
    if (p.needs & kNeedK)
      write_row(row_at(p.dk, b, h, key), p.dk.dtype, p.dk.col, sums + h * ldk, p.head_dim);
    if (p.needs & kNeedV)
      write_row(row_at(p.dv, b, h, key), p.dv.dtype, p.dv.col, sums + p.heads_k * ldk + h * ldv,
                p.head_dim_v);
  }
}

// dK and dV of the keys of one item of the transposed graph.
template <typename T, typename S>
static void gather_columns_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  const RowSplit split(p.t_indptr, p.seqlen_k, p.edges);
  const int64_t b = item / split.items(), t = item % split.items(), size = EdgeNumbers<T>::column_size(p),
                group = p.heads / p.heads_k;
  const int64_t ldk = round_up(p.head_dim, kLanes<T>), ldv = round_up(p.head_dim_v, kLanes<T>);
  Arena arena{scratch}, shared{workspace};
  EdgeNumbers<T> numbers(p, shared);
  T *own = arena.take<T>(size), *keys = arena.take<T>(p.heads_k * ldk);
  const bool live = all_edges_live(p), far = rows_lie_far(p, p.seqlen_q, p.heads);
  const int64_t widest = max64(p.head_dim, p.head_dim_v);
  S* zeros = arena.take<S>(widest);
  memset(zeros, 0, size_t(widest) * sizeof(S));
  split.for_each(t, [&](RowSplit::Piece piece) {
    const bool entire = piece.first && piece.last;
    T* sums = entire ? own : shared_piece(numbers.columns, size, split.items(), b, t, piece.first ? 1 : 0);
    memset(sums, 0, size_t(size) * sizeof(T));
    if (p.score != Score::kDot) read_heads<T, S>(p.k, b, piece.row, p.heads_k, p.head_dim, ldk, keys);
    for (int64_t at = piece.begin; at < piece.end; at += kEdgeLanes) {
      const int64_t n = min64(kEdgeLanes, piece.end - at), ahead = edges_ahead(at, n, p.edges);
      const int32_t* later = p.t_rows + at + kEdgeLanes;
      EdgeRows<S> queries, douts;
      const T *weights[kEdgeLanes], *grads[kEdgeLanes];
      for (int64_t e = 0; e < n; ++e) {
        const int64_t from = (b * p.edges + p.t_edges[at + e]) * p.heads;
        weights[e] = numbers.weight + from;
        grads[e] = numbers.score + from;
        queries.at[e] = typed_row<S>(p.q, b, 0, p.t_rows[at + e]);
        douts.at[e] = typed_row<S>(p.dout, b, 0, p.t_rows[at + e]);
      }
      for (int64_t e = 0; e < ahead; ++e) {
        const int64_t from = (b * p.edges + p.t_edges[at + kEdgeLanes + e]) * p.heads;
        __builtin_prefetch(numbers.weight + from);
        __builtin_prefetch(numbers.score + from);
      }
      for (int64_t h = 0; h < p.heads; ++h) {
        queries.offset = h * p.q.head;
        douts.offset = h * p.dout.head;
        if (far) {
          prefetch_rows<S>(p.q, b, h, later, ahead, p.head_dim);
          prefetch_rows<S>(p.dout, b, h, later, ahead, p.head_dim_v);
        }
        const auto grad = [&grads, h](int64_t e) { return grads[e][h]; };
        const auto weight = [&weights, h](int64_t e) { return weights[e][h]; };
        const EdgeRows<S> live_queries = live ? queries : live_rows<T, S>(queries, grad, n, zeros);
        const EdgeRows<S> live_douts = live ? douts : live_rows<T, S>(douts, weight, n, zeros);
        T* dk = sums + h / group * ldk;
        if (p.score == Score::kDot)
          edge_sum<T, S>(dk, live_queries, n, p.head_dim, grad);
        else
          additive_edge_gradient<T, S>(p, static_cast<const T*>(p.weight) + h * p.head_dim,
                                       keys + h / group * ldk, live_queries, n, dk, nullptr, grad);
        edge_sum<T, S>(sums + p.heads_k * ldk + h / group * ldv, live_douts, n, p.head_dim_v, weight);
      }
    }
    if (entire) write_keys<T>(p, b, piece.row, sums, ldk, ldv);
  });
}

template <typename T>
static void gather_columns_merge(const GatherParams& p, int64_t item, char*, char* workspace) {
  const RowSplit split(p.t_indptr, p.seqlen_k, p.edges);
  const int64_t b = item / split.items(), t = item % split.items(), size = EdgeNumbers<T>::column_size(p);
  int64_t end = 0;
  const int64_t key = split.cut_row(t, end);
  if (key < 0) return;
  Arena shared{workspace};
  EdgeNumbers<T> numbers(p, shared);
  T* sum = shared_piece(numbers.columns, size, split.items(), b, t, 1);
  for (int64_t other = t + 1; other <= end; ++other) {
    const T* part = shared_piece(numbers.columns, size, split.items(), b, other, 0);
    for (int64_t x = 0; x < size; ++x) sum[x] += part[x];
  }
  write_keys<T>(p, b, key, sum, round_up(p.head_dim, kLanes<T>), round_up(p.head_dim_v, kLanes<T>));
}

constexpr int64_t kEdgeItem = 4096;

// What belongs to single edges: dedge_bias, dedge_x; and, in the last item, the weight of the score.
template <typename T>
static void gather_edges_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  Arena arena{scratch}, shared{workspace};
  EdgeNumbers<T> numbers(p, shared);
  const int64_t H = p.heads;
  if (item * kEdgeItem >= p.edges) {
    if (!(p.needs & kNeedWeight)) return;
    const int64_t n = H * p.head_dim, parts = p.batch * RowSplit(p.indptr, p.seqlen_q, p.edges).items();
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
        for (int64_t b = 0; b < p.batch; ++b) sum += numbers.logit[(b * p.edges + e) * H + h];
        if (p.edge_bias_head) out[h * p.edge_bias_head + id] = sum;
        all += sum;
      }
      if (!p.edge_bias_head) out[id] = all;
    }
    if (p.needs & kNeedEdgeX) {
      if (e == item * kEdgeItem) {  // the row of the item's first edge
        int64_t high = p.seqlen_q;
        while (high - row > 1) {
          const int64_t mid = (row + high) / 2;
          (p.indptr[mid] <= e ? row : high) = mid;
        }
      }
      while (p.indptr[row + 1] <= e) ++row;
      for (int64_t c = 0; c < lde; ++c) sums[c] = T(0);
      for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < H; ++h) {
          const T g = numbers.score[(b * p.edges + e) * H + h],
                  weight = numbers.weight[(b * p.edges + e) * H + h];
          read_row(query, row_at(p.edge_q, b, h, row), p.edge_q.dtype, p.edge_q.col, p.edge_dim);
          read_row(grad, row_at(p.dout_edge, b, h, row), p.dout_edge.dtype, p.dout_edge.col, p.edge_dim);
          for (int64_t c = 0; c < p.edge_dim; ++c) sums[c] += g * query[c] + weight * grad[c];
        }
      memcpy(static_cast<T*>(p.dedge_x) + id * p.edge_dim, sums, size_t(p.edge_dim) * sizeof(T));
    }
  }
}

template <typename T, typename S>
static Plan<GatherParams> gather_backward_plan(const GatherParams& p) {
  Plan<GatherParams> plan;
  const RowSplit rows(p.indptr, p.seqlen_q, p.edges), columns(p.t_indptr, p.seqlen_k, p.edges);
  Arena a{nullptr}, b{nullptr}, shared{nullptr};
  const RowPassScratch<T, S> x(p, a);
  const EdgeNumbers<T> numbers(p, shared);
  b.take<T>(EdgeNumbers<T>::column_size(p));
  b.take<T>(p.heads_k * round_up(p.head_dim, kLanes<T>));
  b.take<S>(max64(p.head_dim, p.head_dim_v));
  b.take<T>(3 * round_up(p.edge_dim, kLanes<T>) + 64);
  plan.scratch_bytes = a.used > b.used ? a.used : b.used;
  plan.workspace_bytes = shared.used;
  plan.add(p.batch * rows.items(), &gather_rows_item<T, S>);
  if (rows.items() > 1) plan.add(p.batch * rows.items(), &gather_rows_merge<T>);
  if (p.needs & (kNeedK | kNeedV)) {
    plan.add(p.batch * columns.items(), &gather_columns_item<T, S>);
    if (columns.items() > 1) plan.add(p.batch * columns.items(), &gather_columns_merge<T>);
  }
  if (p.needs & (kNeedEdgeBias | kNeedEdgeX | kNeedWeight))
    plan.add((p.edges + kEdgeItem - 1) / kEdgeItem + 1, &gather_edges_item<T>);
  return plan;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
