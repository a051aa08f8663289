// The tiled body, backward, in one pass over the pairs: five products per tile. A work item owns a run of
// keys of one key head and meets every query block in order, so dK and dV need no partner; dQ is the ordered
// sum of one part per run of keys.
#pragma once
#include "tile_gradients.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// How many runs the keys of each of so many heads are cut into: enough items for many cores, by shape alone.
static int64_t runs_of(int64_t heads, int64_t seqlen_k) {
  const int64_t wanted = 16;
  if (heads == 0 || heads >= wanted) return 1;
  return max64(1, min64(min64((wanted + heads - 1) / heads, 8), seqlen_k / 256));
}

// Whether items that own a run of keys can own what belongs to them of dbias too: it depends on head, query
// and key. An item walks all sequences then where the bias is the same for them; with few heads that would
// leave too few items.
static bool bias_with_keys(const GradParams& p) {
  const int64_t* size = p.dbias_size;
  if (!(p.needs & kNeedBias) || !(p.needs & ~int64_t(kNeedBias)) || p.batch == 0) return false;
  if (size[1] != p.heads || size[2] == 1 || size[3] == 1) return false;
  return size[0] == p.batch || p.heads_k * runs_of(p.heads_k, p.seqlen_k) >= 8;
}
// Sequences per item.
static int64_t item_batch(const GradParams& p) {
  return bias_with_keys(p) && p.dbias_size[0] == 1 ? p.batch : 1;
}
static int64_t key_runs(const GradParams& p) {
  return runs_of(p.batch / item_batch(p) * p.heads_k, p.seqlen_k);
}
static int64_t run_size(const GradParams& p) {
  const int64_t runs = key_runs(p);
  return max64(kBlockN, round_up((p.seqlen_k + runs - 1) / runs, kBlockN));
}
SACCADE_FORCE Interval key_run(const GradParams& p, int64_t run) {
  return {run * run_size(p), (run + 1) * run_size(p)};
}
SACCADE_FORCE bool meets(const QueryBlock& q, Interval run) {
  return max64(q.keys.begin, run.begin) < min64(q.keys.end, run.end);
}

// Where the parts of gradients that several items contribute to lie in the workspace: [part][element], summed
// in order.
template <typename T>
struct Parts {
  T *dQ, *extra_k, *extra_v;
  double *rel, *weight;  // long sums; rel by distance or, by query, the ends of rows
  int64_t rows;          // query rows over all sequences and heads

  Parts(const GradParams& p, Arena& a) {
    const int64_t runs = key_runs(p), parts = p.batch * runs;
    rows = p.batch * p.heads * round_up(p.seqlen_q, kBlockM);
    dQ = a.take<T>((p.needs & kNeedQ) && runs > 1 ? runs * rows * p.head_dim : 0);
    rel = a.take<double>(p.needs & kNeedRelBias ? relative_parts(p, runs) : 0);
    weight = a.take<double>(p.weight ? parts * p.heads * p.head_dim : 0);
    extra_k = a.take<T>(p.extra_k ? p.batch * p.heads * round_up(p.head_dim, 16) : 0);
    extra_v = a.take<T>(p.extra_k ? p.batch * p.heads * round_up(p.head_dim_v, 16) : 0);
  }
  // O[d][i] of a query block in one part.
  T* block(const GradParams& p, const QueryBlock& q, int64_t run) const {
    const int64_t blocks = (p.seqlen_q + kBlockM - 1) / kBlockM;
    return dQ + run * rows * p.head_dim +
           ((q.b * p.heads + q.h) * blocks + q.i0 / kBlockM) * kBlockM * p.head_dim;
  }
};

