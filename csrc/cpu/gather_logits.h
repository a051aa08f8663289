// The first half of the gather body: the logits of edges, 16 at a time whatever rows they belong to, all
// heads of an edge while its key row is in cache.
#pragma once
#include "gather_slopes.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// The parts, per lane, of w . phi(q + k) of one edge; phi by the kind of score. `slopes` (may be null)
// receives where q + k > 0.
template <typename T, typename S>
SACCADE_FORCE Vec<T> additive_part(const GatherParams& p, const T* w, const T* q, const S* k,
                                   MaskBits<T>* slopes) {
  constexpr int L = kLanes<T>;
  Vec<T> sum{};
  for (int64_t c = 0; c < p.head_dim; c += L) {
    const int64_t width = min64(L, p.head_dim - c);
    const Vec<T> x = load(q + c) + (width == L ? load_as<T>(k + c) : load_part<T>(k + c, width));
    sum += (width == L ? load(w + c) : load_part<T>(w + c, width)) * phi_of<T>(p, x);
    if (slopes) slopes[c / L] = pack_mask<T>(x > T(0));
  }
  return sum;
}

// Scratch of one thread: what up to kEdgeLanes edges need for their logits.
template <typename T, typename S>
struct GatherScratch {
  HeadLanes<T> heads;
  T* extra;
  Vec<T>* parts;    // of pair_sums
  bool own_beyond;  // rows_outgrow, of queries
  RowReader<T, S> read_q, read_edge_q;
  OwnRows<T> q, edge_q;
  FeatureReader<T> features;
  JointFeatures<T> joint;
  int64_t lde;
  bool live, far, beyond;  // rows_outgrow

  // `kept` edges' joined rows stay.
  GatherScratch(const GatherParams& p, Arena& a, int64_t kept)
      : heads(p),
        own_beyond(rows_outgrow(kSharedBytes, p, p.seqlen_q, p.heads)),
        read_q(a, own_beyond, p.heads, p.head_dim),
        read_edge_q(a, own_beyond, p.heads, p.edge_dim),
        features(p, a, p.edge_dim),
        joint(p, a, kept),
        lde(round_up(p.edge_dim, kLanes<T>)) {
    parts = a.take<Vec<T>>(heads.lanes());
    extra = a.take<T>(p.edge_dim ? heads.size(kEdgeLanes) : 0);
    live = all_edges_live(p);
    far = rows_outgrow(kNearBytes, p, p.seqlen_k, p.heads_k);
    beyond = rows_outgrow(kSharedBytes, p, p.seqlen_k, p.heads_k);
    if (!a.base) return;
    memset(parts, 0, size_t(heads.lanes()) * sizeof(Vec<T>));
  }
  void read_features(const EdgeGroup& g) {
    if (g.p->edge_dim) features.read(g.n, g.ahead(), [&](int64_t e) { return g.id(e); });
  }
  // to[pair] += x[h] . features of the edge.
  void add_feature_dots(const GatherParams& p, const OwnRows<T>& x, int64_t n, T* to) {
    pair_dots<T, T>(heads, x, features.rows, n, p.edge_dim, RowsAhead(), parts, extra);
    for (int64_t c = 0; c < heads.size(n); c += kLanes<T>) store(to + c, load(to + c) + load(extra + c));
  }
};

template <typename T>
static void add_edge_bias(const GatherParams& p, const EdgeGroup& g, int64_t pitch, T* to) {
  for (int64_t e = 0; e < g.n; ++e, to += pitch) {
    const T* bias = static_cast<const T*>(p.edge_bias) + g.id(e);
    for (int64_t h = 0; h < p.heads; ++h, bias += p.edge_bias_head)
      to[h] = *bias == -kInf<T> ? -kInf<T> : to[h] + *bias;
  }
}
// Edges that the mask drops get -inf.
template <typename T>
static void mask_edges(const GatherParams& p, const EdgeGroup& g, int64_t pitch, T* to) {
  const int64_t bounds = p.mask.head_bounds ? p.heads : 1, heads = p.heads / bounds;
  for (int64_t first = 0; first < p.heads; first += heads) {
    Interval inside{0, 0};
    for (int64_t e = 0; e < g.n; ++e) {
      const int64_t row = g.rows[e], key = g.key(e);
      if (e == 0 || row != g.rows[e - 1])
        inside = row_interval(p.mask, g.b, first, row, p.seqlen_q, p.seqlen_k);
      if (inside.begin <= key && key < inside.end && keeps_pair(p.mask, g.b, row, key)) continue;
      for (int64_t h = first; h < first + heads; ++h) to[e * pitch + h] = -kInf<T>;
    }
  }
}

