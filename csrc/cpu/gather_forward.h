// The gather body, forward: one query's edges at a time, an online softmax per head.
#pragma once
#include "gather_logits.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// A query row in the making: m (natural logit) and l per head, in lanes as HeadLanes has them; and the padded
// sums of values and of edge features.
template <typename T>
struct GatherState {
  T *m, *l, *O, *E;
  int64_t ldo, lde, lanes;

  static int64_t size(const GatherParams& p) {
    return round_up(p.heads * (round_up(p.head_dim_v, kLanes<T>) + round_up(p.edge_dim, kLanes<T>)) +
                        2 * HeadLanes<T>(p).lanes(),
                    16);
  }
  GatherState(const GatherParams& p, T* at)
      : ldo(round_up(p.head_dim_v, kLanes<T>)),
        lde(round_up(p.edge_dim, kLanes<T>)),
        lanes(HeadLanes<T>(p).lanes()) {
    O = at;
    E = O + p.heads * ldo;
    m = E + p.heads * lde;
    l = m + lanes;
  }
  // The sums of a row that has edges are written first and added to later.
  void clear(const GatherParams& p, bool edges) {
    if (!edges) memset(O, 0, size_t(p.heads * (ldo + lde)) * sizeof(T));
    for (int64_t h = 0; h < lanes; ++h) m[h] = -kInf<T>, l[h] = T(0);
  }
};

// Multiplies what the heads of lanes [c, c + L) have summed by their alpha.
template <typename T>
static void rescale_heads(const GatherParams& p, int64_t c, Vec<T> alpha, GatherState<T>& state) {
  for (int64_t h = c; h < min64(p.heads, c + kLanes<T>); ++h) {
    const T factor = alpha[int(h - c)];
    T *O = state.O + h * state.ldo, *E = state.E + h * state.lde;
    for (int64_t x = 0; x < state.ldo; x += kLanes<T>) store(O + x, load(O + x) * factor);
    for (int64_t x = 0; x < state.lde; x += kLanes<T>) store(E + x, load(E + x) * factor);
  }
}

// The edges of a group join the running softmax of every head; s turns from logits into weights.
template <typename T>
static void edge_softmax(const GatherParams& p, const HeadLanes<T>& heads, int64_t n, bool fresh, T* s,
                         GatherState<T>& state) {
  constexpr int L = kLanes<T>;
  const int64_t size = heads.size(n), step = heads.lanes();
  if (!is_softmax(p)) {
    for (int64_t c = 0; c < size; c += L) store(s + c, activate<T>(p.activation, load(s + c)));
    return;
  }
  for (int64_t c = 0; c < step; c += L) {
    Vec<T> top = load(s + c);
    for (int64_t x = c + step; x < size; x += step) top = vmax<T>(load(s + x), top);
    top = fold_heads<T>(top, heads.pitch, [](Vec<T> a, Vec<T> b) { return vmax<T>(a, b); });
    const Vec<T> old = load(state.m + c), now = vmax<T>(top, old);
    const Vec<T> pivot = now == -kInf<T> ? Vec<T>{} : now;
    store(state.m + c, now);
    Vec<T> sum{};
    for (int64_t x = c; x < size; x += step) {
      const Vec<T> weight = exp2v<T>((load(s + x) - pivot) * T(kLog2e));
      store(s + x, weight);
      sum += weight;
    }
    sum = fold_heads<T>(sum, heads.pitch, [](Vec<T> a, Vec<T> b) { return a + b; });
    if (!fresh) {
      const Vec<T> alpha = exp2v<T>((old - pivot) * T(kLog2e));
      sum += load(state.l + c) * alpha;
      if (any_lane(now > old)) rescale_heads(p, c, alpha, state);
    }
    store(state.l + c, sum);
  }
}

// The workspace: the pieces of cut rows; and the logits of all edges, [B][E][pitch], where the rows lie far
// and a pass of its own makes them.
template <typename T>
struct ForwardSpace {
  T *pieces, *logits;
  bool far;

  ForwardSpace(const GatherParams& p, Arena& a) : far(rows_lie_far(p, p.seqlen_k, p.heads_k)) {
    const int64_t items = RowSplit(p.indptr, p.seqlen_q, p.edges).items();
    pieces = a.take<T>(p.batch * items * 2 * GatherState<T>::size(p));
    logits = a.take<T>(far ? p.batch * p.edges * HeadLanes<T>(p).pitch : 0);
  }
};

