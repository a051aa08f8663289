// The gather body, forward: one query's edges at a time, all heads of an edge while its rows are in cache, an
// online softmax per head.
#pragma once
#include "gather.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// A query row in the making, per head: m (natural logit), l, and the padded sums of values and of edge
// features.
template <typename T>
struct GatherState {
  T *m, *l, *O, *E;
  int64_t ldo, lde;

  static int64_t size(const GatherParams& p) {
    return round_up(p.heads * (2 + round_up(p.head_dim_v, kLanes<T>) + round_up(p.edge_dim, kLanes<T>)) + 32,
                    16);
  }
  GatherState(const GatherParams& p, T* at)
      : ldo(round_up(p.head_dim_v, kLanes<T>)), lde(round_up(p.edge_dim, kLanes<T>)) {
    O = at;
    E = O + p.heads * ldo;
    m = E + p.heads * lde;
    l = m + p.heads;
  }
  void clear(const GatherParams& p) {
    memset(O, 0, size_t(p.heads * (ldo + lde)) * sizeof(T));
    for (int64_t h = 0; h < p.heads; ++h) m[h] = -kInf<T>, l[h] = T(0);
  }
};

// Padded query rows of all heads, in T.
template <typename T, typename S>
static void read_heads(const Rows& x, int64_t b, int64_t row, int64_t heads, int64_t d, int64_t ld, T* out) {
  constexpr int L = kLanes<T>;
  for (int64_t h = 0; h < heads; ++h) {
    const S* from = typed_row<S>(x, b, h, row);
    T* to = out + h * ld;
    int64_t c = 0;
    for (; c + L <= d; c += L) store(to + c, load_as<T>(from + c));
    if (c < d) store(to + c, load_part<T>(from + c, d - c));
  }
}

// w . phi(q + k) of one edge; phi in `kind`.
template <typename T, typename S>
SACCADE_FORCE T additive_edge(const GatherParams& p, const T* w, const T* q, const S* k) {
  constexpr int L = kLanes<T>;
  const T slope = T(p.slope);
  Vec<T> sum{};
  for (int64_t c = 0; c < p.head_dim; c += L) {
    const int64_t width = min64(L, p.head_dim - c);
    const Vec<T> x = load(q + c) + (width == L ? load_as<T>(k + c) : load_part<T>(k + c, width));
    const Vec<T> phi = p.score == Score::kAdditive ? tanhv<T>(x) : (x > T(0) ? x : slope * x);
    sum += (width == L ? load(w + c) : load_part<T>(w + c, width)) * phi;
  }
  return lanes_sum<T>(sum);
}

// Scratch of one thread: the query row, the rows of an edge group, its numbers.
template <typename T, typename S>
struct GatherScratch {
  T *q, *edge_q, *s, *features, *zero_features;  // s [H][kEdgeLanes]
  double *tops, *sums;
  S* zeros;
  EdgeRows<S> rows;
  EdgeRows<T> feature_rows;
  int64_t ldq, lde;

  GatherScratch(const GatherParams& p, Arena& a)
      : ldq(round_up(p.head_dim, kLanes<T>)), lde(round_up(p.edge_dim, kLanes<T>)) {
    q = a.take<T>(p.heads * ldq);
    edge_q = a.take<T>(p.heads * lde);
    s = a.take<T>(p.heads * kEdgeLanes);
    tops = a.take<double>(p.heads);
    sums = a.take<double>(p.heads);
    features = a.take<T>(kEdgeLanes * lde);
    zero_features = a.take<T>(lde);
    zeros = a.take<S>(p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v);
    if (!a.base) return;
    memset(zero_features, 0, size_t(lde) * sizeof(T));
    memset(zeros, 0, size_t(p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v) * sizeof(S));
  }
  void read_queries(const GatherParams& p, int64_t b, int64_t row) {
    read_heads<T, S>(p.q, b, row, p.heads, p.head_dim, ldq, q);
    if (p.edge_dim) read_heads<T, S>(p.edge_q, b, row, p.heads, p.edge_dim, lde, edge_q);
  }
  static EdgeRows<S> point(const Rows& x, const EdgeGroup& g, int64_t b) {
    EdgeRows<S> rows;
    for (int64_t e = 0; e < g.n; ++e) rows.at[e] = typed_row<S>(x, b, 0, g.key[e]);
    return rows;
  }
  void read_features(const GatherParams& p, const EdgeGroup& g) {
    if (!p.edge_dim) return;
    for (int64_t e = 0; e < g.n; ++e) {
      feature_rows.at[e] = features + e * lde;
      read_row(features + e * lde, row_at(p.edge_x, 0, 0, g.id[e]), p.edge_x.dtype, p.edge_x.col, p.edge_dim);
      for (int64_t c = p.edge_dim; c < lde; ++c) features[e * lde + c] = T(0);
    }
  }
};

