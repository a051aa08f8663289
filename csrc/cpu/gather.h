// What the passes of the gather body share: the even split of edges over work items, and what they know of
// an edge.
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
// each of its edges 1. A hub is shared by several items, a thousand leaves fill one. The numbers of an item's
// edges, `pitch` for each, stay in a core's cache.
struct RowSplit {
  const int64_t* indptr;
  int64_t rows, step;

  RowSplit(const int64_t* ptr, int64_t count, int64_t edges, int64_t pitch) : indptr(ptr), rows(count) {
    step = max64(256, min64(16384 / pitch, max64(1024, (count + edges) / 64)));
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
      f(Piece{r, begin, end, begins(t, r), end == indptr[r + 1]});
    }
  }
  // Whether row r begins in item t, and whether it ends there too.
  bool begins(int64_t t, int64_t r) const { return indptr[r] + r >= t * step; }
  bool entire(int64_t t, int64_t r) const { return begins(t, r) && indptr[r + 1] + r < (t + 1) * step; }
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

constexpr int64_t kEdgeLanes = 16;  // edges handled together; at least a vector of every set

// Whether the rows that edges point to outgrow a core's cache. Then sums of them are asked for ahead of their
// turn, and a pass reads the rows of one tensor only: two would push each other out of the caches. Products
// read many rows that wait for nothing, and so ahead by themselves: theirs are asked for where they outgrow
// what cores share as well.
constexpr int64_t kNearBytes = 4 << 20, kSharedBytes = 16 << 20;
SACCADE_FORCE bool rows_outgrow(int64_t bytes, const GatherParams& p, int64_t rows, int64_t heads) {
  return rows * heads * (p.head_dim + p.head_dim_v) * size_of(p.q.dtype) > bytes;
}

// gcc (12) drops calls of a function that does nothing but prefetch, as if it did nothing at all.
SACCADE_FORCE void prefetch(const void* at) {
  __builtin_prefetch(at);
  __asm__ volatile("" : : "r"(at));
}

// Where the rows of one tensor lie, all heads of each.
struct RowLines {
  const char* base = nullptr;
  int64_t row = 0, head = 0, heads = 0, bytes = 0;

  RowLines() = default;
  RowLines(const Rows& x, int64_t b, int64_t number, int64_t d) : base(row_at(x, b, 0, 0)) {
    const int64_t size = size_of(x.dtype);
    const bool joined = number == 1 || x.head == d;
    row = x.row * size, head = x.head * size;
    heads = joined ? 1 : number, bytes = (joined ? number * d : d) * size;
  }
  SACCADE_MEMBER void ask(int64_t index) const {
    const char* from = base + index * row;
    for (int64_t h = 0; h < heads; ++h, from += head)
      for (int64_t at = 0; at < bytes; at += 64) prefetch(from + at);
  }
};

// Asks for rows so that they are there when their turn comes: those of the edges kEdgeLanes behind the
// `count` edges from `at` on.
struct RowsAhead {
  RowLines lines;
  const int32_t* index = nullptr;
  int64_t n = 0;

  RowsAhead() = default;
  RowsAhead(bool far, const Rows& x, int64_t b, int64_t heads, int64_t d, const int32_t* rows, int64_t at,
            int64_t count, int64_t edges) {
    if (!far) return;
    lines = RowLines(x, b, heads, d);
    index = rows + at + kEdgeLanes;
    n = max64(0, min64(count, edges - at - kEdgeLanes));
  }
  SACCADE_MEMBER void operator()(int64_t e) const {
    if (e < n) lines.ask(index[e]);
  }
};
constexpr int64_t kRowsAhead = 24;  // for rows that follow each other

// No further than `n`: what follows belongs to another thread.
template <typename T>
SACCADE_FORCE void copy_numbers(T* to, const T* from, int64_t n) {
  int64_t c = 0;
  for (; c + kLanes<T> <= n; c += kLanes<T>) store(to + c, load(from + c));
  for (; c < n; ++c) to[c] = from[c];
}

// Whether anything but the graph says which edges attend.
SACCADE_FORCE bool mask_decides(const GatherParams& p) {
  const int64_t* b = p.mask.band;
  return b[0] != kUnbounded || b[1] != kUnbounded || b[2] != kUnbounded || b[3] != kUnbounded ||
         p.mask.head_bounds || p.mask.num_chunks || p.mask.lengths || irregular(p.mask);
}
// Every stored edge counts. Otherwise an edge may be dead (weight exactly 0), and what stands in its rows,
// NaN perhaps, must not reach a sum.
SACCADE_FORCE bool all_edges_live(const GatherParams& p) {
  return !mask_decides(p) && !p.edge_bias && p.dropout_p == 0 && is_softmax(p);
}

// The user's number of an edge.
SACCADE_FORCE int64_t edge_id(const GatherParams& p, int64_t edge) {
  return p.edge_ids ? p.edge_ids[edge] : edge;
}

// Edges that follow each other, of whatever rows.
struct EdgeGroup {
  const GatherParams* p;
  int64_t b, begin, n;
  const int32_t* rows;  // the row of each

  int64_t key(int64_t e) const { return p->indices[begin + e]; }
  int64_t id(int64_t e) const { return edge_id(*p, begin + e); }
  // How many of them have an edge kEdgeLanes behind.
  int64_t ahead() const { return max64(0, min64(n, p->edges - begin - kEdgeLanes)); }
  // Up to `most` of them from `at` on.
  EdgeGroup part(int64_t at, int64_t most) const {
    return {p, b, begin + at, min64(most, n - at), rows + at};
  }
};

// rows[e] = row for the n edges from e = at on. What follows, up to kEdgeLanes of them, is overwritten too:
// rows are named in their order.
SACCADE_FORCE void name_row(int32_t* rows, int64_t at, int64_t n, int64_t row) {
  for (int64_t e = at; e < at + n; e += kEdgeLanes)
    for (int64_t i = 0; i < kEdgeLanes; ++i) rows[e + i] = int32_t(row);
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
