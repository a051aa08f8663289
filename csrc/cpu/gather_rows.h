// The half of the gather body's backward that walks over rows: dQ, and what each edge and head leaves for the
// other half, its weight and score gradient.
#pragma once
#include "gather_joint_gradients.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// Up to kBlockEdges edges that follow each other, and the rows, or pieces of rows, that they are.
constexpr int64_t kBlockEdges = 128;
struct EdgeBlock {
  int64_t begin = 0, n = 0, runs = 0;
  int32_t row[kBlockEdges];  // of each run
  int64_t end[kBlockEdges];  // of each run, from the block's first edge on
  RowSplit::Piece piece[kBlockEdges];
  int32_t rows[kBlockEdges + kEdgeLanes];  // of each edge

  void add(RowSplit::Piece part) {
    if (n == 0) begin = part.begin, runs = 0;
    row[runs] = int32_t(part.row);
    name_row(rows, n, part.end - part.begin, part.row);
    n += part.end - part.begin;
    end[runs] = n;
    piece[runs++] = part;
  }
};

// f(block) for the edges of one item; no_edges(piece) where a row has none. `first` and `last` of a piece now
// say whether the row, or what the item has of it, begins and ends in this block.
template <typename F, typename G>
SACCADE_FORCE void for_each_block(const RowSplit& split, int64_t t, EdgeBlock& block, G no_edges, F f) {
  block.n = 0;
  split.for_each(t, [&](RowSplit::Piece piece) {
    if (piece.begin == piece.end) return no_edges(piece);
    for (int64_t at = piece.begin, n; at < piece.end; at += n) {
      n = min64(piece.end - at, kBlockEdges - block.n);
      block.add({piece.row, at, at + n, at == piece.begin, at + n == piece.end});
      if (block.n == kBlockEdges) f(), block.n = 0;
    }
  });
  if (block.n) f();
}

// The pass over rows, with one thread's scratch. Numbers of pairs and of heads lie as HeadLanes has them.
template <typename T, typename S>
struct RowPass {
  const GatherParams& p;
  GatherScratch<T, S> w;
  HeadLanes<T> each;  // as w.heads, every head with rows of its own
  RowReader<T, S> read_dout, read_dout_edge;
  OwnRows<T> dout, dout_edge;
  T *q_rows, *own, *lse, *low, *delta;                   // the last three [kBlockEdges][pitch], of runs
  T *s, *dP, *high_of, *low_of, *delta_of, *drop, *cap;  // [kBlockEdges][pitch], of edges
  T* nothing;                                            // zeros, as `own`
  T* grads;                                              // of bare scores, as these
  EdgeBlock block;
  int64_t ldq;
  bool stream;
  WeightOf<T> weight_of{false, T(1)};  // edges carry natural logits

  RowPass(const GatherParams& params, Arena& a)
      : p(params),
        w(params, a, kBlockEdges),
        each(params),
        read_dout(a, w.own_beyond, p.heads, p.head_dim_v),
        read_dout_edge(a, w.own_beyond, p.heads, p.edge_dim),
        stream(outgrows_caches(p.dq, p.batch, p.seqlen_q, p.heads, p.head_dim)) {
    const int64_t pairs = w.heads.size(kBlockEdges) + kLanes<T>;
    each.heads_k = p.heads, each.group = 1;
    ldq = round_up(p.head_dim, kLanes<T>);
    q_rows = a.take<T>(p.heads * ldq);
    own = a.take<T>(EdgeNumbers<T>::piece_size(p));
    nothing = a.take<T>(EdgeNumbers<T>::piece_size(p));
    T** const arrays[] = {&lse, &low, &delta, &s, &dP, &high_of, &low_of, &delta_of};
    for (T** x : arrays) *x = a.take<T>(pairs);
    drop = a.take<T>(p.dropout_p > 0 ? pairs : 0);
    cap = a.take<T>(p.softcap != 0 ? pairs : 0);
    grads = a.take<T>(pairs);
    if (!a.base) return;
    memset(lse, 0, size_t(pairs) * sizeof(T));
    memset(low, 0, size_t(pairs) * sizeof(T));
    memset(nothing, 0, size_t(EdgeNumbers<T>::piece_size(p)) * sizeof(T));
  }
  EdgeGroup edges(int64_t b) const { return {&p, b, block.begin, block.n, block.rows}; }

