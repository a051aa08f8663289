// The gather body, forward, an item of rows at a time: the logits of all their edges, whatever rows they
// belong to; then the softmax of every row; then its sum of values. Rows are short: products of their edges
// taken together need no loops that end with each row.
#pragma once
#include "gather_softmax.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// The workspace: the pieces of cut rows; and the logits of all edges, [B][E][pitch], where the rows lie far
// and a pass of its own makes them.
template <typename T>
struct ForwardSpace {
  T *pieces, *logits;
  bool far;

  ForwardSpace(const GatherParams& p, Arena& a) : far(rows_outgrow(kNearBytes, p, p.seqlen_k, p.heads_k)) {
    pieces = a.take<T>(p.batch * row_split<T>(p).items() * 2 * GatherState<T>::size(p));
    // Whole vectors are read from the last row on.
    logits = a.take<T>(far ? p.batch * p.edges * HeadLanes<T>(p).pitch + kLanes<T> : 0);
  }
};

// One thread's scratch, and the edges of its item: their rows, their logits, their weights.
template <typename T, typename S>
struct ForwardPass {
  const GatherParams& p;
  GatherScratch<T, S> w;
  GatherState<T> own;
  T *logits, *weights;
  int32_t* rows;
  EdgeGroup edges;
  bool stream;

  ForwardPass(const GatherParams& params, Arena& a)
      : p(params),
        w(params, a, kEdgeLanes),
        own(params, a.take<T>(GatherState<T>::size(params))),
        edges{&p, 0, 0, 0, nullptr},
        stream(outgrows_caches(p.out, p.batch, p.seqlen_q, p.heads, p.head_dim_v)) {
    const int64_t most = row_split<T>(p).step;
    logits = a.take<T>(w.heads.size(most) + kLanes<T>);
    weights = a.take<T>(w.heads.size(most) + kLanes<T>);
    rows = a.take<int32_t>(most + kEdgeLanes);
  }

  void name_rows(const RowSplit& split, int64_t b, int64_t t) {
    int64_t begin = -1, n = 0;
    split.for_each(t, [&](RowSplit::Piece piece) {
      if (begin < 0) begin = piece.begin;
      name_row(rows, n, piece.end - piece.begin, piece.row);
      n += piece.end - piece.begin;
    });
    edges = {&p, b, begin, n, rows};
  }
  void find_logits() {
    for (int64_t at = 0; at < edges.n; at += kEdgeLanes) {
      const EdgeGroup g = edges.part(at, kEdgeLanes);
      w.read_features(g);
      edge_logits<T, S>(p, g, w, logits + at * w.heads.pitch, {});
    }
  }
  // O and E of the rows or pieces of rows from the weights of their edges.
  void sum_values(RowSplit::Piece piece, SumRow<T> O, int64_t ldo, T* E) {
    const int64_t first = piece.begin - edges.begin;
    const EdgeGroup all = edges.part(first, piece.end - piece.begin);
    if (all.n == 0) {
      memset(O.at, 0, size_t(p.heads * ldo) * sizeof(T));
      memset(E, 0, size_t(p.heads * w.lde) * sizeof(T));
    }
    for (int64_t at = 0; at < all.n; at += kEdgeLanes) {
      const EdgeGroup g = all.part(at, kEdgeLanes);
      const EdgeRows<S> values(p.v, g.b, p.indices + g.begin, g.n);
      const T* weight = weights + (first + at) * w.heads.pitch;
      const RowsAhead ask(w.far, p.v, g.b, p.heads_k, p.head_dim_v, p.indices, g.begin, g.n, p.edges);
      for (int64_t e = 0; e < ask.n; ++e) ask(e);
      const Sum kind = sum_from(at == 0, O.stream && g.n == all.n);
      edge_sums<false>(w.heads, w.live, O.at, ldo, kind, values, g.n, p.head_dim_v, weight, w.heads.pitch);
      if (!p.edge_dim) continue;
      w.read_features(g);
      edge_sums<false>(w.heads, w.live, E, w.lde, sum_from(at == 0, false), w.features.rows, g.n, p.edge_dim,
                       weight, w.heads.pitch);
    }
  }
};

