// What the gather kernels share: edges one by one, of graphs in CSR form. A warp takes an item, a run of rows
// and edges of bounded cost: several light rows, or a piece of a heavy one, whose pieces are merged in their
// order. Within a warp, as many lanes as hold one row of keys in 16-byte loads make a team, and each team
// takes its own edges; teams meet at the end of a row.
#pragma once
#include "softmax.h"
#include "vectors.h"

namespace saccade {

constexpr int kGatherThreads = 128;

// Rows [0, rows) with indptr[r + 1] - indptr[r] edges each, cut into items of equal cost: a row costs 1 and
// each of its edges 1.
struct Split {
  const int64_t* indptr;
  int64_t rows, step, items;
};

struct GatherArgs {
  GatherParams p;
  Terms terms;
  const int64_t* seed;   // on the device; null: p.seed
  Split queries, keys;   // the graph by query, and its transpose by key
  float* pieces;         // [heads, items, 2, piece size]: slot 0 began before the item, slot 1 begins in it
  float *stats, *edges;  // backward: [3, B * H * Sq]; [B, H, E] gradients of logits, for edge_bias, or null
  bool aligned_q, aligned_k, aligned_v, aligned_out, aligned_dout, aligned_dq, aligned_dk, aligned_dv;
};

// ---- the split of work ----

// The last row whose cost begins at or before `cost`; the warp's lanes look at 32 rows at a time.
SACCADE_DEVICE int64_t row_at_cost(const Split& s, int64_t cost) {
  int64_t low = 0, high = s.rows;
  while (high - low > 1) {
    const int64_t span = high - low, mine = low + span * (thread_index() % 32 + 1) / 33;
    int before = load_global(s.indptr + mine) + mine <= cost;
    for (int mask = 16; mask; mask /= 2) before += shuffle_xor(before, mask);
    high = low + span * (before + 1) / 33;
    low += span * before / 33;
  }
  return low;
}

// Edges [begin, end) of a row; first, last: the row begins, ends in this item.
struct Piece {
  int row;
  int64_t begin, end;
  bool first, last;
};
// f(Piece) for each piece of item t, in order.
template <typename F>
SACCADE_DEVICE void for_each_piece(const Split& s, int64_t t, F f) {
  const int64_t low = t * s.step, high = low + s.step;
  int64_t row = row_at_cost(s, low), from = load_global(s.indptr + row);
  while (row < s.rows && from + row < high) {
    const int64_t to = load_global(s.indptr + row + 1);
    const int64_t end = least64(to, high - row - 1);
    f(Piece{int(row), most64(from, low - row - 1), end, from + row >= low, end == to});
    from = to;
    ++row;
  }
}
// The row that is cut at the end of item t and begins in it (-1: none), and the item in which it ends.
SACCADE_DEVICE int64_t cut_row(const Split& s, int64_t t, int64_t& end_item) {
  const int64_t high = (t + 1) * s.step;
  if (high >= load_global(s.indptr + s.rows) + s.rows) return -1;
  const int64_t row = row_at_cost(s, high - 1);
  const int64_t begin = load_global(s.indptr + row) + row, end = load_global(s.indptr + row + 1) + row;
  if (end + 1 <= high || begin < t * s.step) return -1;
  end_item = end / s.step;
  return row;
}
SACCADE_DEVICE float* piece_at(const GatherArgs& args, const Split& s, int64_t head, int64_t t, int slot,
                               int size) {
  return args.pieces + ((head * s.items + t) * 2 + slot) * size;
}

// The item of a warp: heads of one item lie side by side, since they read the same edges.
struct Item {
  int64_t t;
  int b, h;
};
SACCADE_DEVICE bool item_of(const Split& s, int64_t batch, int64_t heads, Item& item) {
  const int64_t index = block_index() * (kGatherThreads / 32) + thread_index() / 32;
  item = {index / heads % s.items, int(index / heads / s.items), int(index % heads)};
  return item.b < batch;
}

// ---- rows in the registers of a team ----

template <typename T, int kDim>
struct Team {
  static constexpr int kLanes = kDim / kVector<T> < 32 ? kDim / kVector<T> : 32;
  static constexpr int kTeams = 32 / kLanes;
  static constexpr int kChunks = kDim / (kLanes * kVector<T>);
  static constexpr int kNumbers = kChunks * kVector<T>;  // of a row, in each lane
  static constexpr int kEdges = kChunks > 1 ? 1 : 2;     // of a team at once
  static constexpr int kWords = kNumbers / Packed<T>::kCount;
  using Row = float[kNumbers];                      // sums
  using Loaded = typename Packed<T>::Word[kWords];  // as it lies in memory

  static SACCADE_DEVICE_MEMBER int index() { return thread_index() % 32 / kLanes; }
  static SACCADE_DEVICE_MEMBER bool leads() { return thread_index() % kLanes == 0; }
  static SACCADE_DEVICE_MEMBER int column(int chunk) {
    return (chunk * kLanes + thread_index() % kLanes) * kVector<T>;
  }

