// The tiled body, forward: flash attention over key tiles (Dao, arXiv 2307.08691) with queries in the lanes.
#pragma once
#include "kernels.h"
#include "parts.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// Products may write whole register tiles of rows: results that they add into are padded to this many.
constexpr int64_t kRowPad = 16;

// Running softmax of a query block: m in units of S, l = sum of 2^((S - m) factor), O[d][i] unnormalised.
template <typename T>
struct State {
  T *m, *l, *O;
};

template <typename M>
struct ForwardBuffers {
  using T = typename M::T;
  using E = typename M::Element;
  T *S, *block, *alpha, *bias, *Z;
  E *queries, *keys, *values, *columns, *weights;
  State<T> state;
  bool* dead;

  ForwardBuffers(const Params& p, Arena& a) {
    const int64_t D = p.head_dim, Dv = p.head_dim_v, pad = M::kPad;
    S = a.take<T>(kBlockN * kBlockM);
    block =
        a.take<T>(kBlockM * (round_up(D, pad) > round_up(Dv, pad) ? round_up(D, pad) : round_up(Dv, pad)));
    alpha = a.take<T>(kBlockM);
    bias = a.take<T>(p.bias ? kBlockN * (kBlockM + kLanes<T>) : 0);
    Z = a.take<T>(p.dropout_p > 0 ? kBlockN * kBlockM : 0);
    queries = a.take<E>(M::packed_size(D, kBlockM));
    keys = a.take<E>(M::rows_size(kBlockN, D));
    values = a.take<E>(M::rows_size(kBlockN, Dv));
    columns = a.take<E>(M::columns_size(kBlockN, Dv));
    weights = a.take<E>(M::kSharesTile ? 0 : M::packed_size(kBlockN, kBlockM));
    state = {a.take<T>(kBlockM), a.take<T>(kBlockM), a.take<T>(round_up(Dv, kRowPad) * kBlockM)};
    dead = a.take<bool>(kBlockN);
  }
};

// S becomes the weights, m and l move on; alpha is what older sums are to be multiplied by. Returns whether
// any alpha differs from 1.
template <typename T>
static bool softmax_tile(const QueryBlock& q, const KeyTile& t, T* S, T* m, T* l, T* alpha, T factor) {
  const int64_t lanes = q.lanes;
  bool moved = false;
  for (int64_t i = 0; i < lanes; i += kLanes<T>) {
    const Interval keys = lane_keys<T>(q, t, i);
    clear_outside(keys, t.n, lanes, S + i);
    T* s = S + keys.begin * lanes + i;
    const int64_t n = keys.end - keys.begin;
    const Vec<T> old = load(m + i);
    Vec<T> top[4] = {old, old, old, old};
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) top[u] = vmax<T>(load(s + (j + u) * lanes), top[u]);
    for (; j < n; ++j) top[0] = vmax<T>(load(s + j * lanes), top[0]);
    const Vec<T> now = vmax<T>(vmax<T>(top[0], top[1]), vmax<T>(top[2], top[3]));
    // A row that has met no key has m = -inf; -inf - -inf would be NaN, so it gets a finite pivot.
    // The difference comes first: logits near the end of the range must not overflow in a product.
    const Vec<T> pivot = now == -kInf<T> ? Vec<T>{} : now;
    Vec<T> sum[4] = {};
    for (j = 0; j + 4 <= n; j += 4)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const Vec<T> w = exp2v<T>((load(s + (j + u) * lanes) - pivot) * factor);
        store(s + (j + u) * lanes, w);
        sum[u] += w;
      }
    for (; j < n; ++j) {
      const Vec<T> w = exp2v<T>((load(s + j * lanes) - pivot) * factor);
      store(s + j * lanes, w);
      sum[0] += w;
    }
    const Vec<T> a = exp2v<T>((old - pivot) * factor);
    store(alpha + i, a);
    store(m + i, now);
    store(l + i, load(l + i) * a + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    for (int lane = 0; lane < kLanes<T>; ++lane) moved |= a[lane] != T(1);
  }
  return moved;
}

