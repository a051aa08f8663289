// The logits of a tile: scale and softcap, additive scores, biases, what the mask drops, dropout.
#pragma once
#include "dropout.h"
#include "relative.h"
#include "tile.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// The logit is the product itself, up to a positive factor that the exponential takes along.
SACCADE_FORCE bool bare_logits(const Params& p) {
  return p.score == Score::kDot && p.softcap == 0 && !p.bias && !p.rel_bias && p.scale > 0;
}
// Natural logit = S * logit_unit; exp(logit) = 2^(S * exponent_factor), rounded to T once, so that every pass
// uses the same factor.
SACCADE_FORCE double logit_unit(const Params& p) { return bare_logits(p) ? p.scale : 1; }
template <typename T>
SACCADE_FORCE T exponent_factor(const Params& p) {
  return T(logit_unit(p) * kLog2e);
}

// phi of the additive scores: tanh (Bahdanau et al., arXiv 1409.0473) or leaky_relu (GATv2, arXiv
// 2105.14491).
template <typename T>
SACCADE_FORCE Vec<T> phi_of(const Params& p, Vec<T> x) {
  return p.score == Score::kAdditive ? tanhv<T>(x) : (x > T(0) ? x : T(p.slope) * x);
}
// Its slope at x, where it is phi.
template <typename T>
SACCADE_FORCE Vec<T> phi_slope(const Params& p, Vec<T> x, Vec<T> phi) {
  if (p.score == Score::kAdditive) return T(1) - phi * phi;
  return x > T(0) ? splat<T>(T(1)) : splat<T>(T(p.slope));
}

// w . phi(q_i + k_j).
template <typename T>
static void additive_scores(const Params& p, const QueryBlock& q, int64_t n, Broadcast<T> keys,
                            const T* queries, T* S) {
  const T* w = static_cast<const T*>(p.weight) + q.h * p.head_dim;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < q.lanes; i += kLanes<T>) {
      Vec<T> s{};
      for (int64_t d = 0; d < p.head_dim; ++d) {
        const Vec<T> x = load(queries + d * q.lanes + i) + keys.p[j * keys.row + d * keys.col];
        s += w[d] * phi_of<T>(p, x);
      }
      store(S + j * q.lanes + i, s);
    }
}

// buffer[j][i] = bias of the tile's pairs; stride_i 0 needs one row only.
template <typename T>
struct BiasTile {
  const T* p;
  int64_t row, lane;  // element (j, i) at p[j * row + i * lane]
};
// Where the bias of row i of a block and key j stands.
SACCADE_FORCE const char* bias_at(const Params& p, const QueryBlock& q, int64_t i, int64_t j) {
  const int64_t* st = p.bias_stride;
  return static_cast<const char*>(p.bias) +
         (q.b * st[0] + q.h * st[1] + (q.i0 + i) * st[2] + j * st[3]) * size_of(p.bias_dtype);
}
template <typename T>
static BiasTile<T> bias_tile(const Params& p, const QueryBlock& q, const KeyTile& t, T* buffer) {
  const int64_t* st = p.bias_stride;
  const char* base = bias_at(p, q, 0, t.j0);
  if (st[2] == 0) {
    read_row(buffer, base, p.bias_dtype, st[3], t.n);
    return {buffer, 1, 0};
  }
  if (p.bias_dtype == AccumulatorOf<T>::value && st[3] == 1) {
    transpose(reinterpret_cast<const T*>(base), st[2], buffer, q.lanes, q.rows, t.n);
    for (int64_t j = 0; j < t.n && q.rows < q.lanes; ++j)
      memset(buffer + j * q.lanes + q.rows, 0, size_t(q.lanes - q.rows) * sizeof(T));
    return {buffer, q.lanes, 1};
  }
  T* rows = buffer + kBlockN * kBlockM;  // a vector's worth of them
  for (int64_t i0 = 0; i0 < q.lanes; i0 += kLanes<T>) {
    for (int64_t i = 0; i < kLanes<T>; ++i)
      if (i0 + i < q.rows)
        read_row(rows + i * t.n, base + (i0 + i) * st[2] * size_of(p.bias_dtype), p.bias_dtype, st[3], t.n);
      else
        memset(rows + i * t.n, 0, size_t(t.n) * sizeof(T));
    transpose(rows, t.n, buffer + i0, q.lanes, kLanes<T>, t.n);
  }
  return {buffer, q.lanes, 1};
}