  // dP of the block, to where a pass over keys will find it: in place of the weights.
  void value_block(int64_t b, const EdgeNumbers<T>& to) {
    const EdgeGroup all = edges(b);
    for (int64_t at = 0; at < all.n; at += kEdgeLanes) {
      const EdgeGroup g = all.part(at, kEdgeLanes);
      w.read_features(g);
      value_dots(g, dP + at * w.heads.pitch);
    }
    copy_numbers(to.weights + to.at(b, block.begin), dP, block.n * w.heads.pitch);
  }

  // The numbers of the block's edges.
  void find_numbers(int64_t b, const EdgeNumbers<T>& to) {
    const HeadLanes<T>& heads = w.heads;
    const int64_t pairs = block.n * heads.pitch;
    const EdgeGroup all = edges(b);
    if (is_softmax(p)) find_lse(b);
    const int64_t place = to.at(b, block.begin);
    if (w.far) copy_numbers(dP, to.weights + place, pairs);
    for (int64_t at = 0; at < block.n; at += kEdgeLanes) {
      const EdgeGroup g = all.part(at, kEdgeLanes);
      w.read_features(g);
      if (!w.far) value_dots(g, dP + at * heads.pitch);
      edge_logits<T, S>(p, g, w, s + at * heads.pitch,
                        {cap + at * heads.pitch, to.slopes.kept ? &to.slopes : nullptr, at});
    }
    if (p.dropout_p > 0) {
      for (int64_t c = 0; c < heads.size(block.n); ++c) drop[c] = T(1);
      drop_edges(p, all, heads.pitch, drop);
    }
    find_weights(heads.size(block.n));
    if (is_softmax(p)) find_delta(b);
    find_gradients(heads.size(block.n));
    copy_numbers(to.weights + place, s, pairs);
    copy_numbers(to.grads + place, grads, pairs);
    if (p.needs & kNeedEdgeBias) copy_numbers(to.logit + place, dP, pairs);
  }

  // Run r's part of dQ (and of the edge queries' gradient, behind it).
  void add_queries(int64_t b, int64_t r, SumRow<T> sums, double* dW) {
    const HeadLanes<T>& heads = w.heads;
    const RowSplit::Piece& run = block.piece[r];
    const EdgeGroup all = edges(b).part(run.begin - block.begin, run.end - run.begin);
    T *const dq = sums.at, *const dqe = dq + p.heads * ldq;
    HeadRows<T> q{};
    if (p.score != Score::kDot && !p.joint_dim)
      q = read_heads<T, S>(p.q, b, run.row, p.heads, p.head_dim, q_rows);
    for (int64_t at = 0; at < all.n; at += kEdgeLanes) {
      const EdgeGroup g = all.part(at, kEdgeLanes);
      const EdgeRows<S> keys(p.k, b, p.indices + g.begin, g.n);
      const T* const by = grads + (g.begin - block.begin) * heads.pitch;
      const bool fresh = run.first && at == 0;
      if (p.score != Score::kDot) {
        const JointRows<T> rows =
            p.joint_dim ? w.joint.joined(g.begin - block.begin, g.n) : JointRows<T>{same_rows(q), 1};
        for (int64_t h = 0; h < p.heads; ++h)
          additive_edge_gradient<T, S>(p, h, rows, keys, heads.key(h), g.n, fresh, dq + h * ldq,
                                       dW + h * p.head_dim, by + h, heads.pitch);
        continue;
      }
      const bool only = sums.stream && run.first && run.last && g.n == all.n;
      edge_sums<false>(heads, w.live, dq, ldq, sum_from(fresh, only), keys, g.n, p.head_dim, by, heads.pitch);
      if (!p.edge_dim) continue;
      w.read_features(g);
      edge_sums<false>(heads, w.live, dqe, w.lde, sum_from(fresh, false), w.features.rows, g.n, p.edge_dim,
                       by, heads.pitch);
    }
  }

 private:
  int64_t first_edge(int64_t r) const { return r ? block.end[r - 1] : 0; }