// A narrow block sums dQ as [row][d] with the lanes along d, any other as [d][lane].
template <typename T>
SACCADE_FORCE bool queries_by_rows(const Params& p, const QueryBlock& q) {
  return q.rows <= kNarrow && p.score == Score::kDot && p.head_dim % kLanes<T> == 0 && p.k.col == 1;
}
// dQ is dS K: dS is 0 in a row that keeps no key, but 0 times a NaN that other rows of the block see in a key
// is not. Such a row's output is exactly 0. Row i, column d of dQ stands at i * row + d * col.
template <typename M>
static void clear_empty_queries(const GradParams& p, const QueryBlock& q, int64_t row, int64_t col,
                                BackwardBuffers<M>& w) {
  using T = typename M::T;
  const int64_t count = p.head_dim * (col == 1 ? q.rows : q.lanes);  // whole vectors
  Vec<T> bad{};
  for (int64_t x = 0; x < count; x += kLanes<T>) bad += load(w.dQ + x) - load(w.dQ + x);
  if (!any_lane(bad != T(0))) return;
  const Matrix<T> outs = block_rows<T>(p.out, q, p.head_dim_v, w.ldv, w.block_do);
  for (int64_t i = 0; i < q.rows; ++i) {
    bool empty = true;
    for (int64_t d = 0; d < p.head_dim_v; ++d) empty &= outs.p[i * outs.ld + d] == T(0);
    for (int64_t d = 0; d < p.head_dim && empty; ++d) w.dQ[i * row + d * col] = T(0);
  }
}
template <typename M>
static void store_queries(const GradParams& p, const QueryBlock& q, BackwardBuffers<M>& w) {
  using T = typename M::T;
  const bool by_rows = M::kSharesTile && queries_by_rows<T>(p, q);
  clear_empty_queries(p, q, by_rows ? p.head_dim : 1, by_rows ? 1 : q.lanes, w);
  if (!by_rows) return store_transposed(p.dq, q, w.dQ, p.head_dim, w.block_o);
  for (int64_t i = 0; i < q.rows; ++i)
    write_row(row_at(p.dq, q.b, q.h, q.seq.q_begin + q.i0 + i), p.dq.dtype, p.dq.col, w.dQ + i * p.head_dim,
              p.head_dim);
}

template <typename T>
struct KeySums {
  T *dK, *dV;
  int64_t ld, ldv;
};

// One head's rows of dbias inside a run of keys. The first sequence to come writes them, from left to right,
// zeros where it has no tile; the others add.
template <typename T>
struct BiasRows {
  T* out;  // row 0 of the block, key 0; null where nobody wants it
  int64_t ld, rows;
  Interval keys;
  bool first;

  BiasRows(const GradParams& p, const QueryBlock& q, Interval run, bool begins)
      : out(nullptr), ld(p.dbias_size[3]), rows(q.rows), keys(run), first(begins) {
    const int64_t b = p.dbias_size[0] > 1 ? q.b : 0, h = p.dbias_size[1] > 1 ? q.h : 0;
    out = static_cast<T*>(p.dbias) + ((b * p.dbias_size[1] + h) * p.dbias_size[2] + q.i0) * ld;
  }
  void add(const QueryBlock& q, const KeyTile& t, const T* dS, T* buffer) {
    if (first) {
      clear(t.j0);
      keys.begin = t.j0 + t.n;
    }
    for (int64_t i0 = 0; i0 < rows; i0 += kLanes<T>) {
      const int64_t count = min64(kLanes<T>, rows - i0);
      T* to = out + i0 * ld + t.j0;
      if (first) {
        transpose(dS + i0, q.lanes, to, ld, t.n, count);
        continue;
      }
      transpose(dS + i0, q.lanes, buffer, t.n, t.n, count);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < t.n; ++j) to[i * ld + j] += buffer[i * t.n + j];
    }
  }
  void finish() {
    if (first) clear(keys.end);
  }

 private:
  void clear(int64_t end) {
    if (keys.begin < end)
      for (int64_t i = 0; i < rows; ++i)
        memset(out + i * ld + keys.begin, 0, size_t(end - keys.begin) * sizeof(T));
  }
};

