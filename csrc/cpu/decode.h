// The decode body: few queries, many keys. Each row of keys and values is read from memory once for all query
// heads that share it. The keys are split into runs whose partial results are merged in order.
#pragma once
#include "decode_rows.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// How the keys of a head are split where batch and key heads alone would leave threads idle: into so many
// work items, of no fewer keys, or their own cost would show. Of a cache the keys in use count.
struct KeyRuns {
  static constexpr int64_t kItems = 64, kLeast = 4 * kBlockN;
  int64_t size, count;
  explicit KeyRuns(const Params& p) {
    int64_t keys = p.seqlen_k;
    const int64_t wanted = max64(1, kItems / max64(1, p.batch * p.heads_k));
    if (wanted > 1 && p.seqused_k) {
      keys = 0;
      for (int64_t b = 0; b < p.batch; ++b) keys = max64(keys, p.seqused_k[b]);
    }
    size = max64(kLeast, round_up((keys + wanted - 1) / wanted, kBlockN));
    count = max64(1, (keys + size - 1) / size);
  }
};

// The rows of a work item: every query of every head that shares a key head, head by head.
struct GroupRows {
  int64_t group, of_head, count;
  explicit GroupRows(const Params& p)
      : group(p.heads / p.heads_k), of_head(p.seqlen_q), count(group * of_head) {}
};
static_assert(kDecodeQueries <= kBlockM, "the queries of a head are one block");

// A run's result: m and l by row, O[row][ldo] unnormalised.
template <typename T>
static State<T> decode_state(const GroupRows& rows, T* at) {
  return {at, at + rows.count, at + 2 * rows.count};
}
SACCADE_FORCE int64_t decode_state_size(const GroupRows& rows, int64_t ldo) {
  return round_up(rows.count * (ldo + 2), 16);
}

template <typename T>
struct DecodeBuffers {
  GroupRows rows;
  // `together`: heads whose rows take a tile at once. Not those that a bias tells apart: it may hide a key
  // from one of them, and what stands in its value must not reach that one.
  int64_t ldq, ldo, together;
  T *S, *queries, *buffer, *scales, *state;
  char* zeros;  // a row of zeros, in any dtype

  DecodeBuffers(const Params& p, Arena& a) : rows(p) {
    ldq = round_up(p.head_dim, kLanes<T>);
    ldo = round_up(p.head_dim_v, kLanes<T>);
    const bool alike = !p.bias || p.bias_stride[1] == 0;
    together = alike ? max64(1, min64(rows.group, kBlockM / max64(1, rows.of_head))) : 1;
    S = a.take<T>(together * rows.of_head * kBlockN);
    queries = a.take<T>(rows.count * ldq);
    buffer = a.take<T>(p.bias ? kBlockN : 0);
    scales = a.take<T>(kBlockM);
    state = a.take<T>(decode_state_size(rows, ldo));
    zeros = a.take<char>(ldo * 8);
  }
};

// One key head of one sequence, over a run of its keys.
template <typename T, typename E>
struct DecodeRun {
  const Params& p;
  DecodeBuffers<T>& w;
  QueryBlock q;
  State<T> state;
  const E *keys[kBlockN], *values[kBlockN], *alive[kBlockN];

  DecodeRun(const Params& params, DecodeBuffers<T>& buffers, int64_t b, int64_t hk, T* at)
      : p(params),
        w(buffers),
        q(query_block<1>(p, b, hk * w.rows.group, 0)),
        state(decode_state(w.rows, at)) {}

  void clear() {
    memset(w.zeros, 0, size_t(w.ldo) * 8);
    for (int64_t r = 0; r < w.rows.count; ++r) state.m[r] = -kInf<T>, state.l[r] = T(0);
    memset(state.O, 0, size_t(w.rows.count * w.ldo) * sizeof(T));
    for (int64_t g = 0; g < w.rows.group; ++g)
      for (int64_t i = 0; i < q.rows; ++i)
        read_row(w.queries + (g * q.rows + i) * w.ldq, row_at(p.q, q.b, head(g), q.seq.q_begin + i),
                 p.q.dtype, p.q.col, p.head_dim);
  }
  int64_t head(int64_t g) const { return q.hk * w.rows.group + g; }

  void run(Interval keys_of_run) {
    KeyTiles tiles(p, q, keys_of_run);
    KeyTile t;
    while (tiles.next(t)) {
      find_rows(p.k, t, keys);
      find_rows(p.v, t, values);
      for (int64_t g = 0; g < w.rows.group; g += w.together)
        tile(t, g * q.rows, min64(w.together, w.rows.group - g) * q.rows);
    }
  }

 private:
  // Where the keys of a tile lie; those up to the end of a vector are the last one again.
  void find_rows(const Rows& x, const KeyTile& t, const E** at) const {
    if (scattered(p)) {
      for (int64_t j = 0; j < t.n; ++j)
        at[j] = reinterpret_cast<const E*>(cache_row(p, x, q.seq, q.b, q.hk, t.j0 + j));
    } else {
      const E* first = reinterpret_cast<const E*>(row_at(x, q.b, q.hk, q.seq.k_begin + t.j0));
      for (int64_t j = 0; j < t.n; ++j) at[j] = first + j * x.row;
    }
    for (int64_t j = t.n; j % kLanes<T>; ++j) at[j] = at[t.n - 1];
  }