// By distance: entry i of the row of rel_bias that key j of the tile sees begins here and falls with i.
template <typename T>
SACCADE_FORCE int64_t rel_index(const Params& p, const QueryBlock& q, int64_t j, int64_t i) {
  return p.rel_center + j - (q.i0 + i + q.seq.seqlen_k - q.seq.seqlen_q);
}

// A bias of finfo.min means a row of equal numbers where all of a row have it. Below this, lse in double
// could no longer hold ln of a sum.
constexpr double kLargest = 1e11;

// A score, scaled and softcapped; `cap` becomes tanh(scale * score / softcap) where there is a softcap.
template <typename T>
struct Bend {
  T scale, softcap, per_cap;
  explicit Bend(const Params& p)
      : scale(T(p.scale)), softcap(T(p.softcap)), per_cap(T(p.softcap != 0 ? p.scale / p.softcap : 0)) {}
  SACCADE_MEMBER Vec<T> operator()(Vec<T> score, Vec<T>& cap) const {
    if (softcap == T(0)) return scale * score;
    cap = tanhv<T>(score * per_cap);
    return softcap * cap;
  }
};
template <typename T>
SACCADE_FORCE Vec<T> with_bias(Vec<T> logit, Vec<T> bias) {
  const Vec<T> sum = logit + bias;
  return bias == -kInf<T> ? bias : (sum < T(-kLargest) ? splat<T>(T(-kLargest)) : sum);
}

// S becomes the logit in natural units. `cap` (may be null) receives tanh(scale * score / softcap), which the
// backward pass needs.
template <typename T>
static void finish_logits(const Params& p, const QueryBlock& q, const KeyTile& t, T* S, T* cap, T* buffer) {
  const Bend<T> bend(p);
  const bool bias = p.bias && !t.extra, rel = p.rel_bias && !t.extra && !is_by_query(p);
  BiasTile<T> tile{};
  if (bias) tile = bias_tile<T>(p, q, t, buffer);
  for (int64_t j = 0; j < t.n; ++j) {
    T* row = S + j * q.lanes;
    for (int64_t i = 0; i < q.lanes; i += kLanes<T>) {
      Vec<T> c{}, s = bend(load(row + i), c);
      if (cap && p.softcap != 0) store(cap + j * q.lanes + i, c);
      if (bias) s = with_bias<T>(s, tile.lane ? load(tile.p + j * tile.row + i) : splat<T>(tile.p[j]));
      store(row + i, s);
    }
    if (rel) {
      const T* r = static_cast<const T*>(p.rel_bias) + q.h * p.rel_size + rel_index<T>(p, q, t.j0 + j, 0);
      for (int64_t i = 0; i < q.rows; ++i) row[i] += r[-i];
    }
  }
  if (p.rel_bias && !t.extra && is_by_query(p))
    add_clipped<T, kBlockM>(p,
                            static_cast<const T*>(p.rel_bias) + rel_row_at(p, q.b, q.h, q.seq.q_begin + q.i0),
                            t.j0 - (q.i0 + q.seq.seqlen_k - q.seq.seqlen_q), t.n, q.rows, q.lanes, S);
}

// Keys of a tile, counted from its first: the rows in the vector of lanes at i keep none outside.
template <typename T>
SACCADE_FORCE Interval lane_keys(const QueryBlock& q, const KeyTile& t, int64_t i) {
  if (t.whole || t.extra) return {0, t.n};
  if (i >= q.rows) return {0, 0};
  const int64_t begin = min64(max64(q.begin[i] - t.j0, 0), t.n);
  return {begin, min64(max64(q.end[min64(i + kLanes<T>, q.rows) - 1] - t.j0, begin), t.n)};
}
// X[j][i] = 0 in the vector of lanes at `x` for the keys outside.
template <typename T>
SACCADE_FORCE void clear_outside(Interval keys, int64_t n, int64_t lanes, T* x) {
  for (int64_t j = 0; j < keys.begin; ++j) store(x + j * lanes, Vec<T>{});
  for (int64_t j = keys.end; j < n; ++j) store(x + j * lanes, Vec<T>{});
}