  // Row i of one head of x; zeros unless wanted, and from column dim on. What a dead edge names is never
  // read, so that a weight of 0 needs no test.
  static SACCADE_DEVICE_MEMBER void load(Loaded& row, const Rows& x, int b, int h, int i, int dim,
                                         bool aligned, bool wanted) {
    const T* from = rows_at<const T>(x, b, h, i);
    SACCADE_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int first = column(chunk);
      auto* to = row + chunk * 4;
      SACCADE_UNROLL
      for (int n = 0; n < 4; ++n) to[n] = Packed<T>::none();
      if (wanted && aligned && first + kVector<T> <= dim)
        Packed<T>::load(from + first, to);
      else if (wanted) {
        SACCADE_ROLLED
        for (int n = first; n < first + kVector<T>; ++n) Packed<T>::push(to, from + n * x.col, n < dim);
      }
    }
  }
  static SACCADE_DEVICE_MEMBER void store(const Row& row, float factor, const Rows& x, int b, int h, int i,
                                          int dim, bool aligned) {
    T* to = rows_at<T>(x, b, h, i);
    each_four(row, [&](int first, const float4& four) {
      store_four(to + first * x.col, x.col, dim - first, aligned, times(four, factor));
    });
  }
  static SACCADE_DEVICE_MEMBER void store_piece(const Row& row, float* to) {
    each_four(row, [&](int first, const float4& four) { store_aligned(to + first, four); });
  }
  template <typename F>
  static SACCADE_DEVICE_MEMBER void each_four(const Row& row, F f) {
    SACCADE_UNROLL
    for (int n = 0; n < kNumbers; n += 4)
      f(column(n / kVector<T>) + n % kVector<T>, float4{row[n], row[n + 1], row[n + 2], row[n + 3]});
  }
  static SACCADE_DEVICE_MEMBER float dot(const Loaded& x, const Loaded& y) {
    float sum = 0;
    SACCADE_UNROLL
    for (int n = 0; n < kNumbers; ++n) sum = fmaf(Packed<T>::number(x, n), Packed<T>::number(y, n), sum);
    SACCADE_UNROLL
    for (int mask = kLanes / 2; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
  }
  static SACCADE_DEVICE_MEMBER void add(Row& sum, const Loaded& x, float weight) {
    SACCADE_UNROLL
    for (int n = 0; n < kNumbers; ++n) sum[n] = fmaf(weight, Packed<T>::number(x, n), sum[n]);
  }
  static SACCADE_DEVICE_MEMBER void add_teams(Row& sum) {
    SACCADE_UNROLL
    for (int mask = kLanes; mask < 32; mask *= 2)
      for (int n = 0; n < kNumbers; ++n) sum[n] += shuffle_xor(sum[n], mask);
  }
};

// ---- edges ----

SACCADE_DEVICE Head gather_head(const Params& p, int b, int h) {
  return {b, h, h / int(p.heads / p.heads_k), int(p.seqlen_q), int(p.seqlen_k), 0, 0};
}

// Whether edge (i, j), at `place` of the CSR, counts, and its term. A term of -inf hides it.
struct Edge {
  bool kept;
  float term;
};
SACCADE_DEVICE Edge edge_of(const GatherArgs& args, const Head& x, const Band& band, int i, int j,
                            int64_t place) {
  const GatherParams& p = args.p;
  Edge edge{j >= first_key(band, i) && j < end_key(band, i) && keeps_pair(p.mask, x.b, i, j), 0};
  if (p.edge_bias && edge.kept) {
    const int64_t id = p.edge_ids ? load_global(p.edge_ids + place) : place;
    edge.term = load_global(static_cast<const float*>(p.edge_bias) + x.h * p.edge_bias_head + id);
    edge.kept = edge.term != -kInfinity;
  }
  return edge;
}
// The natural logit of an edge; `slope` receives its derivative by the product.
SACCADE_DEVICE float edge_logit(const GatherArgs& args, const Edge& edge, float product, float& slope) {
  const Terms& t = args.terms;
  float logit = t.scale * product;
  slope = t.scale;
  if (t.softcap != 0) {
    const float c = tanh_of(t.per_cap * product);
    logit = t.softcap * c;
    slope = t.scale * (1 - c * c);
  }
  if (!edge.kept) return -kInfinity;
  return args.p.edge_bias ? fmaxf(logit + edge.term, -kLargestLogit) : logit;
}
SACCADE_DEVICE bool undropped(const GatherArgs& args, uint64_t seed, const Head& x, int i, int j) {
  return !args.terms.dropout || keeps_half(dropout_word(seed, x, i, j), j & 1, args.terms.threshold);
}

}  // namespace saccade