template <typename M>
static void backward_tile(const GradParams& p, const QueryBlock& q, const KeyTile& t,
                          const BackwardBlock<M>& block, BackwardBuffers<M>& w, KeySums<typename M::T> sums,
                          const RelativeShare<typename M::T>& dRel, double* dW,
                          BiasRows<typename M::T>* dbias) {
  using T = typename M::T;
  const int64_t D = p.head_dim;
  const TileOperands<M> o = gradient_tile<M>(p, q, t, block, w);
  add_rows<M>(q, o.parts, sums.ldv, block.dout_rows, w.S, sums.dV, w.weights);
  dRel.add(p, q, t, w.dP);
  if (dbias && !t.extra) dbias->add(q, t, w.dP, w.S);
  score_gradient<M>(p, q, t.n, w);
  if constexpr (M::kSharesTile) {
    if (p.score != Score::kDot) {
      additive_gradient<T>(p, q, t.n, o.keys, block.queries.p, w.dP, w.dQ, sums.dK, sums.ld, dW);
      return;
    }
  }
  if (p.needs & (kNeedK | kNeedExtraK))
    add_rows<M>(q, o.parts, sums.ld, block.query_rows, w.dP, sums.dK, w.weights);
  if (!(p.needs & kNeedQ)) return;
  if constexpr (M::kSharesTile) {
    if (queries_by_rows<T>(p, q)) {
      gemm<true, T>(q.rows, D, t.n, {w.dP, 1, q.lanes}, o.keys.p, o.keys.row, w.dQ, D);
      return;
    }
  }
  add_columns<M>(q, o.parts, D, o.keys, w.dP, w.dQ, w.columns, w.weights);
}

// One sequence's share of a run of keys.
template <typename M>
static void backward_run(const GradParams& p, int64_t b, int64_t hk, int64_t run, char* scratch,
                         char* workspace) {
  using T = typename M::T;
  const int64_t runs = key_runs(p);
  const bool with_bias = bias_with_keys(p), first = p.dbias_size[0] > 1 || b == 0;
  const int64_t group = p.heads / p.heads_k, D = p.head_dim, Dv = p.head_dim_v;
  const Sequence seq = sequence_of(p, b);
  const Interval keys{key_run(p, run).begin, min64(key_run(p, run).end, seq.seqlen_k)};
  const bool last = run + 1 == runs;  // it also takes the extra key
  const typename M::Scope scope;
  Arena arena{scratch}, shared{workspace};
  BackwardBuffers<M> w(p, arena);
  const Parts<T> parts(p, shared);
  const int64_t count = max64(0, keys.end - keys.begin);
  const int64_t held = count + kRowPad;
  const KeySums<T> sums{arena.take<T>(held * w.ld), arena.take<T>(held * w.ldv), w.ld, w.ldv};
  const KeySums<T> extra{arena.take<T>(kRowPad * w.ld), arena.take<T>(kRowPad * w.ldv), w.ld, w.ldv};
  memset(sums.dK, 0, size_t(held * w.ld) * sizeof(T));
  memset(sums.dV, 0, size_t(held * w.ldv) * sizeof(T));
  for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
    RelativeShare<T> dRel(p, parts.rel, b * runs + run, h);
    double* dW = p.weight ? parts.weight + ((b * runs + run) * p.heads + h) * D : nullptr;
    if (dW) memset(dW, 0, size_t(D) * sizeof(double));
    memset(extra.dK, 0, size_t(kRowPad * w.ld) * sizeof(T));
    memset(extra.dV, 0, size_t(kRowPad * w.ldv) * sizeof(T));
    for (int64_t m = 0; m * kBlockM < seq.seqlen_q; ++m) {
      const QueryBlock q = query_block<M::kPad>(p, b, h, m);
      const bool with_extra = p.extra_k && last;
      BiasRows<T> dbias(p, q, keys, first);
      dRel.begin(p, q, parts.rel, run);
      if (!meets(q, keys) && !with_extra && runs > 1) {
        if (with_bias) dbias.finish();
        continue;
      }
      memset(w.dQ, 0, size_t(D * q.lanes) * sizeof(T));
      const BackwardBlock<M> block(p, q, w);
      KeyTiles tiles(p, q, keys);
      KeyTile t;
      while (tiles.next(t)) {
        const int64_t at = t.j0 - keys.begin;
        backward_tile<M>(p, q, t, block, w, {sums.dK + at * w.ld, sums.dV + at * w.ldv, w.ld, w.ldv}, dRel,
                         dW, with_bias ? &dbias : nullptr);
      }
      if (with_bias) dbias.finish();
      if (with_extra)
        backward_tile<M>(p, q, {seq.seqlen_k, 1, true, true, nullptr}, block, w, extra, dRel, dW, nullptr);
      if (!(p.needs & kNeedQ)) continue;
      if (runs == 1)
        store_queries<M>(p, q, w);
      else
        memcpy(parts.block(p, q, run), w.dQ, size_t(D * q.lanes) * sizeof(T));
    }
    if (p.extra_k && last) {
      memcpy(parts.extra_k + (b * p.heads + h) * D, extra.dK, size_t(D) * sizeof(T));
      memcpy(parts.extra_v + (b * p.heads + h) * Dv, extra.dV, size_t(Dv) * sizeof(T));
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    if (p.needs & kNeedK)
      write_row(row_at(p.dk, b, hk, seq.k_begin + keys.begin + j), p.dk.dtype, p.dk.col, sums.dK + j * w.ld,
                D);
    if (p.needs & kNeedV)
      write_row(row_at(p.dv, b, hk, seq.k_begin + keys.begin + j), p.dv.dtype, p.dv.col, sums.dV + j * w.ldv,
                Dv);
  }
}