// Natural logits of one head's edges into s[kEdgeLanes], -inf where an edge is masked or beyond n. `cap` as
// in finish_logits.
template <typename T, typename S>
static void edge_logits(const GatherParams& p, const EdgeGroup& g, int64_t h, GatherScratch<T, S>& w, T* s,
                        T* cap) {
  const T* q = w.q + h * w.ldq;
  if (p.score == Score::kDot) {
    edge_dots<T, S>(q, w.rows, g.n, p.head_dim, s);
    if (p.edge_dim) {
      T extra[kEdgeLanes];
      edge_dots<T, T>(w.edge_q + h * w.lde, w.feature_rows, g.n, p.edge_dim, extra);
      for (int64_t e = 0; e < g.n; ++e) s[e] += extra[e];
    }
  } else {
    const T* weight = static_cast<const T*>(p.weight) + h * p.head_dim;
    for (int64_t e = 0; e < g.n; ++e) s[e] = additive_edge<T, S>(p, weight, q, w.rows.row(e));
  }
  for (int64_t c = 0; c < kEdgeLanes; c += kLanes<T>) {
    const VecI<T> inside = iota<T>() < typename VecOf<T>::Int(g.n - c);
    Vec<T> x = inside ? load(s + c) : Vec<T>{};
    if (p.softcap != 0) {
      const Vec<T> t = tanhv<T>(x * T(p.scale / p.softcap));
      if (cap) store(cap + c, t);
      x = t * T(p.softcap);
    } else {
      x = x * T(p.scale);
    }
    store(s + c, inside ? x : splat<T>(-kInf<T>));
  }
  if (g.live) return;
  const T* bias = p.edge_bias ? static_cast<const T*>(p.edge_bias) + h * p.edge_bias_head : nullptr;
  const Interval keys = row_interval(p.mask, g.b, h, g.row, p.seqlen_q, p.seqlen_k);
  for (int64_t e = 0; e < g.n; ++e) {
    const T add = bias ? bias[g.id[e]] : T(0);
    const bool kept = g.kept[e] && keys.begin <= g.key[e] && g.key[e] < keys.end;
    s[e] = !kept || add == -kInf<T> ? -kInf<T> : s[e] + add;
  }
}

template <typename T>
SACCADE_FORCE T dropout_factor(const GatherParams& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  return dropout_keeps(p.seed, dropout_threshold(p.dropout_p), b, h, i, j) ? T(1 / (1 - p.dropout_p)) : T(0);
}

// One head's edges join its running softmax; s turns from logits into weights.
template <typename T>
static void edge_softmax(const GatherParams& p, int64_t h, T* s, GatherState<T>& state) {
  constexpr int L = kLanes<T>;
  if (!is_softmax(p)) {
    for (int64_t c = 0; c < kEdgeLanes; c += L) store(s + c, activate<T>(p.activation, load(s + c)));
    return;
  }
  Vec<T> top = load(s);
  for (int64_t c = L; c < kEdgeLanes; c += L) top = vmax<T>(load(s + c), top);
  const T old = state.m[h], found = lanes_max<T>(top), now = found > old ? found : old;
  const T pivot = now == -kInf<T> ? T(0) : now;
  state.m[h] = now;
  if (now != old && old != -kInf<T>) {
    const T alpha = exp2v<T>(splat<T>((old - pivot) * T(kLog2e)))[0];
    T *O = state.O + h * state.ldo, *E = state.E + h * state.lde;
    for (int64_t c = 0; c < state.ldo; c += L) store(O + c, load(O + c) * alpha);
    for (int64_t c = 0; c < state.lde; c += L) store(E + c, load(E + c) * alpha);
    state.l[h] *= alpha;
  }
  Vec<T> sum{};
  for (int64_t c = 0; c < kEdgeLanes; c += L) {
    const Vec<T> x = exp2v<T>((load(s + c) - pivot) * T(kLog2e));
    store(s + c, x);
    sum += x;
  }
  state.l[h] += lanes_sum<T>(sum);
}