// relu and sigmoid weigh each pair by itself; a masked pair (-inf) weighs exactly 0.
template <typename T>
SACCADE_FORCE Vec<T> activate(Activation a, Vec<T> logit) {
  if (a == Activation::kReLU) return logit <= T(0) ? Vec<T>{} : logit;
  return logit == -kInf<T> ? Vec<T>{} : sigmoidv<T>(logit);
}
template <typename T>
static void activate_tile(Activation a, T* S, int64_t count, T unit) {
  for (int64_t x = 0; x < count; x += kLanes<T>) store(S + x, activate<T>(a, load(S + x) * unit));
}

SACCADE_FORCE bool is_softmax(const Params& p) {
  return p.activation == Activation::kSoftmax || p.activation == Activation::kSoftmax1;
}
SACCADE_FORCE bool has_sink(const Params& p) { return p.sink || p.activation == Activation::kSoftmax1; }
template <typename T>
SACCADE_FORCE T sink_of(const Params& p, int64_t h) {
  return p.sink ? static_cast<const T*>(p.sink)[h] : T(0);
}

template <typename L>
SACCADE_FORCE L* lse_at(const Params& p, L* lse, const QueryBlock& q) {
  return lse + q.b * p.lse_batch + q.h * p.lse_head + q.seq.q_begin + q.i0;
}

// exp(logit - lse) = 2^(((S a - high) - low) b): in base 2 where the factor was folded into the exponent, in
// natural units elsewhere, where logits may lie near the end of the range. lse comes as the sum of two
// numbers: one T would round by eps |lse|, which every weight of the row would inherit, and near -1e9, where
// people put what they mean to mask, would lose the sum altogether.
template <typename T>
struct WeightOf {
  T a, b;
  double base;
  explicit WeightOf(const Params& p) : WeightOf(bare_logits(p), exponent_factor<T>(p)) {}
  WeightOf(bool bare, T factor)
      : a(bare ? factor : T(1)), b(bare ? T(1) : T(kLog2e)), base(bare ? kLog2e : 1) {}
  // high is +inf for a row without keys, so that its weights come out 0.
  SACCADE_MEMBER void split(double lse, T& high, T& low) const {
    high = lse == -kInf<double> ? kInf<T> : T(lse * base);
    low = lse - lse == 0 ? T(lse * base - double(high)) : T(0);
  }
  SACCADE_MEMBER Vec<T> operator()(Vec<T> S, Vec<T> high, Vec<T> low) const {
    return exp2v<T>(((S * a - high) - low) * b);
  }
};