  // The tile against rows [first, first + rows).
  void tile(const KeyTile& t, int64_t first, int64_t rows) {
    const int64_t n = round_up(t.n, kLanes<T>);
    for_row_groups(rows, [&](int64_t r, auto R) {
      key_dots_of<T, E, R.value>(keys, t.n, p.head_dim, w.queries + (first + r) * w.ldq, w.ldq,
                                 w.S + r * kBlockN);
    });
    for (int64_t r = 0; r < rows; ++r) {
      T* s = w.S + r * kBlockN;
      const int64_t i = (first + r) % q.rows;
      q.h = head((first + r) / q.rows);
      if (!bare_logits(p)) finish_row<T>(p, q, t, i, s, w.buffer);
      if (!t.whole) mask_row<T>(p, q, t, i, s);
      for (int64_t j = t.n; j < n; ++j) s[j] = -kInf<T>;
    }
    const E* const* read = may_hold_dead(p, q, t) ? living(t, rows) : values;
    for (int64_t r = 0; r < rows; ++r) weigh(n, first + r, w.S + r * kBlockN);
    for_row_groups(rows, [&](int64_t r, auto R) {
      add_values_of<T, E, R.value>(read, t.n, 0, p.head_dim_v, w.S + r * kBlockN,
                                   state.O + (first + r) * w.ldo, w.ldo);
    });
  }

  // The tile's values, where no row keeps one, zeros: what stands in such a value must not be touched.
  const E* const* living(const KeyTile& t, int64_t rows) {
    for (int64_t j = 0; j < t.n; ++j) {
      bool kept = false;
      for (int64_t r = 0; r < rows && !kept; ++r) kept = w.S[r * kBlockN + j] != -kInf<T>;
      alive[j] = kept ? values[j] : reinterpret_cast<const E*>(w.zeros);
    }
    return alive;
  }

  void weigh(int64_t n, int64_t row, T* s) {
    if (!is_softmax(p)) return activate_tile(p.activation, s, n, T(logit_unit(p)));
    const T alpha = softmax_row<T>(n, exponent_factor<T>(p), s, state.m[row], state.l[row]);
    if (alpha == T(1)) return;
    T* o = state.O + row * w.ldo;
    for (int64_t c = 0; c < w.ldo; c += kLanes<T>) store(o + c, load(o + c) * alpha);
  }
};

// Writes out and lse of a head, from its rows of m, l and O.
template <typename T>
static void finish_head(const Params& p, const QueryBlock& q, State<T> s, int64_t ldo, T* scales) {
  if (is_softmax(p)) finish_sums<T>(p, q, q.rows, s, scales);
  for (int64_t i = 0; i < q.rows; ++i) {
    T* o = s.O + i * ldo;
    if (is_softmax(p))
      for (int64_t c = 0; c < ldo; c += kLanes<T>) store(o + c, load(o + c) * scales[i]);
    write_row(row_at(p.out, q.b, q.h, q.seq.q_begin + i), p.out.dtype, p.out.col, o, p.head_dim_v);
  }
}
template <typename T>
static State<T> head_of(const State<T>& s, int64_t row, int64_t ldo) {
  return {s.m + row, s.l + row, s.O + row * ldo};
}

template <typename T, typename E>
static void decode_item(const Params& p, int64_t item, char* scratch, char* workspace) {
  const KeyRuns runs(p);
  const int64_t run = item % runs.count, hk = item / runs.count % p.heads_k,
                b = item / runs.count / p.heads_k;
  Arena arena{scratch};
  DecodeBuffers<T> w(p, arena);
  T* state =
      runs.count == 1 ? w.state : reinterpret_cast<T*>(workspace) + item * decode_state_size(w.rows, w.ldo);
  DecodeRun<T, E> x(p, w, b, hk, state);
  if (x.q.rows == 0) return;
  x.clear();
  x.run({run * runs.size, (run + 1) * runs.size});
  if (runs.count > 1) return;
  for (int64_t g = 0; g < w.rows.group; ++g) {
    x.q.h = x.head(g);
    finish_head<T>(p, x.q, head_of(x.state, g * x.q.rows, w.ldo), w.ldo, w.scales);
  }
}

// Joins the runs of a head, in the order of their keys.
template <typename T>
static void decode_merge(const Params& p, int64_t item, char* scratch, char* workspace) {
  const int64_t h = item % p.heads, b = item / p.heads;
  const QueryBlock q = query_block<1>(p, b, h, 0);
  if (q.rows == 0) return;
  Arena arena{scratch};
  DecodeBuffers<T> w(p, arena);
  const KeyRuns runs(p);
  const auto state = [&](int64_t run) {
    T* at = reinterpret_cast<T*>(workspace) +
            ((b * p.heads_k + q.hk) * runs.count + run) * decode_state_size(w.rows, w.ldo);
    return head_of(decode_state(w.rows, at), h % w.rows.group * q.rows, w.ldo);
  };
  const T factor = exponent_factor<T>(p);
  const State<T> sum = state(0);
  for (int64_t run = 1; run < runs.count; ++run) {
    const State<T> part = state(run);
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
  finish_head<T>(p, q, sum, w.ldo, w.scales);
}

template <typename T, typename E>
static Plan<Params> decode_plan_of(const Params& p) {
  Plan<Params> plan;
  Arena arena{nullptr};
  const DecodeBuffers<T> w(p, arena);
  const KeyRuns runs(p);
  plan.scratch_bytes = arena.used;
  plan.add(p.batch * p.heads_k * runs.count, &decode_item<T, E>);
  if (runs.count > 1) {
    plan.workspace_bytes =
        size_t(p.batch * p.heads_k * runs.count * decode_state_size(w.rows, w.ldo)) * sizeof(T);
    plan.add(p.batch * p.heads, &decode_merge<T>);
  }
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
