// The decode body: few queries, many keys. Each row of keys and values is read once for all query heads that
// share it; the lanes run along head_dim. The keys are split into runs whose partial results are merged in
// order.
#pragma once
#include "tiled_forward.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

constexpr int64_t kDecodeRun = 2048;  // keys per work item

template <typename T>
struct DecodeBuffers {
  T *S, *queries, *keys, *values, *bias, *alpha, *buffer, *O;
  bool* dead;
  int64_t ldq, ldo;

  DecodeBuffers(const Params& p, Arena& a) {
    ldq = round_up(p.head_dim, kLanes<T>);
    ldo = round_up(p.head_dim_v, kLanes<T>);
    S = a.take<T>(kBlockN * kBlockM);
    queries = a.take<T>(p.heads / p.heads_k * kBlockM * ldq);
    keys = a.take<T>(kBlockN * ldq);
    values = a.take<T>(kBlockN * ldo);
    bias = a.take<T>(p.bias ? 2 * kBlockN * kBlockM : 0);
    alpha = a.take<T>(kBlockM);
    buffer = a.take<T>(kBlockM * (ldq > ldo ? ldq : ldo));
    O = a.take<T>(p.head_dim_v * kBlockM);
    dead = a.take<bool>(kBlockN);
  }
};

// Partial result of one query head over one run of keys: m and l per row, then O[row][ldo].
template <typename T>
static State<T> decode_state(int64_t index, int64_t ldo, char* workspace) {
  T* at = reinterpret_cast<T*>(workspace) + index * kBlockM * (ldo + 2);
  return {at, at + kBlockM, at + 2 * kBlockM};
}
SACCADE_FORCE int64_t decode_runs(const Params& p) {
  return max64(1, (p.seqlen_k + kDecodeRun - 1) / kDecodeRun);
}

// n rows as a T matrix whose rows are whole vectors; in place where that is what memory holds.
template <typename T>
static Matrix<T> padded_rows(const Params& p, const Rows& x, const QueryBlock& q, const KeyTile& t, int64_t d,
                             int64_t ld, const bool* dead, T* buffer) {
  if (x.dtype == AccumulatorOf<T>::value && x.col == 1 && d == ld && !dead && !scattered(p))
    return {reinterpret_cast<const T*>(row_at(x, q.b, q.hk, q.seq.k_begin + t.j0)), x.row};
  for (int64_t j = 0; j < t.n; ++j) {
    T* row = buffer + j * ld;
    for (int64_t c = d; c < ld; ++c) row[c] = T(0);
    if (dead && dead[j])
      memset(row, 0, size_t(d) * sizeof(T));
    else
      read_row(row, cache_row(p, x, q.seq, q.b, q.hk, t.j0 + j), x.dtype, x.col, d);
  }
  return {buffer, ld};
}