template <typename T, typename S>
static void gather_logits_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  const RowSplit split(p.indptr, p.seqlen_q, p.edges);
  const int64_t b = item / split.items(), t = item % split.items();
  Arena arena{scratch}, shared{workspace};
  GatherScratch<T, S> w(p, arena);
  const ForwardSpace<T> space(p, shared);
  split.for_each(t, [&](RowSplit::Piece piece) {
    if (piece.begin < piece.end) w.read_queries(p, b, piece.row);
    for (int64_t at = piece.begin; at < piece.end; at += kEdgeLanes) {
      const EdgeGroup g(p, b, piece.row, at, piece.end, w.live);
      w.read_features(p, g);
      edge_logits<T, S>(p, g, EdgeRows<S>(p.k, b, p.indices + at, g.n), w, nullptr);
      copy_numbers(space.logits + (b * p.edges + at) * w.heads.pitch, w.s, g.n * w.heads.pitch);
    }
  });
}

template <typename T, typename S>
static void forward_piece(const GatherParams& p, int64_t b, RowSplit::Piece piece, GatherScratch<T, S>& w,
                          const ForwardSpace<T>& space, GatherState<T>& state) {
  const HeadLanes<T>& heads = w.heads;
  for (int64_t at = piece.begin; at < piece.end; at += kEdgeLanes) {
    const EdgeGroup g(p, b, piece.row, at, piece.end, w.live);
    const EdgeRows<S> values(p.v, b, p.indices + at, g.n);
    const bool fresh = at == piece.begin;
    w.read_features(p, g);
    if (space.far) {
      const int64_t pairs = g.n * heads.pitch;
      copy_numbers(w.s, space.logits + (b * p.edges + at) * heads.pitch, pairs);
      for (int64_t c = pairs; c < heads.size(g.n); ++c) w.s[c] = -kInf<T>;
    } else {
      edge_logits<T, S>(p, g, EdgeRows<S>(p.k, b, p.indices + at, g.n), w, nullptr);
    }
    edge_softmax(p, heads, g.n, fresh, w.s, state);
    if (p.dropout_p > 0) drop_edges(p, g, heads.pitch, w.s);
    const int32_t* later = p.indices + at + kEdgeLanes;
    const int64_t ahead = w.far ? edges_ahead(at, g.n, p.edges) : 0;
    const int64_t together = heads_together(g.live, heads, values.head, p.head_dim_v);
    for (int64_t e = 0; e < ahead; ++e) prefetch_rows<S>(p.v, b, 0, p.heads_k, later[e], p.head_dim_v);
    for (int64_t h = 0; h < p.heads; h += together) {
      const int64_t k = heads.key(h);
      edge_sums<T, S>(together, g.live, state.O + h * state.ldo, fresh, values, k, g.n, p.head_dim_v, w.s + h,
                      heads.pitch, w.zeros);
    }
    for (int64_t h = 0; p.edge_dim && h < p.heads; ++h)
      edge_sums<T, T>(1, g.live, state.E + h * state.lde, fresh, w.feature_rows, 0, g.n, p.edge_dim, w.s + h,
                      heads.pitch, w.zero_features);
  }
}

// lse = top + log(sum), the logarithms of many rows together: one alone fills no vector and waits for itself.
template <typename T>
class Logarithms {
 public:
  // Where the next heads' numbers go, up to a vector of them.
  double* tops() { return tops_ + n_; }
  double* sums() { return sums_ + n_; }
  // n heads are there; their lse lie `stride` apart.
  void took(double* to, int64_t stride, int64_t n) {
    rows_[count_++] = {to, stride, n};
    n_ += n;
    if (n_ >= kRoom || count_ == kRoom) finish();
  }
  void finish() {
    log_each<T>(sums_, sums_, n_);
    int64_t at = 0;
    for (int64_t r = 0; r < count_; ++r)
      for (int64_t i = 0; i < rows_[r].n; ++i, ++at) rows_[r].to[i * rows_[r].stride] = tops_[at] + sums_[at];
    n_ = count_ = 0;
  }

 private:
  static constexpr int64_t kRoom = 64;
  struct Heads {
    double* to;
    int64_t stride, n;
  };
  Heads rows_[kRoom];
  double tops_[kRoom + 16], sums_[kRoom + 16];
  int64_t n_ = 0, count_ = 0;
};

