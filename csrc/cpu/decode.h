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
  T *S, *queries, *bias, *alpha, *buffer, *O;
  char* zeros;  // a row of zeros, in any dtype
  bool* dead;
  int64_t ldq, ldo;

  DecodeBuffers(const Params& p, Arena& a) {
    ldq = round_up(p.head_dim, kLanes<T>);
    ldo = round_up(p.head_dim_v, kLanes<T>);
    S = a.take<T>(kBlockN * kBlockM);
    queries = a.take<T>(p.heads / p.heads_k * kBlockM * ldq);
    bias = a.take<T>(p.bias ? kBlockN * (kBlockM + kLanes<T>) : 0);
    alpha = a.take<T>(kBlockM);
    buffer = a.take<T>(kBlockM * (ldq > ldo ? ldq : ldo));
    O = a.take<T>(p.head_dim_v * kBlockM);
    zeros = a.take<char>(ldo * 8);
    dead = a.take<bool>(kBlockN);
    if (a.base) memset(zeros, 0, size_t(ldo) * 8);
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

// O[i][c] += sum_j w[j][i] row(j)[c].
template <typename T, typename Row>
static void add_values(int64_t rows, int64_t n, int64_t d, const T* w, int64_t lanes, Row row, T* O,
                       int64_t ldo) {
  constexpr int L = kLanes<T>, U = 4;
  for (int64_t i = 0; i < rows; ++i) {
    T* o = O + i * ldo;
    int64_t c = 0;
    for (; c + U * L <= d; c += U * L) {
      Vec<T> sum[U];
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) sum[u] = load(o + c + u * L);
      for (int64_t j = 0; j < n; ++j) {
        const auto* v = row(j) + c;
        const T weight = w[j * lanes + i];
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) sum[u] += weight * load_as<T>(v + u * L);
      }
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) store(o + c + u * L, sum[u]);
    }
    for (; c < d; c += L) {
      const int64_t width = min64(L, d - c);
      Vec<T> sum = load(o + c);
      for (int64_t j = 0; j < n; ++j)
        sum += w[j * lanes + i] * (width == L ? load_as<T>(row(j) + c) : load_part<T>(row(j) + c, width));
      store(o + c, sum);
    }
  }
}

template <typename T, typename S>
static void decode_item(const Params& p, int64_t item, char* scratch, char* workspace) {
  const int64_t runs = decode_runs(p), run = item % runs, hk = item / runs % p.heads_k,
                b = item / runs / p.heads_k;
  const int64_t group = p.heads / p.heads_k;
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
  const S* keys[kBlockN];
  const S* values[kBlockN];
  KeyTiles tiles(p, first, {run * kDecodeRun, (run + 1) * kDecodeRun});
  KeyTile t;
  while (tiles.next(t)) {
    for (int64_t j = 0; j < t.n; ++j) {
      keys[j] = reinterpret_cast<const S*>(cache_row(p, p.k, first.seq, b, hk, t.j0 + j));
      values[j] = reinterpret_cast<const S*>(cache_row(p, p.v, first.seq, b, hk, t.j0 + j));
    }
    for (int64_t g = 0; g < group; ++g) {
      QueryBlock q = first;
      q.h = hk * group + g;
      const State<T> s = state(g);
      dot_scores<T>(
          t.n, q.rows, q.lanes, p.head_dim, [&](int64_t j) { return keys[j]; },
          w.queries + g * kBlockM * w.ldq, w.ldq, w.S);
      if (!bare_logits(p)) finish_logits<T>(p, q, t, w.S, nullptr, w.bias);
      if (!t.whole) apply_mask<T>(p, q, t, w.S);
      const bool some_dead = may_hold_dead(p, q, t) && find_dead<T>(q, t, w.S, w.dead);
      if (is_softmax(p)) {
        if (softmax_tile(q, t, w.S, s.m, s.l, w.alpha, exponent_factor<T>(p)))
          for (int64_t i = 0; i < q.rows; ++i)
            for (int64_t c = 0; c < w.ldo; c += kLanes<T>)
              store(s.O + i * w.ldo + c, load(s.O + i * w.ldo + c) * w.alpha[i]);
      } else {
        activate_tile(p.activation, w.S, t.n * q.lanes, T(logit_unit(p)));
      }
      const S* zeros = reinterpret_cast<const S*>(w.zeros);
      const auto value = [&](int64_t j) { return some_dead && w.dead[j] ? zeros : values[j]; };
      add_values<T>(q.rows, t.n, p.head_dim_v, w.S, q.lanes, value, s.O, w.ldo);
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
  const T factor = exponent_factor<T>(p);
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

template <typename T, typename S>
static Plan<Params> decode_plan_of(const Params& p) {
  Plan<Params> plan;
  Arena arena{nullptr};
  const DecodeBuffers<T> w(p, arena);
  plan.scratch_bytes = arena.used;
  plan.workspace_bytes = size_t(p.batch * p.heads * decode_runs(p) * kBlockM * (w.ldo + 2)) * sizeof(T);
  plan.add(p.batch * p.heads_k * decode_runs(p), &decode_item<T, S>);
  plan.add(p.batch * p.heads, &decode_merge<T>);
  return plan;
}

// Rows of keys and values must be contiguous along head_dim.
template <typename T>
static Plan<Params> decode_plan(const Params& p) {
  if constexpr (sizeof(T) == 8)
    return decode_plan_of<T, T>(p);
  else
    return p.k.dtype == DType::kBFloat16  ? decode_plan_of<T, bf16>(p)
           : p.k.dtype == DType::kFloat16 ? decode_plan_of<T, half_bits>(p)
                                          : decode_plan_of<T, float>(p);
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
