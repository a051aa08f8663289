// A bias by query and clipped distance, the form in which relative positions come that multiply the query
// (Shaw et al., arXiv 1803.02155): each query has a row of 2K + 1 numbers, and a key at distance delta takes
// the one at K + clip(delta, -K, K).
#pragma once
#include "../params.h"
#include "vec.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

SACCADE_FORCE bool is_by_query(const Params& p) { return p.rel_row != 0; }

// The row of query `row` of the tensor.
SACCADE_FORCE int64_t rel_row_at(const Params& p, int64_t b, int64_t h, int64_t row) {
  return b * p.rel_batch + h * p.rel_head + row * p.rel_row;
}

// One key before the lanes of a block, lane i at distance c - i: lanes [0, above) take the row's last number,
// lanes from `below` on its first. Between them each takes a number of its own, which no other key of the
// query takes; from lane to lane it lies p.rel_row - 1 further.
struct ClippedLanes {
  int64_t above, below, between;  // between: where lane 0 would read
  ClippedLanes(const Params& p, int64_t c, int64_t rows)
      : above(limited(c - p.rel_center + 1, 0, rows)),
        below(limited(c + p.rel_center, above, rows)),
        between(c + p.rel_center) {}

 private:
  static int64_t limited(int64_t x, int64_t low, int64_t high) { return x < low ? low : x < high ? x : high; }
};

// S[j][i] += the bias of n keys, of which the first is at distance c from lane 0. `rel` is lane 0's row.
template <typename T, int64_t Lanes>
static void add_clipped(const Params& p, const T* rel, int64_t c, int64_t n, int64_t rows, int64_t lanes,
                        T* S) {
  // Most tiles are far from the diagonal and read these alone, one after the other.
  T first[Lanes], last[Lanes];
  for (int64_t i = 0; i < rows; ++i) {
    first[i] = rel[i * p.rel_row];
    last[i] = rel[i * p.rel_row + p.rel_row - 1];
  }
  for (int64_t j = 0; j < n; ++j) {
    const ClippedLanes x(p, c + j, rows);
    T* row = S + j * lanes;
    for (int64_t i = 0; i < x.above; ++i) row[i] += last[i];
    for (int64_t i = x.above; i < x.below; ++i) row[i] += rel[x.between + i * (p.rel_row - 1)];
    for (int64_t i = x.below; i < rows; ++i) row[i] += first[i];
  }
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
