// The gradient of a bias of any broadcast shape, where the main pass cannot take it along. Each item owns
// elements of dbias and sums what all pairs that read them contribute, so neither a copy per head nor atomics
// are needed; the tiles of logits are formed once more for it.
#pragma once
#include "tiled_backward.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

struct BiasItems {
  int64_t row_blocks,
      key_blocks;  // 1 where the bias does not depend on the query, or where one item walks all keys
  explicit BiasItems(const GradParams& p)
      : row_blocks(p.dbias_size[2] > 1 ? (p.seqlen_q + kBlockM - 1) / kBlockM : 1),
        key_blocks(p.dbias_size[2] > 1 || p.dbias_size[3] == 1 ? 1 : (p.seqlen_k + kBlockN - 1) / kBlockN) {}
  int64_t count(const GradParams& p) const {
    return p.dbias_size[0] * p.dbias_size[1] * row_blocks * key_blocks;
  }
};

// What a bias that is broadcast over queries or keys sums is long: those few sums are kept in double.
constexpr int64_t kBiasSums = kBlockN;
static_assert(kBlockM <= kBiasSums, "one sum per query of a block, or per key of a tile");

// Adds a tile's gradients up by query, or by key from `first` on.
template <typename T>
static void sum_bias_tile(const GradParams& p, const QueryBlock& q, const KeyTile& t, const T* dS,
                          double* sums, int64_t first) {
  const bool by_row = p.dbias_size[2] > 1, by_key = p.dbias_size[3] > 1;
  for (int64_t j = 0; j < t.n; ++j)
    for (int64_t i = 0; i < q.rows; ++i)
      sums[by_row ? i : by_key ? t.j0 + j - first : 0] += dS[j * q.lanes + i];
}

template <typename M>
static void bias_item(const GradParams& p, int64_t item, char* scratch, char*) {
  using T = typename M::T;
  const BiasItems items(p);
  const int64_t key_block = item % items.key_blocks, row_block = item / items.key_blocks % items.row_blocks;
  const int64_t bh = item / items.key_blocks / items.row_blocks, h0 = bh % p.dbias_size[1],
                b0 = bh / p.dbias_size[1];
  const int64_t rows = p.dbias_size[2], keys = p.dbias_size[3];
  const bool all_rows = rows == 1;
  const typename M::Scope scope;
  Arena arena{scratch};
  BackwardBuffers<M> w(p, arena);
  T* out = static_cast<T*>(p.dbias) +
           ((b0 * p.dbias_size[1] + h0) * rows + (all_rows ? 0 : row_block * kBlockM)) * keys;
  const int64_t first = items.key_blocks > 1 ? key_block * kBlockN : 0;
  const int64_t held = items.key_blocks > 1 ? min64(kBlockN, keys - first) : keys;
  const int64_t own_rows = all_rows ? 1 : min64(kBlockM, rows - row_block * kBlockM);
  const bool summed = rows == 1 || keys == 1;
  double sums[kBiasSums] = {};
  const Interval within = items.key_blocks > 1 ? Interval{first, first + held} : Interval{0, INT64_MAX};

  const int64_t b_end = p.dbias_size[0] > 1 ? b0 + 1 : p.batch,
                h_end = p.dbias_size[1] > 1 ? h0 + 1 : p.heads;
  for (int64_t b = b0; b < b_end; ++b)
    for (int64_t h = h0; h < h_end; ++h)
      for (int64_t m = row_block; m * kBlockM < p.seqlen_q; m += all_rows ? 1 : p.seqlen_q) {
        const QueryBlock q = query_block<M::kPad>(p, b, h, m);
        KeyTiles tiles(p, q, within);
        KeyTile t;
        BiasRows<T> dbias(p, q, {0, keys}, b == b0 && h == h0);
        if (tiles.limit.begin < tiles.limit.end) {
          const BackwardBlock<M> block(p, q, w);
          while (tiles.next(t)) {
            gradient_tile<M>(p, q, t, block, w);
            if (summed)
              sum_bias_tile<T>(p, q, t, w.dP, sums, first);
            else
              dbias.add(q, t, w.dP, w.S);
          }
        }
        if (!summed) dbias.finish();
      }
  if (!summed && p.batch == 0) memset(out, 0, size_t(own_rows * keys) * sizeof(T));
  if (summed)
    for (int64_t x = 0; x < (all_rows ? held : own_rows); ++x) out[(all_rows ? first : 0) + x] = T(sums[x]);
}

// The ends of the rows of a relative bias by query, of one query block.
template <typename M>
static void reduce_relative(const GradParams& p, int64_t item, char*, char* workspace) {
  using T = typename M::T;
  const BlockIndex at = block_index(p, item);
  Arena shared{workspace};
  const Parts<T> parts(p, shared);
  sum_ends<T>(p, query_block<M::kPad>(p, at.b, at.h, at.m_block), parts.rel, key_runs(p));
}

template <typename M>
static Plan<GradParams> backward_plan(const GradParams& p) {
  using T = typename M::T;
  Plan<GradParams> plan;
  Arena scratch{nullptr}, shared{nullptr};
  const BackwardBuffers<M> w(p, scratch);
  const Parts<T> parts(p, shared);
  const int64_t held = min64(run_size(p), p.seqlen_k) + kRowPad;
  scratch.take<T>(held * w.ld);
  scratch.take<T>(held * w.ldv);
  scratch.take<T>(kRowPad * w.ld);
  scratch.take<T>(kRowPad * w.ldv);
  plan.scratch_bytes = scratch.used;
  plan.workspace_bytes = shared.used;
  const int64_t blocks = p.batch * p.heads * ((p.seqlen_q + kBlockM - 1) / kBlockM);
  const bool by_query = (p.needs & kNeedRelBias) && is_by_query(p);
  if (p.needs & ~int64_t(kNeedBias)) {
    if (by_query) plan.add(relative_items(p), &clear_relative<T>);
    plan.add(p.batch / item_batch(p) * p.heads_k * key_runs(p), &backward_item<M>);
    if ((p.needs & kNeedQ) && key_runs(p) > 1) plan.add(blocks, &reduce_queries<M>);
    if (by_query) plan.add(blocks, &reduce_relative<M>);
    if (p.needs & (kNeedRelBias | kNeedWeight | kNeedExtraK | kNeedExtraV))
      plan.add(p.heads, &reduce_heads<M>);
  }
  if ((p.needs & kNeedBias) && !bias_with_keys(p)) plan.add(BiasItems(p).count(p), &bias_item<M>);
  return plan;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