// Far from 0 a double has no digits left for the ln of a sum, and weights taken from lse would no longer add
// up to one. Then every row of the block gets its largest logit m and its sum again, from all its keys: high
// and low such that weight_of gives 2^((S - m) factor), and `by`, 1 / sum. Returns whether it did.
template <typename M, typename P, typename Buffers, typename T>
static bool sum_again(const P& p, const QueryBlock& q, typename M::B queries, Buffers& w,
                      WeightOf<T>& weight_of, T* high, T* low, T* by) {
  const double* lse = lse_at(p, static_cast<const double*>(p.lse), q);
  // Rows of nothing but finfo.min stand at -kLargest, and are common.
  const double far = sizeof(T) == sizeof(double) ? 1e5 : kLargest;
  bool any = false;
  for (int64_t i = 0; i < q.rows; ++i) any |= lse[i] - lse[i] == 0 && (lse[i] > far || lse[i] < -far);
  if (!any) return false;
  const T factor = exponent_factor<T>(p);
  T sum[kBlockM], alpha[kBlockM];
  for (int64_t i = 0; i < q.lanes; ++i) high[i] = -kInf<T>, low[i] = sum[i] = T(0);
  const auto one_tile = [&](const KeyTile& t) {
    const typename M::A keys =
        t.extra ? M::row(static_cast<const char*>(p.extra_k) + q.h * p.head_dim * size_of(p.k.dtype),
                         p.k.dtype, p.head_dim, w.keys)
                : M::rows(p, p.k, q.seq, q.b, q.hk, t.j0, t.n, p.head_dim, nullptr, w.keys);
    tile_logits<M>(p, q, t, tile_parts<M>(p, q, t), keys, queries, w.S, nullptr, w.bias, w.dead);
    softmax_tile(q, t, w.S, high, sum, alpha, factor);
  };
  KeyTiles tiles(p, q, {0, INT64_MAX});
  KeyTile t;
  while (tiles.next(t)) one_tile(t);
  if (p.extra_k) one_tile({q.seq.seqlen_k, 1, true, true, nullptr});
  const double unit = double(factor) * kLn2;  // natural logit = S * unit
  for (int64_t i = 0; i < q.lanes; ++i) {
    if (i >= q.rows || high[i] == -kInf<T>) {
      high[i] = kInf<T>, by[i] = T(1);
      continue;
    }
    const double sink = has_sink(p) ? exp(double(sink_of<T>(p, q.h)) - double(high[i]) * unit) : 0;
    by[i] = T(1 / (double(sum[i]) + sink));
  }
  weight_of.a = T(1), weight_of.b = factor;
  return true;
}

// Scales O[d][i] by x[i].
template <typename T>
static void scale_lanes(T* O, int64_t d, int64_t lanes, const T* x) {
  for (int64_t c = 0; c < d; ++c)
    for (int64_t i = 0; i < lanes; i += kLanes<T>)
      store(O + c * lanes + i, load(O + c * lanes + i) * load(x + i));
}

// O[d][i] to rows of a tensor.
template <typename T>
static void store_transposed(const Rows& x, const QueryBlock& q, const T* O, int64_t d, T* buffer) {
  char* base = row_at(x, q.b, q.h, q.seq.q_begin + q.i0);
  if (x.dtype == AccumulatorOf<T>::value && x.col == 1) {
    transpose(O, q.lanes, reinterpret_cast<T*>(base), x.row, d, q.rows);
    return;
  }
  transpose(O, q.lanes, buffer, d, d, q.rows);
  for (int64_t i = 0; i < q.rows; ++i)
    write_row(base + i * x.row * size_of(x.dtype), x.dtype, x.col, buffer + i * d, d);
}

// Adds the sink and writes lse; scales[i] is what O of row i is to be multiplied by, for `count` rows or
// lanes.
template <typename T>
static void finish_sums(const Params& p, const QueryBlock& q, int64_t count, const State<T>& s, T* scales) {
  // Natural logit = S * unit, with the factor as it was used.
  const double unit = bare_logits(p) ? double(exponent_factor<T>(p)) * kLn2 : 1;
  double* lse = lse_at(p, p.lse, q);
  double tops[kBlockM], sums[kBlockM], logs[kBlockM];
  for (int64_t i = 0; i < count; ++i) {
    double top = s.m[i] == -kInf<T> ? -kInf<double> : double(s.m[i]) * unit, sum = double(s.l[i]), mine = 1;
    if (has_sink(p)) {
      const double sink = double(sink_of<T>(p, q.h)), pivot = top > sink ? top : sink;
      mine = pivot == -kInf<double> ? 0 : exp(top - pivot);
      sum = sum * mine + (pivot == -kInf<double> ? 0 : exp(sink - pivot));
      top = pivot;
    }
    scales[i] = sum == 0 ? T(0) : T(mine / sum);
    tops[i] = sum == 0 ? -kInf<double> : top;
    sums[i] = sum == 0 ? 1 : sum;
  }
  log_each<T>(sums, logs, q.rows);
  for (int64_t i = 0; i < q.rows; ++i) lse[i] = tops[i] + logs[i];
}