// Pairs that the mask drops get -inf.
template <typename T>
static void apply_mask(const Params& p, const QueryBlock& q, const KeyTile& t, T* S) {
  using Int = typename VecOf<T>::Int;
  const MaskParams& m = p.mask;
  const bool* keep = m.keep ? m.keep + q.b * m.keep_batch + t.j0 : nullptr;
  const int32_t* k_ids = m.q_ids ? m.k_ids + q.b * m.k_ids_batch + t.j0 : nullptr;
  // Keys that every row's interval holds need no look where only intervals decide (padded lanes keep whatever
  // they have).
  const bool intervals = !keep && !k_ids && !t.words;
  const int64_t shared_begin = intervals ? min64(max64(q.shared.begin - t.j0, 0), t.n) : t.n;
  const int64_t shared_end = intervals ? max64(shared_begin, min64(q.shared.end - t.j0, t.n)) : t.n;
  for (int64_t i0 = 0; i0 < q.lanes; i0 += kLanes<T>) {
    VecI<T> begin, end, ids{}, low{}, high{};
    for (int l = 0; l < kLanes<T>; ++l) {
      const int64_t i = i0 + l;
      begin[l] = Int(min64(max64(q.begin[i] - t.j0, 0), t.n));
      end[l] = Int(min64(max64(q.end[i] - t.j0, 0), t.n));
      if (i >= q.rows) continue;
      if (k_ids) ids[l] = m.q_ids[q.b * m.q_ids_batch + q.i0 + i];
      if (t.words) {
        low[l] = Int(int32_t(t.words[i]));
        high[l] = Int(int32_t(t.words[i] >> 32));
      }
    }
    for (int64_t j = 0; j < t.n; ++j) {
      if (j == shared_begin) j = shared_end;
      if (j == t.n) break;
      const Int key = Int(j);
      VecI<T> kept = (begin <= key) & (end > key);
      if (keep && !keep[j]) kept = VecI<T>{};
      if (k_ids) kept &= ids == Int(k_ids[j]);
      if (t.words) kept &= (((j < 32 ? low : high) >> Int(j & 31)) & 1) != 0;
      T* s = S + j * q.lanes + i0;
      store(s, kept ? load(s) : splat<T>(-kInf<T>));
    }
  }
}

// dead[j]: no row of the block keeps key j, so what stands in its key and value must not be touched. Returns
// whether there is one.
template <typename T>
static bool find_dead(const QueryBlock& q, const KeyTile& t, const T* S, bool* dead) {
  using Int = typename VecOf<T>::Int;
  bool any = false;
  for (int64_t j = 0; j < t.n; ++j) {
    const T* s = S + j * q.lanes;
    bool alive = s[0] != -kInf<T>;  // mostly the first row settles it
    for (int64_t i = 0; i < q.rows && !alive; i += kLanes<T>) {
      const VecI<T> kept = load(s + i) != -kInf<T>, real = iota<T>() < Int(q.rows - i);
      alive = any_lane(kept & real);
    }
    dead[j] = !alive;
    any |= !alive;
  }
  return any;
}

// Keys of a tile can be dead only where a mask is irregular or a bias may hold -inf; plain bands never visit
// such keys.
SACCADE_FORCE bool may_hold_dead(const Params& p, const QueryBlock& q, const KeyTile& t) {
  return !t.extra && (p.bias || (!t.whole && (q.gaps || t.words || irregular(p.mask))));
}

// Z[j][i] = 0 where dropout drops the pair, 1 / (1 - p) elsewhere.
template <typename T>
static void dropout_tile(const Params& p, const QueryBlock& q, const KeyTile& t, T* Z) {
  static_assert(kLanes<T> % kWordLanes == 0, "a block's lanes, whole vectors, are whole vectors of words");
  const DropoutFactors<T> factors(p.seed, p.dropout_p);
  Words row;
  for (int64_t l = 0; l < kWordLanes; ++l) row[l] = uint64_t(q.i0 + l);
  for (int64_t i0 = 0; i0 < q.lanes; i0 += kWordLanes, row += kWordLanes)
    for (int64_t group = t.j0 >> 3; group <= (t.j0 + t.n - 1) >> 3; ++group) {
      Words c[4];
      factors.draw(splat_word(uint64_t(group)), row, splat_word(uint64_t(q.h)), q.b, c);
      const int64_t end = min64(group * 8 + 8, t.j0 + t.n);
      for (int64_t j = max64(group * 8, t.j0); j < end; ++j)
        factors.write(c[(j & 7) >> 1], j, Z + (j - t.j0) * q.lanes + i0);
    }
}

template <typename T>
static void multiply_tile(T* __restrict__ x, const T* __restrict__ z, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= z[i];
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