template <typename T, typename S>
static void forward_piece(const GatherParams& p, int64_t b, RowSplit::Piece piece, GatherScratch<T, S>& w,
                          GatherState<T>& state) {
  const int64_t group = p.heads / p.heads_k;
  const bool far = rows_lie_far(p, p.seqlen_k, p.heads_k);
  for (int64_t at = piece.begin; at < piece.end; at += kEdgeLanes) {
    const EdgeGroup g = edge_group(p, b, piece.row, at, piece.end);
    const int32_t* later = p.indices + at + kEdgeLanes;
    const int64_t ahead = edges_ahead(at, g.n, p.edges);
    w.read_features(p, g);
    w.rows = w.point(p.k, g, b);
    EdgeRows<S> values = w.point(p.v, g, b);
    // Stage by stage over the heads rather than head by head: each stage is a chain of dependent steps, and
    // heads are independent.
    for (int64_t h = 0; h < p.heads; ++h) {
      w.rows.offset = h / group * p.k.head;
      if (far && h % group == 0) {
        prefetch_rows<S>(p.k, b, h / group, later, ahead, p.head_dim);
        prefetch_rows<S>(p.v, b, h / group, later, ahead, p.head_dim_v);
      }
      edge_logits<T, S>(p, g, h, w, w.s + h * kEdgeLanes, nullptr);
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      T* s = w.s + h * kEdgeLanes;
      edge_softmax(p, h, s, state);
      if (p.dropout_p > 0)
        for (int64_t e = 0; e < g.n; ++e) s[e] *= dropout_factor<T>(p, b, h, piece.row, g.key[e]);
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      const T* s = w.s + h * kEdgeLanes;
      const auto weight = [s](int64_t e) { return s[e]; };
      values.offset = h / group * p.v.head;
      edge_sum<T, S>(state.O + h * state.ldo, g.live ? values : live_rows<T, S>(values, weight, g.n, w.zeros),
                     g.n, p.head_dim_v, weight);
      if (p.edge_dim)
        edge_sum<T, T>(state.E + h * state.lde, live_rows<T, T>(w.feature_rows, weight, g.n, w.zero_features),
                       g.n, p.edge_dim, weight);
    }
  }
}

// Adds the sink, normalises and writes a row. tops and sums: a number per head each.
template <typename T>
static void finish_row(const GatherParams& p, int64_t b, int64_t row, GatherState<T>& s, double* tops,
                       double* sums) {
  for (int64_t h = 0; h < p.heads; ++h) {
    T *O = s.O + h * s.ldo, *E = s.E + h * s.lde;
    if (is_softmax(p)) {
      double top = double(s.m[h]), sum = double(s.l[h]), mine = 1;
      if (has_sink(p)) {
        const double sink = double(sink_of<T>(p, h)), pivot = top > sink ? top : sink;
        mine = top == -kInf<double> ? 0 : exp(top - pivot);
        sum = sum * mine + (sink == -kInf<double> ? 0 : exp(sink - pivot));
        top = pivot;
      }
      const T share = sum == 0 ? T(0) : T(mine / sum);
      tops[h] = sum == 0 ? -kInf<double> : top;
      sums[h] = sum == 0 ? 1 : sum;
      for (int64_t c = 0; c < s.ldo; c += kLanes<T>) store(O + c, load(O + c) * share);
      for (int64_t c = 0; c < s.lde; c += kLanes<T>) store(E + c, load(E + c) * share);
    }
    write_row(row_at(p.out, b, h, row), p.out.dtype, p.out.col, O, p.head_dim_v);
    if (p.edge_dim) write_row(row_at(p.out_edge, b, h, row), p.out_edge.dtype, p.out_edge.col, E, p.edge_dim);
  }
  if (!is_softmax(p)) return;
  log_each(sums, sums, p.heads);
  for (int64_t h = 0; h < p.heads; ++h) p.lse[b * p.lse_batch + h * p.lse_head + row] = tops[h] + sums[h];
}