// What the backward keeps of some edges' logits; null where it does not.
template <typename T>
struct LogitNotes {
  T* cap = nullptr;  // as in finish_logits; read with a softcap only
  const Slopes<T>* slopes = nullptr;
  int64_t place = 0;  // where the joined rows are kept
};

// Natural logits of up to kEdgeLanes edges, whose features were read; -inf where an edge is masked or beyond
// n.
template <typename T, typename S>
static void edge_logits(const GatherParams& p, const EdgeGroup& g, GatherScratch<T, S>& w, T* to,
                        LogitNotes<T> notes) {
  constexpr int L = kLanes<T>;
  const HeadLanes<T>& heads = w.heads;
  const EdgeRows<S> keys(p.k, g.b, p.indices + g.begin, g.n);
  // Products read ahead by themselves; additive scores take too long for that.
  const RowsAhead ask(p.score == Score::kDot ? w.beyond : w.far, p.k, g.b, p.heads_k, p.head_dim, p.indices,
                      g.begin, g.n, p.edges);
  w.read_q.read(p.q, g.b, g.rows, g.n, w.q);
  if (p.score == Score::kDot) {
    pair_dots<T, S>(heads, w.q, keys, g.n, p.head_dim, ask, w.parts, to);
    if (p.edge_dim) {
      w.read_edge_q.read(p.edge_q, g.b, g.rows, g.n, w.edge_q);
      w.add_feature_dots(p, w.edge_q, g.n, to);
    }
  } else {
    const T* weight = static_cast<const T*>(p.weight);
    const JointRows<T> own =
        w.joint.join(w.q, 1, g.n, g.ahead(), [&](int64_t e) { return g.id(e); }, notes.place);
    pair_sums(heads, g.n, w.parts, to, [&](int64_t e, Vec<T>* into) {
      ask(e);
      for (int64_t h = 0; h < p.heads; ++h)
        into[h] = additive_part<T, S>(p, weight + h * p.head_dim, own.of(e, h),
                                      keys.at[e] + heads.key(h) * keys.head,
                                      notes.slopes ? notes.slopes->of(g.b, g.begin + e, h) : nullptr);
    });
  }
  const int64_t pairs = g.n * heads.pitch;
  for (int64_t c = 0; c < pairs; c += L) {
    Vec<T> x = load(to + c);
    if (p.softcap != 0) {
      const Vec<T> t = tanhv<T>(x * T(p.scale / p.softcap));
      if (notes.cap) store(notes.cap + c, t);
      x = t * T(p.softcap);
    } else {
      x = x * T(p.scale);
    }
    if (c + L > pairs) x = iota<T>() < typename VecOf<T>::Int(pairs - c) ? x : splat<T>(-kInf<T>);
    store(to + c, x);
  }
  if (p.edge_bias) add_edge_bias(p, g, heads.pitch, to);
  if (mask_decides(p)) mask_edges(p, g, heads.pitch, to);
}

// x[pair] *= 0 where dropout drops the pair, 1 / (1 - p) elsewhere.
template <typename T>
static void drop_edges(const GatherParams& p, const EdgeGroup& g, int64_t pitch, T* x) {
  const DropoutFactors<T> factors(p.seed, p.dropout_p);
  const int64_t edges = max64(1, kWordLanes / pitch), step = max64(pitch, kWordLanes);
  for (int64_t e0 = 0; e0 < g.n; e0 += edges, x += step) {
    Words key, row, head;
    for (int64_t l = 0; l < kWordLanes; ++l) {
      const int64_t e = min64(e0 + l / pitch, g.n - 1);
      key[l] = uint64_t(g.key(e)), row[l] = uint64_t(g.rows[e]), head[l] = uint64_t(l % pitch);
    }
    for (int64_t h = 0; h < step; h += kWordLanes, head += kWordLanes) {
      Words c[4];
      factors.draw(key >> 3, row, head, g.b, c);
      const Words low = (key & 2) != 0 ? c[1] : c[0], high = (key & 2) != 0 ? c[3] : c[2];
      factors.multiply((key & 4) != 0 ? high : low, key, x + h);
    }
  }
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
