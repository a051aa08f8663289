// What the passes of the gather body share: rows of any dtype as vectors, and the even split of edges over
// work items.
#pragma once
#include "tiled_forward.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

template <typename S>
SACCADE_FORCE const S* typed_row(const Rows& x, int64_t b, int64_t h, int64_t i) {
  return static_cast<const S*>(x.data) + b * x.batch + h * x.head + i * x.row;
}

// Rows [0, rows) with indptr[r + 1] - indptr[r] edges each, cut into items of equal cost: a row costs 1 and
// each of its edges 1. A hub is shared by several items, a thousand leaves fill one.
struct RowSplit {
  const int64_t* indptr;
  int64_t rows, step;

  RowSplit(const int64_t* ptr, int64_t count, int64_t edges) : indptr(ptr), rows(count) {
    step = max64(1024, min64(16384, (count + edges) / 64));
    items_ = (count + edges + step - 1) / step;
  }
  int64_t items() const { return items_; }

  struct Piece {
    int64_t row, begin, end;  // edges [begin, end) of the row
    bool first, last;         // the row begins, ends in this item
  };
  // f(Piece) for each piece of item t, in order.
  template <typename F>
  void for_each(int64_t t, F f) const {
    const int64_t low = t * step, high = low + step;
    for (int64_t r = row_at_cost(low); r < rows && indptr[r] + r < high; ++r) {
      const int64_t begin = max64(indptr[r], low - r - 1), end = min64(indptr[r + 1], high - r - 1);
      f(Piece{r, begin, end, indptr[r] + r >= low, end == indptr[r + 1]});
    }
  }
  // The row that is cut at the end of item t and begins in it (-1: none), and the item in which it ends.
  int64_t cut_row(int64_t t, int64_t& end_item) const {
    const int64_t high = (t + 1) * step;
    if (rows == 0 || high >= indptr[rows] + rows) return -1;
    const int64_t r = row_at_cost(high - 1);
    if (indptr[r + 1] + r + 1 <= high || indptr[r] + r < t * step) return -1;
    end_item = (indptr[r + 1] + r) / step;
    return r;
  }

 private:
  // The last row whose cost range begins at or before `cost`.
  int64_t row_at_cost(int64_t cost) const {
    int64_t low = 0, high = rows;
    while (high - low > 1) {
      const int64_t mid = (low + high) / 2;
      (indptr[mid] + mid <= cost ? low : high) = mid;
    }
    return low;
  }
  int64_t items_;
};

template <typename T, int S = kLanes<T> / 2>
SACCADE_FORCE T lanes_max(Vec<T> v) {
  if constexpr (S == 0)
    return v[0];
  else
    return lanes_max<T, S / 2>(vmax<T>(v, exchange<T, S>(v, typename MakeSeq<kLanes<T>>::type{})));
}
// In the order of sum_each: a row of one edge, whose output is its value, then finds dP equal to delta.
template <typename T, int S = 1>
SACCADE_FORCE T lanes_sum(Vec<T> v) {
  if constexpr (S == kLanes<T>)
    return v[0];
  else
    return lanes_sum<T, S * 2>(v + exchange<T, S>(v, typename MakeSeq<kLanes<T>>::type{}));
}

constexpr int64_t kNearBytes = 1 << 20;
constexpr int64_t kEdgeLanes = 16;  // edges handled together; at least a vector of every set

// The edges of one step: their keys, their numbers, and which of them the rest of the mask keeps but for its
// intervals, which may differ by head.
struct EdgeGroup {
  int64_t n, b, row;
  int64_t key[kEdgeLanes], id[kEdgeLanes];
  bool kept[kEdgeLanes];
  bool live;  // all_edges_live: kept is not looked at
};

// Whether the rows that edges point to outgrow a core's cache.
SACCADE_FORCE bool rows_lie_far(const GatherParams& p, int64_t rows, int64_t heads) {
  return rows * heads * (p.head_dim + p.head_dim_v) * size_of(p.q.dtype) > kNearBytes;
}

// Asks for one head's part of the rows that come kEdgeLanes edges later, so that they are there when their
// turn comes.
template <typename S>
SACCADE_FORCE void prefetch_rows(const Rows& x, int64_t b, int64_t h, const int32_t* later, int64_t n,
                                 int64_t d) {
  const char* base = row_at(x, b, h, 0);
  const int64_t step = x.row * int64_t(sizeof(S)), bytes = d * int64_t(sizeof(S));
  for (int64_t e = 0; e < n; ++e)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(base + later[e] * step + at);
}
SACCADE_FORCE int64_t edges_ahead(int64_t at, int64_t n, int64_t edges) {
  return max64(0, min64(n, edges - at - kEdgeLanes));
}