// The sink joins a head's top and sum; returns the share of the largest that its edges keep.
template <typename T>
static double add_sink(const GatherParams& p, int64_t h, double& top, double& sum) {
  const double sink = double(sink_of<T>(p, h)), pivot = top > sink ? top : sink;
  const double mine = top == -kInf<double> ? 0 : exp(top - pivot);
  sum = sum * mine + (sink == -kInf<double> ? 0 : exp(sink - pivot));
  top = pivot;
  return mine;
}

// The sums l of a row become the factors that normalise it; its lse goes to `lse`.
template <typename T>
static void finish_sums(const GatherParams& p, int64_t b, int64_t row, const GatherState<T>& s,
                        Logarithms<T>& lse) {
  constexpr int L = kLanes<T>;
  for (int64_t h = 0; h < p.heads; h += L) {
    const int64_t n = min64(L, p.heads - h);
    const Vec<T> sum = load(s.l + h);
    double *tops = lse.tops(), *sums = lse.sums();
    widen<T>(load(s.m + h), tops);
    widen<T>(sum == T(0) ? splat<T>(T(1)) : sum, sums);
    store(s.l + h, sum == T(0) ? Vec<T>{} : T(1) / sum);
    for (int64_t i = 0; has_sink(p) && i < n; ++i) {
      double total = double(sum[int(i)]);
      const double mine = add_sink<T>(p, h + i, tops[i], total);
      s.l[h + i] = total == 0 ? T(0) : T(mine / total);
      sums[i] = total == 0 ? 1 : total;
    }
    lse.took(p.lse + b * p.lse_batch + h * p.lse_head + row, p.lse_head, n);
  }
}

// Normalises and writes a row.
template <typename T, typename S>
static void finish_row(const GatherParams& p, int64_t b, int64_t row, const GatherState<T>& s,
                       Logarithms<T>& lse) {
  if (is_softmax(p)) finish_sums(p, b, row, s, lse);
  const T* shares = is_softmax(p) ? s.l : nullptr;
  write_heads<T, S>(p.out, b, row, p.heads, s.O, s.ldo, shares, p.head_dim_v);
  if (p.edge_dim) write_heads<T, S>(p.out_edge, b, row, p.heads, s.E, s.lde, shares, p.edge_dim);
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
  Arena arena{scratch}, shared{workspace};
  GatherScratch<T, S> w(p, arena);
  GatherState<T> own(p, arena.take<T>(size));
  const ForwardSpace<T> space(p, shared);
  Logarithms<T> lse;
  split.for_each(t, [&](RowSplit::Piece piece) {
    const bool entire = piece.first && piece.last;
    GatherState<T> state =
        entire
            ? own
            : GatherState<T>(p, shared_piece(space.pieces, size, split.items(), b, t, piece.first ? 1 : 0));
    state.clear(p, piece.begin < piece.end);
    w.read_queries(p, b, piece.row);
    forward_piece<T, S>(p, b, piece, w, space, state);
    if (entire) finish_row<T, S>(p, b, piece.row, state, lse);
  });
  lse.finish();
}

// Rows that were cut: their pieces are merged in the order of their edges.
template <typename T, typename S>
static void gather_merge_item(const GatherParams& p, int64_t item, char*, char* workspace) {
  const RowSplit split(p.indptr, p.seqlen_q, p.edges);
  const int64_t b = item / split.items(), t = item % split.items(), size = GatherState<T>::size(p);
  int64_t end = 0;
  const int64_t row = split.cut_row(t, end);
  if (row < 0) return;
  Arena shared{workspace};
  T* base = ForwardSpace<T>(p, shared).pieces;
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
  Logarithms<T> lse;
  finish_row<T, S>(p, b, row, sum, lse);
  lse.finish();
}

template <typename T, typename S>
static Plan<GatherParams> gather_forward_plan(const GatherParams& p) {
  Plan<GatherParams> plan;
  const RowSplit split(p.indptr, p.seqlen_q, p.edges);
  Arena arena{nullptr}, shared{nullptr};
  const GatherScratch<T, S> w(p, arena);
  const ForwardSpace<T> space(p, shared);
  arena.take<T>(GatherState<T>::size(p));
  plan.scratch_bytes = arena.used;
  plan.workspace_bytes = shared.used;
  if (space.far) plan.add(p.batch * split.items(), &gather_logits_item<T, S>);
  plan.add(p.batch * split.items(), &gather_forward_item<T, S>);
  if (split.items() > 1) plan.add(p.batch * split.items(), &gather_merge_item<T, S>);
  return plan;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
