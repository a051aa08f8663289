// The half of the gather body's backward that reads what the pass over rows left for each edge: dK and dV by
// columns, and what belongs to single edges.
#pragma once
#include "gather_forward.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// Work items of passes over single edges.
constexpr int64_t kEdgeItem = 4096;
SACCADE_FORCE int64_t edge_items(const GatherParams& p) { return (p.edges + kEdgeItem - 1) / kEdgeItem; }

template <typename T>
struct EdgeNumbers {
  int64_t edges, pitch;  // of HeadLanes
  T* weights;            // [B][E][pitch]: after dropout
  T* grads;              // [B][E][pitch]: of the bare score
  T* logit;              // [B][E][pitch]: gradient of the natural logit, with edge_bias only
  T* pieces;             // cut rows
  double* dweight;       // partial gradients of the score's weight, [B x items][H][D]
  T* columns;            // cut columns
  double* joint;         // partial gradients of W where features join the score, [edge items][De][H][ld]
  Slopes<T> slopes;

  static int64_t piece_size(const GatherParams& p) {
    return p.heads * (round_up(p.head_dim, kLanes<T>) + round_up(p.edge_dim, kLanes<T>));
  }
  static int64_t column_size(const GatherParams& p) {
    return p.heads_k * (round_up(p.head_dim, kLanes<T>) + round_up(p.head_dim_v, kLanes<T>));
  }
  EdgeNumbers(const GatherParams& p, Arena& a) : pitch(HeadLanes<T>(p).pitch), slopes(p, a) {
    const int64_t numbers = p.batch * p.edges * pitch;
    const int64_t items = row_split<T>(p).items(), t_items = column_split<T>(p).items();
    weights = a.take<T>(numbers);
    grads = a.take<T>(numbers);
    logit = a.take<T>(p.needs & kNeedEdgeBias ? numbers : 0);
    pieces = a.take<T>(p.batch * items * 2 * piece_size(p));
    dweight = a.take<double>(p.weight ? p.batch * items * p.heads * p.head_dim : 0);
    columns = a.take<T>(p.batch * t_items * 2 * column_size(p));
    joint = a.take<double>(
        p.needs & kNeedEdgeQ ? edge_items(p) * p.joint_dim * p.heads * round_up(p.head_dim, kLanes<T>) : 0);
    edges = p.edges;
  }
  int64_t at(int64_t b, int64_t edge) const { return (b * edges + edge) * pitch; }
};

// to[l] += v[l] of n lanes.
template <typename T>
SACCADE_FORCE void add_wide(double* to, Vec<T> v, int64_t n) {
  using Wide __attribute__((vector_size(sizeof(double) * kLanes<T>))) = double;
  Wide sum{};
  memcpy(&sum, to, size_t(n) * sizeof(double));
  sum += __builtin_convertvector(v, Wide);
  memcpy(to, &sum, size_t(n) * sizeof(double));
}

// y += sum_e g_e w phi'(own_e + row_e), or y = where it is fresh, and dw += sum_e g_e phi where asked: the
// additive scores' gradient towards q (or k). g_e = g[e * pitch]; `rows` are those of head k.
template <typename T, typename S>
static void additive_edge_gradient(const GatherParams& p, int64_t h, const JointRows<T>& own,
                                   const EdgeRows<S>& rows, int64_t k, int64_t n, bool fresh, T* y,
                                   double* dw, const T* g, int64_t pitch) {
  constexpr int L = kLanes<T>;
  const T* w = static_cast<const T*>(p.weight) + h * p.head_dim;
  for (int64_t c = 0; c < p.head_dim; c += L) {
    const int64_t width = min64(L, p.head_dim - c);
    const Vec<T> weight = width == L ? load(w + c) : load_part<T>(w + c, width);
    Vec<T> sum = fresh ? Vec<T>{} : load(y + c), sum_w{};
    for (int64_t e = 0; e < n; ++e) {
      const T grad = g[e * pitch];
      if (grad == T(0)) continue;  // a masked edge: phi may be NaN where its key is
      const S* row = rows.at[e] + k * rows.head + c;
      const Vec<T> x = load(own.of(e, h) + c) + (width == L ? load_as<T>(row) : load_part<T>(row, width));
      const Vec<T> phi = phi_of<T>(p, x), slope_of = phi_slope<T>(p, x, phi);
      sum += grad * weight * slope_of;
      sum_w += grad * phi;
    }
    store(y + c, sum);
    if (dw) add_wide<T>(dw + c, sum_w, width);
  }
}

// The row that item t cuts at its end, its pieces added up in the order of their edges; -1: none.
template <typename T>
static int64_t sum_pieces(const RowSplit& split, int64_t b, int64_t t, T* pieces, int64_t size, T*& sum) {
  int64_t end = 0;
  const int64_t row = split.cut_row(t, end);
  if (row < 0) return row;
  sum = shared_piece(pieces, size, split.items(), b, t, 1);
  for (int64_t other = t + 1; other <= end; ++other) {
    const T* part = shared_piece(pieces, size, split.items(), b, other, 0);
    for (int64_t x = 0; x < size; ++x) sum[x] += part[x];
  }
  return row;
}