template <typename T, typename S>
static void gather_logits_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  const RowSplit split = row_split<T>(p);
  Arena arena{scratch}, shared{workspace};
  ForwardPass<T, S> pass(p, arena);
  pass.name_rows(split, item / split.items(), item % split.items());
  pass.find_logits();
  const int64_t pitch = pass.w.heads.pitch;
  copy_numbers(ForwardSpace<T>(p, shared).logits + (pass.edges.b * p.edges + pass.edges.begin) * pitch,
               pass.logits, pass.edges.n * pitch);
}

// Where the piece of a row that item t shares with its neighbours lies: slot 0 began before t, slot 1 begins
// in it.
template <typename T>
SACCADE_FORCE T* shared_piece(T* base, int64_t size, int64_t items, int64_t b, int64_t t, int slot) {
  return base + ((b * items + t) * 2 + slot) * size;
}

template <typename T, typename S>
static void gather_forward_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  const RowSplit split = row_split<T>(p);
  const int64_t b = item / split.items(), t = item % split.items(), size = GatherState<T>::size(p);
  Arena arena{scratch}, shared{workspace};
  ForwardPass<T, S> pass(p, arena);
  const ForwardSpace<T> space(p, shared);
  const HeadLanes<T>& heads = pass.w.heads;
  const int64_t pitch = heads.pitch;
  const auto state_of = [&](RowSplit::Piece piece) {
    if (piece.first && piece.last) return pass.own;
    return GatherState<T>(p, shared_piece(space.pieces, size, split.items(), b, t, piece.first ? 1 : 0));
  };
  pass.name_rows(split, b, t);
  if (!space.far) pass.find_logits();
  const T* logits = space.far ? space.logits + (b * p.edges + pass.edges.begin) * pitch : pass.logits;
  if (is_softmax(p)) {
    Logarithms<T> lse;
    split.for_each(t, [&](RowSplit::Piece piece) {
      const GatherState<T> state = state_of(piece);
      const int64_t numbers = (piece.end - piece.begin) * pitch;
      const int64_t at = (piece.begin - pass.edges.begin) * pitch;
      T* const weights = pass.weights + at;
      row_softmax(heads, numbers, logits + at, weights, state.m, state.l);
      if (!(piece.first && piece.last)) return;
      finish_sums(p, b, piece.row, state, lse);
      for (int64_t c = 0; c < heads.lanes(); c += kLanes<T>) {
        const Vec<T> share = load(state.l + c);
        for (int64_t x = c; x < numbers; x += heads.lanes()) store(weights + x, load(weights + x) * share);
      }
    });
    lse.finish();
  } else {
    for (int64_t c = 0; c < heads.size(pass.edges.n); c += kLanes<T>)
      store(pass.weights + c, activate<T>(p.activation, load(logits + c)));
  }
  if (p.dropout_p > 0) drop_edges(p, pass.edges, pitch, pass.weights);
  split.for_each(t, [&](RowSplit::Piece piece) {
    const bool entire = piece.first && piece.last;
    const GatherState<T> state = state_of(piece);
    T* const place = entire ? sums_in_place<T, S>(p.out, b, piece.row, p.heads, p.head_dim_v) : nullptr;
    pass.sum_values(piece, {place, state.O, pass.stream}, state.ldo, state.E);
    if (entire && !place)
      write_heads<T, S>(p.out, b, piece.row, p.heads, state.O, state.ldo, nullptr, p.head_dim_v);
    if (entire && p.edge_dim)
      write_heads<T, S>(p.out_edge, b, piece.row, p.heads, state.E, state.lde, nullptr, p.edge_dim);
  });
  stream_fence();
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

// Rows that were cut: their pieces are merged in the order of their edges.
template <typename T, typename S>
static void gather_merge_item(const GatherParams& p, int64_t item, char*, char* workspace) {
  const RowSplit split = row_split<T>(p);
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
  const RowSplit split = row_split<T>(p);
  Arena arena{nullptr}, shared{nullptr};
  const ForwardPass<T, S> pass(p, arena);
  const ForwardSpace<T> space(p, shared);
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