// Normalises, writes out and lse.
template <typename T>
static void finish_block(const Params& p, const QueryBlock& q, const State<T>& s, T* alpha, T* buffer) {
  if (is_softmax(p)) {
    finish_sums(p, q, q.lanes, s, alpha);
    scale_lanes(s.O, p.head_dim_v, q.lanes, alpha);
  }
  store_transposed(p.out, q, s.O, p.head_dim_v, buffer);
}

template <typename M>
static void forward_tile(const Params& p, const QueryBlock& q, const KeyTile& t, typename M::B queries,
                         ForwardBuffers<M>& w) {
  using T = typename M::T;
  const int64_t D = p.head_dim, Dv = p.head_dim_v;
  const int64_t e = size_of(p.k.dtype);
  const typename M::A keys =
      t.extra ? M::row(static_cast<const char*>(p.extra_k) + q.h * D * e, p.k.dtype, D, w.keys)
              : M::rows(p, p.k, q.seq, q.b, q.hk, t.j0, t.n, D, nullptr, w.keys);
  const TileParts parts = tile_parts<M>(p, q, t);
  const bool some_dead = tile_logits<M>(p, q, t, parts, keys, queries, w.S, nullptr, w.bias, w.dead);
  const T factor = exponent_factor<T>(p);
  if (is_softmax(p)) {
    if (softmax_tile(q, t, w.S, w.state.m, w.state.l, w.alpha, factor))
      scale_lanes(w.state.O, Dv, q.lanes, w.alpha);
  } else {
    activate_tile(p.activation, w.S, t.n * q.lanes, T(logit_unit(p)));
  }
  if (p.dropout_p > 0) {
    dropout_tile<T>(p, q, t, w.Z);
    multiply_tile(w.S, w.Z, t.n * q.lanes);
  }
  const typename M::A values =
      t.extra ? M::row(static_cast<const char*>(p.extra_v) + q.h * Dv * e, p.v.dtype, Dv, w.values)
              : M::rows(p, p.v, q.seq, q.b, q.hk, t.j0, t.n, Dv, some_dead ? w.dead : nullptr, w.values);
  add_columns<M>(q, parts, Dv, values, w.S, w.state.O, w.columns, w.weights);
}

// Clears the state of a query block and hands f its key tiles inside `within`, the extra key last.
template <typename M, typename F>
static void forward_tiles(const Params& p, const QueryBlock& q, Interval within, bool with_extra,
                          ForwardBuffers<M>& w, F f) {
  using T = typename M::T;
  for (int64_t i = 0; i < q.lanes; ++i) w.state.m[i] = -kInf<T>, w.state.l[i] = T(0);
  memset(w.state.O, 0, size_t(p.head_dim_v * q.lanes) * sizeof(T));
  const Matrix<T> rows = block_rows<T>(p.q, q, p.head_dim, p.head_dim, w.block);
  const typename M::B queries = M::pack_columns(rows.p, rows.ld, q.rows, q.lanes, p.head_dim, w.queries);
  KeyTiles tiles(p, q, within);
  KeyTile t;
  while (tiles.next(t)) f(t, queries);
  if (p.extra_k && with_extra) f({q.seq.seqlen_k, 1, true, true, nullptr}, queries);
}

// With few query blocks the keys are split too; the parts are merged in order.
static int64_t forward_splits(const Params& p) {
  const int64_t blocks = p.batch * p.heads * ((p.seqlen_q + kBlockM - 1) / kBlockM), wanted = 16;
  if (blocks == 0 || blocks >= wanted) return 1;
  return max64(1, min64(wanted / blocks, p.seqlen_k / 1024));
}
static Interval split_keys(const Params& p, int64_t split, int64_t splits) {
  const int64_t size = round_up((p.seqlen_k + splits - 1) / splits, kBlockN);
  return {split * size, split + 1 == splits ? INT64_MAX : (split + 1) * size};
}
static int64_t partial_size(const Params& p) { return kBlockM * (round_up(p.head_dim_v, kRowPad) + 2); }
template <typename T>
static State<T> partial_state(const Params& p, int64_t index, char* workspace) {
  T* at = reinterpret_cast<T*>(workspace) + index * partial_size(p);
  return {at, at + kBlockM, at + 2 * kBlockM};
}