  // The lse of each run's row, for its edges.
  void find_lse(int64_t b) {
    const int64_t pitch = w.heads.pitch;
    for (int64_t r = 0; r < block.runs; ++r)
      for (int64_t h = 0; h < p.heads; ++h) {
        const int64_t x = r * pitch + h;
        weight_of.split(p.lse[b * p.lse_batch + h * p.lse_head + block.row[r]], lse[x], low[x]);
      }
    for (int64_t r = 0; r < block.runs; ++r) {
      spread(lse + r * pitch, first_edge(r), block.end[r], high_of);
      spread(low + r * pitch, first_edge(r), block.end[r], low_of);
    }
  }
  // delta = sum_e P_e dP_e of each run's row, less dlse, for its edges. Where the block has the whole row it
  // is formed from the numbers at hand: small rows' gradients cancel exactly as they should, whatever
  // rounding befell the output. Otherwise it is dout . out.
  void find_delta(int64_t b) {
    const HeadLanes<T>& heads = w.heads;
    const int64_t pitch = heads.pitch;
    for (int64_t r = 0; r < block.runs; ++r) {
      const RowSplit::Piece& run = block.piece[r];
      const int64_t at = first_edge(r) * pitch;
      if (run.begin == p.indptr[run.row] && run.end == p.indptr[run.row + 1])
        row_products(heads, (run.end - run.begin) * pitch, s + at, dP + at, delta + r * pitch);
      else
        output_products(b, block.row + r, delta + r * pitch);
      for (int64_t h = 0; p.dlse && h < p.heads; ++h)
        delta[r * pitch + h] -= T(p.dlse[b * p.lse_batch + h * p.lse_head + run.row]);
    }
    for (int64_t r = 0; r < block.runs; ++r) spread(delta + r * pitch, first_edge(r), block.end[r], delta_of);
  }
  // to[h] = dout . out of a row.
  void output_products(int64_t b, const int32_t* row, T* to) {
    read_dout.read(p.dout, b, row, 1, dout);
    pair_dots<T, S>(each, dout, {p.out, b, row, 1}, 1, p.head_dim_v, RowsAhead(), w.parts, to);
    if (!p.edge_dim) return;
    read_dout_edge.read(p.dout_edge, b, row, 1, dout_edge);
    pair_dots<T, S>(each, dout_edge, {p.out_edge, b, row, 1}, 1, p.edge_dim, RowsAhead(), w.parts, w.extra);
    for (int64_t h = 0; h < p.heads; ++h) to[h] += w.extra[h];
  }
  // The numbers of a run's heads, to each of its edges; the last vector may reach too far, where the next run
  // writes again.
  void spread(const T* from, int64_t begin, int64_t end, T* to) {
    constexpr int64_t L = kLanes<T>;
    const int64_t pitch = w.heads.pitch;
    if (pitch <= L) {
      const Vec<T> x = repeat_heads<T>(load(from), pitch);
      for (int64_t c = begin * pitch; c < end * pitch; c += L) store(to + c, x);
      return;
    }
    for (int64_t e = begin; e < end; ++e)
      for (int64_t c = 0; c < pitch; c += L) store(to + e * pitch + c, load(from + c));
  }
  // dP[pair] = dout . value, and its part through the edges' features.
  void value_dots(const EdgeGroup& g, T* to) {
    const EdgeRows<S> values(p.v, g.b, p.indices + g.begin, g.n);
    const RowsAhead ask(w.beyond, p.v, g.b, p.heads_k, p.head_dim_v, p.indices, g.begin, g.n, p.edges);
    read_dout.read(p.dout, g.b, g.rows, g.n, dout);
    pair_dots<T, S>(w.heads, dout, values, g.n, p.head_dim_v, ask, w.parts, to);
    if (!p.edge_dim) return;
    read_dout_edge.read(p.dout_edge, g.b, g.rows, g.n, dout_edge);
    w.add_feature_dots(p, dout_edge, g.n, to);
  }
  // Logits become weights before dropout, exactly 0 where an edge is masked, and dP their gradients.
  void find_weights(int64_t size) {
    for (int64_t c = 0; c < size; c += kLanes<T>) {
      const Vec<T> logit = load(s + c);
      const Vec<T> weight = is_softmax(p) ? weight_of(logit, load(high_of + c), load(low_of + c))
                                          : activate<T>(p.activation, logit);
      store(s + c, logit == -kInf<T> ? Vec<T>{} : weight);
      if (p.dropout_p > 0) store(dP + c, load(dP + c) * load(drop + c));
    }
  }
  // From these: weights after dropout, gradients of the bare score, and dP becomes that of the logit. Exactly
  // 0 where a weight is.
  void find_gradients(int64_t size) {
    const Vec<T> none{};
    for (int64_t c = 0; c < size; c += kLanes<T>) {
      const Vec<T> weight = load(s + c);
      Vec<T> grad = load(dP + c);
      if (is_softmax(p))
        grad = weight * (grad - load(delta_of + c));
      else if (p.activation == Activation::kSigmoid)
        grad = weight * (T(1) - weight) * grad;
      grad = weight == T(0) ? none : grad;
      if (p.dropout_p > 0) store(s + c, weight * load(drop + c));
      store(dP + c, grad);
      Vec<T> raw = grad * T(p.scale);
      if (p.softcap != 0) {
        const Vec<T> t = load(cap + c);
        raw = raw == T(0) ? none : raw * (T(1) - t * t);  // a masked edge's t may be NaN
      }
      store(grads + c, raw);
    }
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
  const RowSplit split = row_split<T>(p);
  const int64_t b = item / split.items(), t = item % split.items();
  Arena arena{scratch}, shared{workspace};
  RowPass<T, S> pass(p, arena);
  const EdgeNumbers<T> numbers(p, shared);
  for_each_block(split, t, pass.block, [](RowSplit::Piece) {}, [&] { pass.value_block(b, numbers); });
}

template <typename T, typename S>
static void gather_rows_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  const RowSplit split = row_split<T>(p);
  const int64_t b = item / split.items(), t = item % split.items(), size = EdgeNumbers<T>::piece_size(p);
  Arena arena{scratch}, shared{workspace};
  RowPass<T, S> pass(p, arena);
  const EdgeNumbers<T> numbers(p, shared);
  double* dW = p.weight ? numbers.dweight + item * p.heads * p.head_dim : nullptr;
  if (dW) memset(dW, 0, size_t(p.heads * p.head_dim) * sizeof(double));
  // A row that is whole in this item, and one of which neighbours have a part.
  const auto whole = [&](int64_t row) { return split.entire(t, row); };
  const auto sums_of = [&](int64_t row) {
    return whole(row) ? pass.own
                      : shared_piece(numbers.pieces, size, split.items(), b, t, split.begins(t, row) ? 1 : 0);
  };
  const auto no_edges = [&](RowSplit::Piece piece) {
    if (whole(piece.row))
      write_queries<T, S>(p, b, piece.row, pass.nothing, pass.ldq, pass.w.lde);
    else
      memset(sums_of(piece.row), 0, size_t(size) * sizeof(T));
  };
  for_each_block(split, t, pass.block, no_edges, [&] {
    pass.find_numbers(b, numbers);
    if (!(p.needs & (kNeedQ | kNeedEdgeQ | kNeedWeight))) return;
    for (int64_t r = 0; r < pass.block.runs; ++r) {
      const int64_t row = pass.block.row[r];
      const bool entire = whole(row);
      T* const place = entire && p.edge_dim == 0 && p.needs & kNeedQ
                           ? sums_in_place<T, S>(p.dq, b, row, p.heads, p.head_dim)
                           : nullptr;
      const SumRow<T> sums{place, sums_of(row), pass.stream};
      pass.add_queries(b, r, sums, dW);
      if (entire && !place && pass.block.piece[r].last)
        write_queries<T, S>(p, b, row, sums.at, pass.ldq, pass.w.lde);
    }
  });
  stream_fence();
}

template <typename T, typename S>
static void gather_rows_merge(const GatherParams& p, int64_t item, char*, char* workspace) {
  const RowSplit split = row_split<T>(p);
  Arena shared{workspace};
  const EdgeNumbers<T> numbers(p, shared);
  T* sum;
  const int64_t b = item / split.items(), t = item % split.items();
  const int64_t row = sum_pieces(split, b, t, numbers.pieces, EdgeNumbers<T>::piece_size(p), sum);
  if (row >= 0)
    write_queries<T, S>(p, b, row, sum, round_up(p.head_dim, kLanes<T>), round_up(p.edge_dim, kLanes<T>));
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