// Every stored edge counts: nothing but the graph decides. Otherwise an edge may be dead (weight exactly 0),
// and what stands in its rows, NaN perhaps, must not be touched.
SACCADE_FORCE bool all_edges_live(const GatherParams& p) {
  const int64_t* b = p.mask.band;
  return b[0] == kUnbounded && b[1] == kUnbounded && b[2] == kUnbounded && b[3] == kUnbounded &&
         !p.mask.head_bounds && !p.mask.num_chunks && !p.mask.lengths && !irregular(p.mask) && !p.edge_bias &&
         p.dropout_p == 0 && is_softmax(p);
}

static EdgeGroup edge_group(const GatherParams& p, int64_t b, int64_t row, int64_t begin, int64_t end) {
  EdgeGroup g;
  g.n = min64(kEdgeLanes, end - begin);
  g.b = b;
  g.row = row;
  g.live = all_edges_live(p);
  for (int64_t e = 0; e < g.n; ++e) {
    g.key[e] = p.indices[begin + e];
    g.id[e] = p.edge_ids ? p.edge_ids[begin + e] : begin + e;
  }
  if (g.live) return g;
  for (int64_t e = 0; e < g.n; ++e) g.kept[e] = keeps_pair(p.mask, b, row, g.key[e]);
  return g;
}

// Up to kEdgeLanes rows of one tensor, and where in them the head at hand begins.
template <typename S>
struct EdgeRows {
  const S* at[kEdgeLanes];
  int64_t offset = 0;
  SACCADE_MEMBER const S* row(int64_t e) const { return at[e] + offset; }
};

// s[e] = x . rows[e] for up to W rows from e0 on, lanes along d; what follows in s is overwritten.
template <typename T, typename S, int W>
SACCADE_FORCE void some_dots(const T* x, const EdgeRows<S>& rows, int64_t e0, int64_t n, int64_t d, T* s) {
  Vec<T> sums[W];
#pragma GCC unroll 16
  for (int l = 0; l < W; ++l) sums[l] = e0 + l < n ? dot_part<T, S>(x, rows.row(e0 + l), d) : Vec<T>{};
  store(s + e0, sum_each<T, W>(sums));
}

// s[e] = x . rows[e] for n rows, 0 up to the end of their vector; s [kEdgeLanes].
template <typename T, typename S>
SACCADE_FORCE void edge_dots(const T* x, const EdgeRows<S>& rows, int64_t n, int64_t d, T* s) {
  constexpr int L = kLanes<T>;
  for (int64_t e0 = 0; e0 < n; e0 += L) {
    const int64_t rest = n - e0;
    if (L > 8 && rest > 8)
      some_dots<T, S, L>(x, rows, e0, n, d, s);
    else if (L > 4 && rest > 4)
      some_dots<T, S, (L < 8 ? L : 8)>(x, rows, e0, n, d, s);
    else if (L > 2 && rest > 2)
      some_dots<T, S, (L < 4 ? L : 4)>(x, rows, e0, n, d, s);
    else
      some_dots<T, S, 2>(x, rows, e0, n, d, s);
  }
}

// y += sum_e w(e) rows[e]; y is padded to whole vectors.
template <typename T, typename S, typename W>
SACCADE_FORCE void edge_sum(T* y, const EdgeRows<S>& rows, int64_t n, int64_t d, W w) {
  constexpr int L = kLanes<T>;
  int64_t c = 0;
  for (; c + 2 * L <= d; c += 2 * L) {
    Vec<T> a = load(y + c), b = load(y + c + L);
    for (int64_t e = 0; e < n; ++e) {
      const S* row = rows.row(e) + c;
      a += w(e) * load_as<T>(row);
      b += w(e) * load_as<T>(row + L);
    }
    store(y + c, a);
    store(y + c + L, b);
  }
  for (; c < d; c += L) {
    const int64_t width = min64(L, d - c);
    Vec<T> a = load(y + c);
    for (int64_t e = 0; e < n; ++e)
      a += w(e) * (width == L ? load_as<T>(rows.row(e) + c) : load_part<T>(rows.row(e) + c, width));
    store(y + c, a);
  }
}

// The rows with those of dead edges replaced by zeros.
template <typename T, typename S, typename W>
SACCADE_FORCE EdgeRows<S> live_rows(const EdgeRows<S>& rows, W weight, int64_t n, const S* zeros) {
  EdgeRows<S> live;
  for (int64_t e = 0; e < n; ++e) live.at[e] = weight(e) != T(0) ? rows.row(e) : zeros;
  return live;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
