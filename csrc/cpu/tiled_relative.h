// The gradient of a relative bias, of either kind, in the backward pass over runs of keys.
#pragma once
#include "tiled_forward.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// Numbers in the workspace for so many runs of keys. By distance: [b][run][h][rel_size], sums along
// diagonals. By query: [run][b][h][block][2][kBlockM], the first and last numbers of each row.
SACCADE_FORCE int64_t relative_parts(const Params& p, int64_t runs) {
  const int64_t blocks = (p.seqlen_q + kBlockM - 1) / kBlockM;
  return runs * p.batch * p.heads * (is_by_query(p) ? blocks * 2 * kBlockM : p.rel_size);
}
SACCADE_FORCE int64_t ends_at(const Params& p, const QueryBlock& q, int64_t run) {
  const int64_t blocks = (p.seqlen_q + kBlockM - 1) / kBlockM;
  return (((run * p.batch + q.b) * p.heads + q.h) * blocks + q.i0 / kBlockM) * 2 * kBlockM;
}

// Where one head's query blocks leave the share of one run of keys; nothing happens where nobody wants it. By
// query, a number between the ends of a row belongs to one key, so the item that owns the key writes it; the
// ends sum the far keys of all runs, in one part for each.
template <typename T>
struct RelativeShare {
  double* diagonals = nullptr;
  T* rows = nullptr;  // the block's rows of drel_bias
  double* ends = nullptr;

  RelativeShare(const GradParams& p, double* parts, int64_t part, int64_t h) {
    if (!(p.needs & kNeedRelBias) || is_by_query(p)) return;
    diagonals = parts + (part * p.heads + h) * p.rel_size;
    memset(diagonals, 0, size_t(p.rel_size) * sizeof(double));
  }
  void begin(const GradParams& p, const QueryBlock& q, double* parts, int64_t run) {
    if (!(p.needs & kNeedRelBias) || !is_by_query(p)) return;
    rows = static_cast<T*>(p.drel_bias) + rel_row_at(p, q.b, q.h, q.seq.q_begin + q.i0);
    ends = parts + ends_at(p, q, run);
    memset(ends, 0, 2 * kBlockM * sizeof(double));
  }
  void add(const Params& p, const QueryBlock& q, const KeyTile& t, const T* dS) const {
    if (t.extra) return;
    if (diagonals)
      for (int64_t j = 0; j < t.n; ++j) {
        double* r = diagonals + rel_index<T>(p, q, t.j0 + j, 0);
        for (int64_t i = 0; i < q.rows; ++i) r[-i] += dS[j * q.lanes + i];
      }
    if (!rows) return;
    const int64_t c = t.j0 - (q.i0 + q.seq.seqlen_k - q.seq.seqlen_q);
    for (int64_t j = 0; j < t.n; ++j) {
      const ClippedLanes x(p, c + j, q.rows);
      const T* g = dS + j * q.lanes;
      for (int64_t i = 0; i < x.above; ++i) ends[kBlockM + i] += g[i];
      for (int64_t i = x.above; i < x.below; ++i) rows[x.between + i * (p.rel_row - 1)] = g[i];
      for (int64_t i = x.below; i < q.rows; ++i) ends[i] += g[i];
    }
  }
};

// Distances that no key is at have no gradient, and nobody else writes them.
static int64_t relative_items(const Params& p) { return p.heads * (p.rel_batch ? p.batch : 1); }
template <typename T>
static void clear_relative(const GradParams& p, int64_t item, char*, char*) {
  memset(static_cast<T*>(p.drel_bias) + item * p.rel_head, 0, size_t(p.rel_head) * sizeof(T));
}

template <typename T>
static void sum_ends(const GradParams& p, const QueryBlock& q, const double* parts, int64_t runs) {
  T* rows = static_cast<T*>(p.drel_bias) + rel_row_at(p, q.b, q.h, q.seq.q_begin + q.i0);
  for (int64_t i = 0; i < q.rows; ++i) {
    double first = 0, last = 0;
    for (int64_t run = 0; run < runs; ++run) {
      first += parts[ends_at(p, q, run) + i];
      last += parts[ends_at(p, q, run) + kBlockM + i];
    }
    T* row = rows + i * p.rel_row;
    row[0] = T(p.rel_row > 1 ? first : first + last);  // with K = 0 they are one number
    if (p.rel_row > 1) row[p.rel_row - 1] = T(last);
  }
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