template <typename M>
static void backward_item(const GradParams& p, int64_t item, char* scratch, char* workspace) {
  const int64_t runs = key_runs(p), run = item % runs, hk = item / runs % p.heads_k, count = item_batch(p);
  const int64_t first = item / runs / p.heads_k * count;
  for (int64_t b = first; b < first + count; ++b) backward_run<M>(p, b, hk, run, scratch, workspace);
}

// dQ of one query block: its parts, added in the order of their keys.
template <typename M>
static void reduce_queries(const GradParams& p, int64_t item, char* scratch, char* workspace) {
  using T = typename M::T;
  const BlockIndex at = block_index(p, item);
  const QueryBlock q = query_block<M::kPad>(p, at.b, at.h, at.m_block);
  if (q.rows == 0) return;
  Arena arena{scratch}, shared{workspace};
  BackwardBuffers<M> w(p, arena);
  const Parts<T> parts(p, shared);
  const int64_t runs = key_runs(p), count = p.head_dim * q.lanes;
  memset(w.dQ, 0, size_t(count) * sizeof(T));
  for (int64_t run = 0; run < runs; ++run) {
    if (!meets(q, {key_run(p, run).begin, min64(key_run(p, run).end, q.seq.seqlen_k)}) &&
        !(p.extra_k && run + 1 == runs))
      continue;
    const T* part = parts.block(p, q, run);
    for (int64_t x = 0; x < count; x += kLanes<T>) store(w.dQ + x, load(w.dQ + x) + load(part + x));
  }
  store_queries<M>(p, q, w);
}

template <typename T, typename Part>
static void sum_parts(const Part* parts, int64_t count, int64_t part_stride, int64_t n, T* out) {
  for (int64_t x = 0; x < n; ++x) {
    double sum = 0;
    for (int64_t c = 0; c < count; ++c) sum += double(parts[c * part_stride + x]);
    out[x] = T(sum);
  }
}

// The gradients of what all sequences of a head share.
template <typename M>
static void reduce_heads(const GradParams& p, int64_t h, char*, char* workspace) {
  using T = typename M::T;
  Arena shared{workspace};
  const Parts<T> parts(p, shared);
  const int64_t count = p.batch * key_runs(p), R = p.rel_size, D = p.head_dim, Dv = p.head_dim_v, H = p.heads;
  if ((p.needs & kNeedRelBias) && !is_by_query(p))
    sum_parts(parts.rel + h * R, count, H * R, R, static_cast<T*>(p.drel_bias) + h * R);
  if (p.needs & kNeedWeight)
    sum_parts(parts.weight + h * D, count, H * D, D, static_cast<T*>(p.dweight) + h * D);
  if (p.needs & kNeedExtraK)
    sum_parts(parts.extra_k + h * D, p.batch, H * D, D, static_cast<T*>(p.dextra_k) + h * D);
  if (p.needs & kNeedExtraV)
    sum_parts(parts.extra_v + h * Dv, p.batch, H * Dv, Dv, static_cast<T*>(p.dextra_v) + h * Dv);
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