template <typename T>
static void decode_item(const Params& p, int64_t item, char* scratch, char* workspace) {
  const int64_t runs = decode_runs(p), run = item % runs, hk = item / runs % p.heads_k,
                b = item / runs / p.heads_k;
  const int64_t group = p.heads / p.heads_k, Dv = p.head_dim_v;
  const T factor = T(exponent_factor(p));
  Arena arena{scratch};
  DecodeBuffers<T> w(p, arena);
  const QueryBlock first = query_block<kLanes<T>>(p, b, hk * group, 0);
  const auto state = [&](int64_t g) {
    return decode_state<T>(((b * p.heads) + hk * group + g) * runs + run, w.ldo, workspace);
  };
  for (int64_t g = 0; g < group; ++g) {
    QueryBlock q = first;
    q.h = hk * group + g;
    const Matrix<T> rows = block_rows<T>(p.q, q, p.head_dim, p.head_dim, w.buffer);
    for (int64_t i = 0; i < q.rows; ++i)
      memcpy(w.queries + (g * kBlockM + i) * w.ldq, rows.p + i * rows.ld, size_t(p.head_dim) * sizeof(T));
    const State<T> s = state(g);
    for (int64_t i = 0; i < q.lanes; ++i) s.m[i] = -kInf<T>, s.l[i] = T(0);
    memset(s.O, 0, size_t(q.rows * w.ldo) * sizeof(T));
  }
  KeyTiles tiles(p, first, {run * kDecodeRun, (run + 1) * kDecodeRun});
  KeyTile t;
  while (tiles.next(t)) {
    const Matrix<T> keys = padded_rows<T>(p, p.k, first, t, p.head_dim, w.ldq, nullptr, w.keys);
    const Matrix<T> values = padded_rows<T>(p, p.v, first, t, Dv, w.ldo, nullptr, w.values);
    for (int64_t g = 0; g < group; ++g) {
      QueryBlock q = first;
      q.h = hk * group + g;
      const State<T> s = state(g);
      dot_scores<T>(t.n, q.rows, q.lanes, p.head_dim, keys.p, keys.ld, w.queries + g * kBlockM * w.ldq, w.ldq,
                    w.S);
      if (!bare_logits(p)) finish_logits<T>(p, q, t, w.S, nullptr, w.bias);
      if (!t.whole) apply_mask<T>(p, q, t, w.S);
      const bool some_dead = may_hold_dead(p, q, t) && find_dead<T>(q, t, w.S, w.dead);
      if (is_softmax(p)) {
        if (softmax_tile(w.S, t.n, q.lanes, s.m, s.l, w.alpha, factor))
          for (int64_t i = 0; i < q.rows; ++i)
            for (int64_t c = 0; c < w.ldo; c += kLanes<T>)
              store(s.O + i * w.ldo + c, load(s.O + i * w.ldo + c) * w.alpha[i]);
      } else {
        activate_tile(p.activation, w.S, t.n * q.lanes, T(exponent_factor(p) * kLn2));
      }
      const Matrix<T> used = some_dead ? padded_rows<T>(p, p.v, q, t, Dv, w.ldo, w.dead, w.values) : values;
      gemm<true, T>(q.rows, w.ldo, t.n, {w.S, 1, q.lanes}, used.p, used.ld, s.O, w.ldo);
      if (some_dead && used.p == values.p) padded_rows<T>(p, p.v, q, t, Dv, w.ldo, nullptr, w.values);
    }
  }
}

template <typename T>
static void decode_merge(const Params& p, int64_t item, char* scratch, char* workspace) {
  const int64_t runs = decode_runs(p), h = item % p.heads, b = item / p.heads, Dv = p.head_dim_v;
  const QueryBlock q = query_block<kLanes<T>>(p, b, h, 0);
  if (q.rows == 0) return;
  Arena arena{scratch};
  DecodeBuffers<T> w(p, arena);
  const T factor = T(exponent_factor(p));
  const State<T> sum = decode_state<T>(item * runs, w.ldo, workspace);
  for (int64_t run = 1; run < runs; ++run) {
    const State<T> part = decode_state<T>(item * runs + run, w.ldo, workspace);
    for (int64_t i = 0; i < q.rows; ++i) {
      T mine = T(1), its = T(1);
      if (is_softmax(p)) {
        const T top = sum.m[i] > part.m[i] ? sum.m[i] : part.m[i], pivot = top == -kInf<T> ? T(0) : top;
        mine = exp2v<T>(splat<T>((sum.m[i] - pivot) * factor))[0];
        its = exp2v<T>(splat<T>((part.m[i] - pivot) * factor))[0];
        sum.m[i] = top;
        sum.l[i] = sum.l[i] * mine + part.l[i] * its;
      }
      for (int64_t c = 0; c < w.ldo; c += kLanes<T>) {
        T* o = sum.O + i * w.ldo + c;
        store(o, load(o) * mine + load(part.O + i * w.ldo + c) * its);
      }
    }
  }
  for (int64_t d = 0; d < Dv; ++d)
    for (int64_t i = 0; i < q.lanes; ++i) w.O[d * q.lanes + i] = i < q.rows ? sum.O[i * w.ldo + d] : T(0);
  finish_block<T>(p, q, {sum.m, sum.l, w.O}, w.alpha, w.buffer);
}

template <typename T>
static Plan<Params> decode_plan(const Params& p) {
  Plan<Params> plan;
  Arena arena{nullptr};
  const DecodeBuffers<T> w(p, arena);
  plan.scratch_bytes = arena.used;
  plan.workspace_bytes = size_t(p.batch * p.heads * decode_runs(p) * kBlockM * (w.ldo + 2)) * sizeof(T);
  plan.add(p.batch * p.heads_k * decode_runs(p), &decode_item<T>);
  plan.add(p.batch * p.heads, &decode_merge<T>);
  return plan;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
