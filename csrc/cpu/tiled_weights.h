// The weights themselves, for those who ask for them: P recomputed from lse, per head or averaged over heads
// in one pass.
#pragma once
#include "tiled_forward.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// A work item: one query block, of one head or of all whose mean is asked for.
struct WeightsIndex {
  int64_t b, begin, end, m_block;  // heads [begin, end)

  static int64_t items(const WeightParams& p) {
    return p.batch * (p.average ? 1 : p.heads) * ((p.seqlen_q + kBlockM - 1) / kBlockM);
  }
  WeightsIndex(const WeightParams& p, int64_t item) {
    const int64_t blocks = (p.seqlen_q + kBlockM - 1) / kBlockM, heads = p.average ? 1 : p.heads;
    m_block = item % blocks;
    b = item / blocks / heads;
    begin = item / blocks % heads;
    end = p.average ? p.heads : begin + 1;
  }
};

template <typename M>
struct WeightBuffers {
  using T = typename M::T;
  ForwardBuffers<M> tile;
  T *sums, *rows;  // [columns][lanes] as tiles lie, the mean over heads; [rows][kWrite] once it is

  static constexpr int64_t kWrite = 256;
  WeightBuffers(const WeightParams& p, Arena& a)
      : tile(p, a), sums(a.take<T>(kBlockM * p.columns)), rows(a.take<T>(kBlockM * kWrite)) {}
};

// softmax1's zero takes part as a last column.
template <typename M>
static void add_zero_column(const WeightParams& p, const QueryBlock& q, typename M::T share,
                            typename M::T* sums) {
  using T = typename M::T;
  if (p.activation != Activation::kSoftmax1) return;
  const int64_t j = p.columns - 1;
  for (int64_t i = 0; i < q.rows; ++i) {
    const bool kept =
        p.dropout_p == 0 || dropout_keeps(p.seed, dropout_threshold(p.dropout_p), q.b, q.h, q.i0 + i, j);
    if (kept) sums[j * q.lanes + i] += T(exp(-lse_at(p, p.lse, q)[i])) * T(1 / (1 - p.dropout_p)) * share;
  }
}

// w.sums to rows of the result, in runs of columns that stay in cache.
template <typename M>
static void write_weights(const WeightParams& p, const WeightsIndex& at, int64_t lanes, WeightBuffers<M>& w) {
  const int64_t i0 = at.m_block * kBlockM, rows = min64(kBlockM, p.seqlen_q - i0);
  for (int64_t j = 0; j < p.columns; j += w.kWrite) {
    const int64_t n = min64(w.kWrite, p.columns - j);
    transpose(w.sums + j * lanes, lanes, w.rows, n, n, rows);
    for (int64_t i = 0; i < rows; ++i)
      write_row(row_at(p.weights, at.b, at.begin, i0 + i) + j * size_of(p.weights.dtype), p.weights.dtype, 1,
                w.rows + i * n, n);
  }
}

// Adds one head's weights of a query block to w.sums, times `share`.
template <typename M>
static void add_weights(const WeightParams& p, const QueryBlock& q, typename M::T share,
                        WeightBuffers<M>& w) {
  using T = typename M::T;
  const T unit = T(logit_unit(p));
  WeightOf<T> weight_of(p);
  T lse[kBlockM], low[kBlockM], by[kBlockM];
  const Matrix<T> rows = block_rows<T>(p.q, q, p.head_dim, p.head_dim, w.tile.block);
  const typename M::B queries = M::pack_columns(rows.p, rows.ld, q.rows, q.lanes, p.head_dim, w.tile.queries);
  const bool rescales = is_softmax(p) && sum_again<M>(p, q, queries, w.tile, weight_of, lse, low, by);
  if (!rescales) {
    for (int64_t i = 0; i < q.lanes; ++i) lse[i] = kInf<T>, low[i] = T(0);
    if (is_softmax(p))
      for (int64_t i = 0; i < q.rows; ++i) weight_of.split(lse_at(p, p.lse, q)[i], lse[i], low[i]);
  }
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
    if (rescales) scale_lanes(S, t.n, q.lanes, by);
    if (p.dropout_p > 0) {
      dropout_tile<T>(p, q, t, w.tile.Z);
      multiply_tile(S, w.tile.Z, t.n * q.lanes);
    }
    T* sums = w.sums + t.j0 * q.lanes;
    for (int64_t x = 0; x < t.n * q.lanes; x += kLanes<T>)
      store(sums + x, load(sums + x) + load(S + x) * share);
  };
  KeyTiles tiles(p, q, {0, INT64_MAX});
  KeyTile t;
  while (tiles.next(t)) one_tile(t);
  if (p.extra_k) one_tile({q.seq.seqlen_k, 1, true, true, nullptr});
  add_zero_column<M>(p, q, share, w.sums);
}

template <typename M>
static void weights_item(const WeightParams& p, int64_t item, char* scratch, char*) {
  using T = typename M::T;
  const WeightsIndex at(p, item);
  const typename M::Scope scope;
  Arena arena{scratch};
  WeightBuffers<M> w(p, arena);
  memset(w.sums, 0, size_t(kBlockM * p.columns) * sizeof(T));
  int64_t lanes = 0;
  for (int64_t h = at.begin; h < at.end; ++h) {
    const QueryBlock q = query_block<M::kPad>(p, at.b, h, at.m_block);
    lanes = q.lanes;
    add_weights<M>(p, q, T(1) / T(at.end - at.begin), w);
  }
  write_weights<M>(p, at, lanes, w);
}

template <typename M>
static Plan<WeightParams> weights_plan(const WeightParams& p) {
  Plan<WeightParams> plan;
  Arena arena{nullptr};
  const WeightBuffers<M> sizes(p, arena);
  plan.scratch_bytes = arena.used;
  plan.add(WeightsIndex::items(p), &weights_item<M>);
  return plan;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
