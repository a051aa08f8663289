// The first half of the gather body: the logits of edges, 16 at a time whatever rows they belong to, all
// heads of an edge while its key row is in cache.
#pragma once
#include "gather_joint.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// The parts, per lane, of w . phi(q + k) of one edge; phi by the kind of score.
template <typename T, typename S>
SACCADE_FORCE Vec<T> additive_part(const GatherParams& p, const T* w, const T* q, const S* k) {
  constexpr int L = kLanes<T>;
  Vec<T> sum{};
  for (int64_t c = 0; c < p.head_dim; c += L) {
    const int64_t width = min64(L, p.head_dim - c);
    const Vec<T> x = load(q + c) + (width == L ? load_as<T>(k + c) : load_part<T>(k + c, width));
    sum += (width == L ? load(w + c) : load_part<T>(w + c, width)) * phi_of<T>(p, x);
  }
  return sum;
}

// Scratch of one thread: what up to kEdgeLanes edges need for their logits.
template <typename T, typename S>
struct GatherScratch {
  HeadLanes<T> heads;
  T *extra, *features, *zero_features;
  Vec<T>* parts;  // of pair_sums
  S* zeros;
  bool own_beyond;  // rows_outgrow, of queries
  RowReader<T, S> read_q, read_edge_q;
  OwnRows<T> q, edge_q;
  EdgeRows<T> feature_rows;
  JointFeatures<T> joint;
  int64_t lde;
  bool live, far, beyond;  // rows_outgrow

  GatherScratch(const GatherParams& p, Arena& a)
      : heads(p),
        own_beyond(rows_outgrow(kSharedBytes, p, p.seqlen_q, p.heads)),
        read_q(a, own_beyond, p.heads, p.head_dim),
        read_edge_q(a, own_beyond, p.heads, p.edge_dim),
        joint(p, a),
        lde(round_up(p.edge_dim, kLanes<T>)) {
    const int64_t widest = max64(p.head_dim, p.head_dim_v);
    parts = a.take<Vec<T>>(heads.lanes());
    extra = a.take<T>(p.edge_dim ? heads.size(kEdgeLanes) : 0);
    features = a.take<T>(kEdgeLanes * lde);
    zero_features = a.take<T>(lde);
    zeros = a.take<S>(widest);
    live = all_edges_live(p);
    far = rows_outgrow(kNearBytes, p, p.seqlen_k, p.heads_k);
    beyond = rows_outgrow(kSharedBytes, p, p.seqlen_k, p.heads_k);
    if (!a.base) return;
    memset(parts, 0, size_t(heads.lanes()) * sizeof(Vec<T>));
    memset(features, 0, size_t(kEdgeLanes * lde) * sizeof(T));
    memset(zero_features, 0, size_t(lde) * sizeof(T));
    memset(zeros, 0, size_t(widest) * sizeof(S));
    for (int64_t e = 0; e < kEdgeLanes; ++e) feature_rows.at[e] = features + e * lde;
  }
  void read_features(const GatherParams& p, const EdgeGroup& g) {
    for (int64_t e = 0; p.edge_dim && e < g.n; ++e)
      read_row(features + e * lde, row_at(p.edge_x, 0, 0, g.id(e)), p.edge_x.dtype, p.edge_x.col, p.edge_dim);
  }
  // to[pair] += x[h] . features of the edge.
  void add_feature_dots(const GatherParams& p, const OwnRows<T>& x, int64_t n, T* to) {
    pair_dots<T, T>(heads, x, feature_rows, n, p.edge_dim, RowsAhead(), parts, extra);
    for (int64_t c = 0; c < heads.size(n); c += kLanes<T>) store(to + c, load(to + c) + load(extra + c));
  }
};

// Natural logits of up to kEdgeLanes edges, whose features were read; -inf where an edge is masked or beyond
// n. `cap` as in finish_logits.
template <typename T, typename S>
static void edge_logits(const GatherParams& p, const EdgeGroup& g, GatherScratch<T, S>& w, T* to, T* cap) {
  constexpr int L = kLanes<T>;
  const HeadLanes<T>& heads = w.heads;
  const EdgeRows<S> keys(p.k, g.b, p.indices + g.begin, g.n);
  const RowsAhead ask(w.beyond, p.k, g.b, p.heads_k, p.head_dim, p.indices, g.begin, g.n, p.edges);
  w.read_q.read(p.q, g.b, g.rows, g.n, w.q);
  if (p.score == Score::kDot) {
    pair_dots<T, S>(heads, w.q, keys, g.n, p.head_dim, ask, w.parts, to);
    if (p.edge_dim) {
      w.read_edge_q.read(p.edge_q, g.b, g.rows, g.n, w.edge_q);
      w.add_feature_dots(p, w.edge_q, g.n, to);
    }
  } else {
    const T* weight = static_cast<const T*>(p.weight);
    const JointRows<T> own = w.joint.join(p, w.q, 1, g.n, [&](int64_t e) { return g.id(e); });
    pair_sums(heads, g.n, w.parts, to, [&](int64_t e, Vec<T>* into) {
      ask(e);
      for (int64_t h = 0; h < p.heads; ++h)
        into[h] = additive_part<T, S>(p, weight + h * p.head_dim, own.of(e, h),
                                      keys.at[e] + heads.key(h) * keys.head);
    });
  }
  const int64_t pairs = g.n * heads.pitch;
  for (int64_t c = 0; c < pairs; c += L) {
    Vec<T> x = load(to + c);
    if (p.softcap != 0) {
      const Vec<T> t = tanhv<T>(x * T(p.scale / p.softcap));
      if (cap) store(cap + c, t);
      x = t * T(p.softcap);
    } else {
      x = x * T(p.scale);
    }
    if (c + L > pairs) x = iota<T>() < typename VecOf<T>::Int(pairs - c) ? x : splat<T>(-kInf<T>);
    store(to + c, x);
  }
  if (w.live) return;
  bool kept[kEdgeLanes];
  for (int64_t e = 0; e < g.n; ++e) kept[e] = keeps_pair(p.mask, g.b, g.rows[e], g.key(e));
  for (int64_t h = 0; h < p.heads; ++h) {
    const T* bias = p.edge_bias ? static_cast<const T*>(p.edge_bias) + h * p.edge_bias_head : nullptr;
    Interval inside{0, 0};
    for (int64_t e = 0; e < g.n; ++e) {
      if (e == 0 || g.rows[e] != g.rows[e - 1])
        inside = row_interval(p.mask, g.b, h, g.rows[e], p.seqlen_q, p.seqlen_k);
      T& s = to[e * heads.pitch + h];
      const T add = bias ? bias[g.id(e)] : T(0);
      const bool inner = kept[e] && inside.begin <= g.key(e) && g.key(e) < inside.end;
      s = !inner || add == -kInf<T> ? -kInf<T> : s + add;
    }
  }
}

template <typename T>
SACCADE_FORCE T dropout_factor(const GatherParams& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  return dropout_keeps(p.seed, dropout_threshold(p.dropout_p), b, h, i, j) ? T(1 / (1 - p.dropout_p)) : T(0);
}
// x[pair] *= the factor of the pair.
template <typename T>
static void drop_edges(const GatherParams& p, const EdgeGroup& g, int64_t pitch, T* x) {
  for (int64_t e = 0; e < g.n; ++e)
    for (int64_t h = 0; h < p.heads; ++h)
      x[e * pitch + h] *= dropout_factor<T>(p, g.b, h, g.rows[e], g.key(e));
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