template <typename T, typename S>
static void write_keys(const GatherParams& p, int64_t needs, int64_t b, int64_t key, const T* sums,
                       int64_t ldk, int64_t ldv) {
  if (needs & kNeedK) write_heads<T, S>(p.dk, b, key, p.heads_k, sums, ldk, nullptr, p.head_dim);
  if (needs & kNeedV)
    write_heads<T, S>(p.dv, b, key, p.heads_k, sums + p.heads_k * ldk, ldv, nullptr, p.head_dim_v);
}

// to[e] = all[edges[e]], P numbers each. No more than those is read: the line behind them was not asked for.
template <int P, typename T>
SACCADE_FORCE void collect_each(const T* all, const int64_t* edges, int64_t n, T* to) {
  for (int64_t e = 0; e < n; ++e) memcpy(to + e * P, all + edges[e] * P, P * sizeof(T));
}
// The same of whole vectors.
template <typename T>
SACCADE_FORCE void collect_vectors(const T* all, const int64_t* edges, int64_t n, int64_t pitch, T* to) {
  for (int64_t e = 0; e < n; ++e)
    for (int64_t c = 0; c < pitch; c += kLanes<T>)
      store(to + e * pitch + c, load(all + edges[e] * pitch + c));
}

// The pass over columns, with one thread's scratch: an edge's query and dout rows, and its numbers.
template <typename T, typename S>
struct ColumnPass {
  const GatherParams& p;
  HeadLanes<T> heads;
  T *own, *key_rows;
  T *weights, *grads;  // [kEdgeLanes][pitch]
  HeadRows<T> keys{};  // of additive scores without slopes, as is `joint`
  JointFeatures<T> joint;
  int64_t ldk, ldv;
  bool live, far, stream_k, stream_v;

  ColumnPass(const GatherParams& params, Arena& a)
      : p(params),
        heads(params),
        joint(params, a, params.score == Score::kAdditive ? kEdgeLanes : 0),
        live(all_edges_live(params)),
        far(rows_outgrow(kNearBytes, params, params.seqlen_q, params.heads)),
        stream_k(outgrows_caches(params.dk, params.batch, params.seqlen_k, params.heads_k, params.head_dim)),
        stream_v(
            outgrows_caches(params.dv, params.batch, params.seqlen_k, params.heads_k, params.head_dim_v)) {
    ldk = round_up(p.head_dim, kLanes<T>);
    ldv = round_up(p.head_dim_v, kLanes<T>);
    own = a.take<T>(EdgeNumbers<T>::column_size(p));
    key_rows = a.take<T>(p.heads_k * ldk);
    weights = a.take<T>(kEdgeLanes * heads.pitch);
    grads = a.take<T>(kEdgeLanes * heads.pitch);
  }

  // The edges of one piece join the sums of their key: dK of all heads, dV, or both.
  template <int64_t Needs>
  void piece(int64_t b, RowSplit::Piece piece, const EdgeNumbers<T>& numbers, SumRow<T> dk, SumRow<T> dv) {
    if (Needs & kNeedK && p.score != Score::kDot && !numbers.slopes.kept)
      keys = read_heads<T, S>(p.k, b, piece.row, p.heads_k, p.head_dim, key_rows);
    if (piece.begin == piece.end) {
      if (Needs & kNeedK) memset(dk.at, 0, size_t(p.heads_k * ldk) * sizeof(T));
      if (Needs & kNeedV) memset(dv.at, 0, size_t(p.heads_k * ldv) * sizeof(T));
    }
    for (int64_t at = piece.begin; at < piece.end; at += kEdgeLanes) {
      const int64_t n = min64(kEdgeLanes, piece.end - at);
      if constexpr (Needs & kNeedK) {
        collect(b, at, n, numbers, numbers.grads, grads, numbers.slopes.kept);
        if (p.score == Score::kDot)
          add_rows(b, at, piece, p.q, p.head_dim, grads, dk, ldk);
        else if (numbers.slopes.kept)
          add_slopes(b, at, piece, numbers.slopes, dk.at);
        else
          add_additive(b, at, piece, dk.at);
      }
      if constexpr (Needs & kNeedV) {
        collect(b, at, n, numbers, numbers.weights, weights, false);
        add_rows(b, at, piece, p.dout, p.head_dim_v, weights, dv, ldv);
      }
    }
  }

