// The weights themselves, for those who ask for them: P recomputed from lse, per head or averaged over heads
// in one pass.
#pragma once
#include "tiled_forward.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

template <typename M>
struct WeightBuffers {
  using T = typename M::T;
  ForwardBuffers<M> tile;
  T *sums, *rows;  // [columns][lanes] as tiles lie, summed over heads; [rows][columns] once they are

  WeightBuffers(const WeightParams& p, Arena& a)
      : tile(p, a), sums(a.take<T>(kBlockM * p.columns)), rows(a.take<T>(kBlockM * p.columns)) {}
};

// Adds one head's weights of a query block to w.sums.
template <typename M>
static void add_weights(const WeightParams& p, const QueryBlock& q, WeightBuffers<M>& w) {
  using T = typename M::T;
  const T unit = T(logit_unit(p));
  const WeightOf<T> weight_of(p);
  T lse[kBlockM], low[kBlockM];
  for (int64_t i = 0; i < q.lanes; ++i) lse[i] = kInf<T>, low[i] = T(0);
  if (is_softmax(p))
    for (int64_t i = 0; i < q.rows; ++i) weight_of.split(lse_at(p, p.lse, q)[i], lse[i], low[i]);
  const Matrix<T> rows = block_rows<T>(p.q, q, p.head_dim, p.head_dim, w.tile.block);
  const typename M::B queries = M::pack_columns(rows.p, rows.ld, q.rows, q.lanes, p.head_dim, w.tile.queries);
  const auto one_tile = [&](const KeyTile& t) {
    const typename M::A keys =
        t.extra ? M::row(static_cast<const char*>(p.extra_k) + q.h * p.head_dim * size_of(p.k.dtype),
                         p.k.dtype, p.head_dim, w.tile.keys)
                : M::rows(p, p.k, q.seq, q.b, q.hk, t.j0, t.n, p.head_dim, nullptr, w.tile.keys);
    T* S = w.tile.S;
    tile_logits<M>(p, q, t, tile_parts<M>(p, q, t), keys, queries, S, nullptr, w.tile.bias, w.tile.dead);
    if (is_softmax(p)) {
      for (int64_t j = 0; j < t.n; ++j)
        for (int64_t i = 0; i < q.lanes; i += kLanes<T>) {
          T* s = S + j * q.lanes + i;
          store(s, weight_of(load(s), load(lse + i), load(low + i)));
        }
    } else {
      activate_tile(p.activation, S, t.n * q.lanes, unit);
    }
    if (p.dropout_p > 0) {
      dropout_tile<T>(p, q, t, w.tile.Z);
      multiply_tile(S, w.tile.Z, t.n * q.lanes);
    }
    T* sums = w.sums + t.j0 * q.lanes;
    for (int64_t x = 0; x < t.n * q.lanes; x += kLanes<T>) store(sums + x, load(sums + x) + load(S + x));
  };
  KeyTiles tiles(p, q, {0, INT64_MAX});
  KeyTile t;
  while (tiles.next(t)) one_tile(t);
  if (p.extra_k) one_tile({q.seq.seqlen_k, 1, true, true, nullptr});
  if (p.activation == Activation::kSoftmax1)
    for (int64_t i = 0; i < q.rows; ++i) {
      const int64_t j = p.columns - 1;
      const bool kept =
          p.dropout_p == 0 || dropout_keeps(p.seed, dropout_threshold(p.dropout_p), q.b, q.h, q.i0 + i, j);
      if (kept) w.sums[j * q.lanes + i] += T(exp(-lse_at(p, p.lse, q)[i])) * T(1 / (1 - p.dropout_p));
    }
}

template <typename M>
static void weights_item(const WeightParams& p, int64_t item, char* scratch, char*) {
  using T = typename M::T;
  const int64_t blocks = (p.seqlen_q + kBlockM - 1) / kBlockM, heads = p.average ? 1 : p.heads;
  const int64_t m = item % blocks, h0 = item / blocks % heads, b = item / blocks / heads;
  const typename M::Scope scope;
  Arena arena{scratch};
  WeightBuffers<M> w(p, arena);
  memset(w.sums, 0, size_t(kBlockM * p.columns) * sizeof(T));
  int64_t lanes = 0;
  for (int64_t h = h0; h < (p.average ? p.heads : h0 + 1); ++h) {
    const QueryBlock q = query_block<M::kPad>(p, b, h, m);
    lanes = q.lanes;
    add_weights<M>(p, q, w);
  }
  const T share = T(1) / T(p.average ? p.heads : 1);
  const int64_t rows = min64(kBlockM, p.seqlen_q - m * kBlockM);
  transpose(w.sums, lanes, w.rows, p.columns, p.columns, rows);
  for (int64_t i = 0; i < rows; ++i) {
    T* row = w.rows + i * p.columns;
    for (int64_t j = 0; j < p.columns; ++j) row[j] *= share;
    write_row(row_at(p.weights, b, h0, m * kBlockM + i), p.weights.dtype, p.weights.col, row, p.columns);
  }
}

template <typename M>
static Plan<WeightParams> weights_plan(const WeightParams& p) {
  Plan<WeightParams> plan;
  Arena arena{nullptr};
  const WeightBuffers<M> sizes(p, arena);
  plan.scratch_bytes = arena.used;
  plan.add(p.batch * (p.average ? 1 : p.heads) * ((p.seqlen_q + kBlockM - 1) / kBlockM), &weights_item<M>);
  return plan;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