struct BlockIndex {
  int64_t b, h, m_block;
};
// Heads outermost, so that a head's keys stay in cache; within it the last block, the longest of a causal
// mask, first.
static BlockIndex block_index(const Params& p, int64_t item) {
  const int64_t blocks = (p.seqlen_q + kBlockM - 1) / kBlockM;
  const int64_t bh = item / blocks;
  return {bh / p.heads, bh % p.heads, blocks - 1 - item % blocks};
}

template <typename M>
static void forward_item(const Params& p, int64_t item, char* scratch, char* workspace) {
  using T = typename M::T;
  const int64_t splits = forward_splits(p), split = item % splits;
  const BlockIndex at = block_index(p, item / splits);
  const QueryBlock q = query_block<M::kPad>(p, at.b, at.h, at.m_block);
  if (q.rows == 0) return;
  const typename M::Scope scope;
  Arena arena{scratch};
  ForwardBuffers<M> w(p, arena);
  if (splits > 1) w.state = partial_state<T>(p, item, workspace);
  const auto one_tile = [&](const KeyTile& t, typename M::B queries) {
    forward_tile<M>(p, q, t, queries, w);
  };
  forward_tiles<M>(p, q, split_keys(p, split, splits), split + 1 == splits, w, one_tile);
  if (splits == 1) finish_block<T>(p, q, w.state, w.alpha, w.block);
}

// Joins the parts of one query block, in the order of their keys.
template <typename M>
static void merge_item(const Params& p, int64_t item, char* scratch, char* workspace) {
  using T = typename M::T;
  const int64_t splits = forward_splits(p);
  const BlockIndex at = block_index(p, item);
  const QueryBlock q = query_block<M::kPad>(p, at.b, at.h, at.m_block);
  if (q.rows == 0) return;
  Arena arena{scratch};
  ForwardBuffers<M> w(p, arena);
  State<T> sum = partial_state<T>(p, item * splits, workspace);
  const T factor = exponent_factor<T>(p);
  for (int64_t s = 1; s < splits; ++s) {
    const State<T> part = partial_state<T>(p, item * splits + s, workspace);
    for (int64_t i = 0; i < q.lanes; i += kLanes<T>) {
      Vec<T> mine = splat<T>(T(1)), its = mine;
      if (is_softmax(p)) {
        const Vec<T> a = load(sum.m + i), b = load(part.m + i), top = vmax<T>(a, b);
        const Vec<T> pivot = top == -kInf<T> ? Vec<T>{} : top;
        mine = exp2v<T>((a - pivot) * factor);
        its = exp2v<T>((b - pivot) * factor);
        store(sum.m + i, top);
        store(sum.l + i, load(sum.l + i) * mine + load(part.l + i) * its);
      }
      for (int64_t d = 0; d < p.head_dim_v; ++d) {
        T* o = sum.O + d * q.lanes + i;
        store(o, load(o) * mine + load(part.O + d * q.lanes + i) * its);
      }
    }
  }
  finish_block<T>(p, q, sum, w.alpha, w.block);
}

template <typename M>
static Plan<Params> forward_plan(const Params& p) {
  using T = typename M::T;
  Plan<Params> plan;
  Arena arena{nullptr};
  ForwardBuffers<M> sizes(p, arena);
  plan.scratch_bytes = arena.used;
  const int64_t blocks = p.batch * p.heads * ((p.seqlen_q + kBlockM - 1) / kBlockM),
                splits = forward_splits(p);
  plan.add(blocks * splits, &forward_item<M>);
  if (splits > 1) {
    plan.workspace_bytes = size_t(blocks * splits * partial_size(p)) * sizeof(T);
    plan.add(blocks, &merge_item<M>);
  }
  return plan;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