 private:
  // The numbers of these edges side by side, from all of their kind; those of the next are asked for.
  SACCADE_APART void collect(int64_t b, int64_t at, int64_t n, const EdgeNumbers<T>& numbers, const T* all,
                             T* to, bool slopes) {
    const int64_t pitch = heads.pitch, ahead = min64(n, p.edges - at - kEdgeLanes);
    const int64_t* const edges = p.t_edges + at;
    const T* const first = all + numbers.at(b, 0);
    pitch == 1   ? collect_each<1>(first, edges, n, to)
    : pitch == 2 ? collect_each<2>(first, edges, n, to)
    : pitch == 4 ? collect_each<4>(first, edges, n, to)
    : pitch == 8 ? collect_each<8>(first, edges, n, to)
                 : collect_vectors(first, edges, n, pitch, to);
    for (int64_t e = 0; e < ahead; ++e) {
      const int64_t edge = p.t_edges[at + kEdgeLanes + e];
      prefetch(first + edge * pitch);
      if (slopes) prefetch(numbers.slopes.of(b, edge));
    }
  }
  // sums[k] += the edges' rows of x, of every head of key head k, by their weights; a head's first rows are
  // written, not added.
  SACCADE_APART void add_rows(int64_t b, int64_t at, RowSplit::Piece piece, const Rows& x, int64_t d,
                              const T* numbers, SumRow<T> sums, int64_t ld) {
    const int64_t n = min64(kEdgeLanes, piece.end - at);
    const RowsAhead ask(far, x, b, p.heads, d, p.t_rows, at, n, p.edges);
    const EdgeRows<S> rows(x, b, p.t_rows + at, n);
    for (int64_t e = 0; e < ask.n; ++e) ask(e);
    const bool first = at == piece.begin;
    const Sum kind = sum_from(first, sums.stream && first && at + n == piece.end);
    edge_sums<true>(heads, live, sums.at, ld, kind, rows, n, d, numbers, heads.pitch);
  }
  void add_slopes(int64_t b, int64_t at, RowSplit::Piece piece, const Slopes<T>& all, T* dk) {
    const int64_t n = min64(kEdgeLanes, piece.end - at);
    const MaskBits<T>* slopes[kEdgeLanes];
    for (int64_t e = 0; e < n; ++e) slopes[e] = all.of(b, p.t_edges[at + e]);
    for (int64_t h = 0; h < p.heads; ++h)
      all.add(p, h, slopes, n, at == piece.begin && heads.opens(h), dk + heads.key(h) * ldk, grads + h,
              heads.pitch);
  }
  void add_additive(int64_t b, int64_t at, RowSplit::Piece piece, T* dk) {
    const int64_t n = min64(kEdgeLanes, piece.end - at);
    const EdgeRows<S> queries(p.q, b, p.t_rows + at, n);
    const RowsAhead ask(far, p.q, b, p.heads, p.head_dim, p.t_rows, at, n, p.edges);
    for (int64_t e = 0; e < ask.n; ++e) ask(e);
    const JointRows<T> own =
        joint.join(same_rows(keys), heads.group, n, max64(0, min64(n, p.edges - at - kEdgeLanes)),
                   [&](int64_t e) { return edge_id(p, p.t_edges[at + e]); });
    for (int64_t h = 0; h < p.heads; ++h)
      additive_edge_gradient<T, S>(p, h, own, queries, h, n, at == piece.begin && heads.opens(h),
                                   dk + heads.key(h) * ldk, nullptr, grads + h, heads.pitch);
  }
};

// dK, dV or both of the keys of one item of the transposed graph.
template <typename T, typename S, int64_t Needs>
static void gather_columns_item(const GatherParams& p, int64_t item, char* scratch, char* workspace) {
  const RowSplit split = column_split<T>(p);
  const int64_t b = item / split.items(), t = item % split.items(), size = EdgeNumbers<T>::column_size(p);
  Arena arena{scratch}, shared{workspace};
  const EdgeNumbers<T> numbers(p, shared);
  ColumnPass<T, S> pass(p, arena);
  split.for_each(t, [&](RowSplit::Piece piece) {
    const bool entire = piece.first && piece.last;
    T* sums =
        entire ? pass.own : shared_piece(numbers.columns, size, split.items(), b, t, piece.first ? 1 : 0);
    T* const dk =
        entire && Needs & kNeedK ? sums_in_place<T, S>(p.dk, b, piece.row, p.heads_k, p.head_dim) : nullptr;
    T* const dv =
        entire && Needs & kNeedV ? sums_in_place<T, S>(p.dv, b, piece.row, p.heads_k, p.head_dim_v) : nullptr;
    pass.template piece<Needs>(b, piece, numbers, {dk, sums, pass.stream_k},
                               {dv, sums + p.heads_k * pass.ldk, pass.stream_v});
    const int64_t apart = (dk ? 0 : Needs & kNeedK) | (dv ? 0 : Needs & kNeedV);
    if (entire) write_keys<T, S>(p, apart, b, piece.row, sums, pass.ldk, pass.ldv);
  });
  stream_fence();
}

template <typename T, typename S>
static void gather_columns_merge(const GatherParams& p, int64_t item, char*, char* workspace) {
  const RowSplit split = column_split<T>(p);
  Arena shared{workspace};
  const EdgeNumbers<T> numbers(p, shared);
  T* sum;
  const int64_t b = item / split.items(), t = item % split.items();
  const int64_t key = sum_pieces(split, b, t, numbers.columns, EdgeNumbers<T>::column_size(p), sum);
  if (key >= 0)
    write_keys<T, S>(p, p.needs, b, key, sum, round_up(p.head_dim, kLanes<T>),
                     round_up(p.head_dim_v, kLanes<T>));
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