// Where the piece of a row that item t shares with its neighbours lies: slot 0 began before t, slot 1 begins
// in it.
template <typename T>
SACCADE_FORCE T* shared_piece(T* base, int64_t size, int64_t items, int64_t b, int64_t t, int slot) {
  return base + ((b * items + t) * 2 + slot) * size;
}

template <typename T, typename S>
static void gather_forward_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  const RowSplit split(p.indptr, p.seqlen_q, p.edges);
  const int64_t b = item / split.items(), t = item % split.items(), size = GatherState<T>::size(p);
  Arena arena{scratch};
  GatherScratch<T, S> w(p, arena);
  GatherState<T> own(p, arena.take<T>(size));
  split.for_each(t, [&](RowSplit::Piece piece) {
    const bool entire = piece.first && piece.last;
    GatherState<T> state = entire ? own
                                  : GatherState<T>(p, shared_piece(reinterpret_cast<T*>(workspace), size,
                                                                   split.items(), b, t, piece.first ? 1 : 0));
    state.clear(p);
    w.read_queries(p, b, piece.row);
    forward_piece<T, S>(p, b, piece, w, state);
    if (entire) finish_row<T>(p, b, piece.row, state, w.tops, w.sums);
  });
}

// Rows that were cut: their pieces are merged in the order of their edges.
template <typename T>
static void gather_merge_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  const RowSplit split(p.indptr, p.seqlen_q, p.edges);
  const int64_t b = item / split.items(), t = item % split.items(), size = GatherState<T>::size(p);
  int64_t end = 0;
  const int64_t row = split.cut_row(t, end);
  if (row < 0) return;
  T* base = reinterpret_cast<T*>(workspace);
  GatherState<T> sum(p, shared_piece(base, size, split.items(), b, t, 1));
  for (int64_t other = t + 1; other <= end; ++other) {
    const GatherState<T> part(p, shared_piece(base, size, split.items(), b, other, 0));
    for (int64_t h = 0; h < p.heads; ++h) {
      T mine = T(1), its = T(1);
      if (is_softmax(p)) {
        const T top = sum.m[h] > part.m[h] ? sum.m[h] : part.m[h], pivot = top == -kInf<T> ? T(0) : top;
        mine = exp2v<T>(splat<T>((sum.m[h] - pivot) * T(kLog2e)))[0];
        its = exp2v<T>(splat<T>((part.m[h] - pivot) * T(kLog2e)))[0];
        sum.m[h] = top;
        sum.l[h] = sum.l[h] * mine + part.l[h] * its;
      }
      for (int64_t c = 0; c < sum.ldo; ++c)
        sum.O[h * sum.ldo + c] = sum.O[h * sum.ldo + c] * mine + part.O[h * sum.ldo + c] * its;
      for (int64_t c = 0; c < sum.lde; ++c)
        sum.E[h * sum.lde + c] = sum.E[h * sum.lde + c] * mine + part.E[h * sum.lde + c] * its;
    }
  }
  Arena arena{scratch};
  double* tops = arena.take<double>(p.heads);
  finish_row<T>(p, b, row, sum, tops, arena.take<double>(p.heads));
}

template <typename T, typename S>
static Plan<GatherParams> gather_forward_plan(const GatherParams& p) {
  Plan<GatherParams> plan;
  const RowSplit split(p.indptr, p.seqlen_q, p.edges);
  Arena arena{nullptr};
  const GatherScratch<T, S> w(p, arena);
  arena.take<T>(GatherState<T>::size(p));
  plan.scratch_bytes = arena.used;
  plan.workspace_bytes = size_t(p.batch * split.items() * 2 * GatherState<T>::size(p)) * sizeof(T);
  plan.add(p.batch * split.items(), &gather_forward_item<T, S>);
  if (split.items() > 1) plan.add(p.batch * split.items(), &gather_merge_item<T>);
  return plan;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
