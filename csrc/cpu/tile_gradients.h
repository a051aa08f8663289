// From a tile and dO to the gradients of its logits and scores, and what that needs of the query block and
// the keys.
#pragma once
#include "tiled_relative.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

template <typename M>
struct BackwardBuffers {
  using T = typename M::T;
  using E = typename M::Element;
  int64_t ld, ldv;  // padded row lengths of queries and dout
  T *S, *dP, *cap, *bias, *Z, *block_q, *block_do, *block_o, *lse, *lse_low, *weight_by, *delta, *dout_out,
      *sink_share, *dQ;
  E *queries, *douts, *keys, *values, *columns, *weights, *query_rows, *dout_rows;
  bool* dead;
  WeightOf<T> weight_of;
  bool rescales;  // weights are to be multiplied by weight_by

  BackwardBuffers(const Params& p, Arena& a) : weight_of(p), rescales(false) {
    const int64_t D = p.head_dim, Dv = p.head_dim_v;
    ld = round_up(D, M::kPad);
    ldv = round_up(Dv, M::kPad);
    S = a.take<T>(kBlockN * kBlockM);
    dP = a.take<T>(kBlockN * kBlockM);
    cap = a.take<T>(p.softcap != 0 ? kBlockN * kBlockM : 0);
    bias = a.take<T>(p.bias ? kBlockN * (kBlockM + kLanes<T>) : 0);
    Z = a.take<T>(p.dropout_p > 0 ? kBlockN * kBlockM : 0);
    block_q = a.take<T>(kBlockM * ld);
    block_do = a.take<T>(kBlockM * ldv);
    block_o = a.take<T>(kBlockM * (ld > ldv ? ld : ldv));
    lse = a.take<T>(kBlockM);
    lse_low = a.take<T>(kBlockM);
    weight_by = a.take<T>(kBlockM);
    delta = a.take<T>(kBlockM);
    dout_out = a.take<T>(kBlockM);
    sink_share = a.take<T>(kBlockM);
    dQ = a.take<T>(round_up(D, kRowPad) * kBlockM);
    queries = a.take<E>(M::packed_size(D, kBlockM));
    douts = a.take<E>(M::packed_size(Dv, kBlockM));
    keys = a.take<E>(M::rows_size(kBlockN, D));
    values = a.take<E>(M::rows_size(kBlockN, Dv));
    columns = a.take<E>(M::columns_size(kBlockN, D));
    weights = a.take<E>(M::kSharesTile ? 0 : M::packed_size(kBlockN, kBlockM));
    query_rows = a.take<E>(M::kSharesTile ? 0 : M::packed_size(kBlockM, ld));
    dout_rows = a.take<E>(M::kSharesTile ? 0 : M::packed_size(kBlockM, ldv));
    dead = a.take<bool>(kBlockN);
  }
};

// dK is dS^T q: dS is 0 in a row that keeps no key, but 0 times a NaN that stands in its query is not. Gives
// the rows of q, in `buffer` where one had to be cleared. Such a row's output is exactly 0, and where NaN was
// met it is NaN, so looking at the first number spares the rest.
template <typename T>
static Matrix<T> clear_empty(const QueryBlock& q, Matrix<T> outs, int64_t head_dim_v, Matrix<T> qs,
                             int64_t head_dim, int64_t ld, T* buffer) {
  Matrix<T> found = qs;
  for (int64_t i = 0; i < q.rows; ++i) {
    if (outs.p[i * outs.ld] != T(0)) continue;
    bool empty = true, finite = true;
    for (int64_t d = 0; d < head_dim_v; ++d) empty &= outs.p[i * outs.ld + d] == T(0);
    for (int64_t d = 0; d < head_dim && empty; ++d)
      finite &= qs.p[i * qs.ld + d] - qs.p[i * qs.ld + d] == T(0);
    if (!empty || finite) continue;
    if (found.p != buffer) {
      for (int64_t r = 0; r < q.rows; ++r) memcpy(buffer + r * ld, qs.p + r * qs.ld, size_t(ld) * sizeof(T));
      found = {buffer, ld};
    }
    memset(buffer + i * ld, 0, size_t(ld) * sizeof(T));
  }
  return found;
}

// A query block made ready: its operands, lse in base 2 (+inf where no weight can arise), delta = rowsum(dO *
// O) - dlse. `dout_out` is delta without dlse, `sink_share` the sink's weight times it.
template <typename M>
struct BackwardBlock {
  using T = typename M::T;
  typename M::B queries, douts, query_rows, dout_rows;

  BackwardBlock(const GradParams& p, const QueryBlock& q, BackwardBuffers<M>& w) {
    const int64_t D = p.head_dim, Dv = p.head_dim_v;
    const Matrix<T> qs = block_rows<T>(p.q, q, D, w.ld, w.block_q),
                    dos = block_rows<T>(p.dout, q, Dv, w.ldv, w.block_do);
    queries = M::pack_columns(qs.p, qs.ld, q.rows, q.lanes, D, w.queries);
    douts = M::pack_columns(dos.p, dos.ld, q.rows, q.lanes, Dv, w.douts);
    const Matrix<T> outs = block_rows<T>(p.out, q, Dv, w.ldv, w.block_o),
                    clean = clear_empty(q, outs, Dv, qs, D, w.ld, w.block_q);
    query_rows = M::pack_rows(clean.p, clean.ld, q.rows, w.ld, w.query_rows);
    dout_rows = M::pack_rows(dos.p, dos.ld, q.rows, w.ldv, w.dout_rows);
    for (int64_t i = 0; i < q.lanes; ++i)
      w.lse[i] = kInf<T>, w.lse_low[i] = w.delta[i] = w.dout_out[i] = w.sink_share[i] = T(0);
    if (!is_softmax(p)) return;
    w.weight_of = WeightOf<T>(p);
    w.rescales = sum_again<M>(p, q, queries, w, w.weight_of, w.lse, w.lse_low, w.weight_by);
    const double* lse = lse_at(p, p.lse, q);
    const double* dlse = p.dlse ? lse_at(p, p.dlse, q) : nullptr;
    for (int64_t i = 0; i < q.rows; ++i) {
      if (!w.rescales) w.weight_of.split(lse[i], w.lse[i], w.lse_low[i]);
      Vec<T> sum{};
      T rest = T(0);
      int64_t d = 0;
      for (; d + kLanes<T> <= Dv; d += kLanes<T>)
        sum += load(dos.p + i * dos.ld + d) * load(outs.p + i * outs.ld + d);
      for (; d < Dv; ++d) rest += dos.p[i * dos.ld + d] * outs.p[i * outs.ld + d];
      for (int l = 0; l < kLanes<T>; ++l) rest += sum[l];
      w.dout_out[i] = rest;
      if (has_sink(p)) w.sink_share[i] = rest * T(exp(double(sink_of<T>(p, q.h)) - lse[i]));
      w.delta[i] = rest - (dlse ? T(dlse[i]) : T(0));
    }
  }
};

// Whether the rows of a block have all their keys in this tile.
static_assert(kBlockN % kGraphTile == 0, "a tile of a graph is never cut");
SACCADE_FORCE bool holds_rows(const Params& p, const QueryBlock& q, const KeyTile& t) {
  if (p.extra_k) return false;
  if (t.words) return p.mask.tile_ptr[q.i0 / kGraphTile + 1] - p.mask.tile_ptr[q.i0 / kGraphTile] == 1;
  return t.j0 <= q.keys.begin && q.keys.end <= t.j0 + t.n;
}

// In a tile that holds whole rows delta is sum(P dP), closer than that from the rounded output, and of a row
// of one key it is dP itself: the gradients move by P times the difference, sum(P (dP - dO . O)), in which it
// does not matter how near to 1 the weights add up. `sum` lacks the sink's part.
template <typename T>
SACCADE_FORCE void settle_rows(Interval keys, int64_t lanes, Vec<T> sum, Vec<T> share, const T* S, T* dS) {
  const Vec<T> off = sum - share, move = off - off == T(0) ? off : Vec<T>{};
  for (int64_t j = keys.begin; j < keys.end; ++j)
    store(dS + j * lanes, load(dS + j * lanes) - load(S + j * lanes) * move);
}

// w.S becomes the weights (after dropout), w.dP the gradient of the natural logits; 0 at masked pairs
// whatever stands in their key.
template <typename M>
static void weigh_tile(const GradParams& p, const QueryBlock& q, const KeyTile& t, BackwardBuffers<M>& w) {
  using T = typename M::T;
  const T unit = T(logit_unit(p));
  const WeightOf<T> weight_of = w.weight_of;
  const bool softmax = is_softmax(p), drop = p.dropout_p > 0;
  const bool settles = softmax && !w.rescales && holds_rows(p, q, t);
  for (int64_t i = 0; i < q.lanes; i += kLanes<T>) {
    const Vec<T> lse = load(w.lse + i), low = load(w.lse_low + i), delta = load(w.delta + i),
                 dout_out = load(w.dout_out + i);
    const Interval keys = lane_keys<T>(q, t, i);
    clear_outside(keys, t.n, q.lanes, w.S + i);
    clear_outside(keys, t.n, q.lanes, w.dP + i);
    Vec<T> sum{};
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      T *s = w.S + j * q.lanes + i, *d = w.dP + j * q.lanes + i;
      const Vec<T> logit = load(s), z = drop ? load(w.Z + j * q.lanes + i) : splat<T>(T(1));
      const Vec<T> dP = drop ? load(d) * z : load(d);
      const VecI<T> masked = logit == -kInf<T>;
      Vec<T> weight, grad;
      if (softmax) {
        weight = weight_of(logit, lse, low);
        grad = weight * (dP - delta);
        if (settles) sum += masked ? Vec<T>{} : weight * (dP - dout_out);
      } else {
        weight = activate<T>(p.activation, logit * unit);
        grad = p.activation == Activation::kReLU ? (weight > T(0) ? dP : Vec<T>{})
                                                 : weight * (T(1) - weight) * dP;
      }
      store(d, masked ? Vec<T>{} : grad);
      store(s, drop && !settles ? weight * z : weight);
    }
    if (settles) settle_rows(keys, q.lanes, sum, load(w.sink_share + i), w.S + i, w.dP + i);
  }
  if (drop && settles) multiply_tile(w.S, w.Z, t.n * q.lanes);
  if (w.rescales) {
    scale_lanes(w.S, t.n, q.lanes, w.weight_by);
    scale_lanes(w.dP, t.n, q.lanes, w.weight_by);
  }
}

// Operands of a key tile.
template <typename M>
struct TileOperands {
  typename M::A keys, values;
  TileParts parts;
};

template <typename M>
static TileOperands<M> gradient_tile(const GradParams& p, const QueryBlock& q, const KeyTile& t,
                                     const BackwardBlock<M>& block, BackwardBuffers<M>& w) {
  using T = typename M::T;
  const int64_t D = p.head_dim, Dv = p.head_dim_v, e = size_of(p.k.dtype);
  TileOperands<M> o;
  if (t.extra) {
    o.keys = M::row(static_cast<const char*>(p.extra_k) + q.h * D * e, p.k.dtype, D, w.keys);
    o.values = M::row(static_cast<const char*>(p.extra_v) + q.h * Dv * e, p.v.dtype, Dv, w.values);
  } else {
    o.keys = M::rows(p, p.k, q.seq, q.b, q.hk, t.j0, t.n, D, nullptr, w.keys);
    o.values = M::rows(p, p.v, q.seq, q.b, q.hk, t.j0, t.n, Dv, nullptr, w.values);
  }
  o.parts = tile_parts<M>(p, q, t);
  const bool some_dead = tile_logits<M>(p, q, t, o.parts, o.keys, block.queries, w.S, w.cap, w.bias, w.dead);
  tile_scores<M>(q, o.parts, Dv, o.values, block.douts, w.dP);
  if (p.dropout_p > 0) dropout_tile<T>(p, q, t, w.Z);
  weigh_tile<M>(p, q, t, w);
  if (some_dead) o.keys = M::rows(p, p.k, q.seq, q.b, q.hk, t.j0, t.n, D, w.dead, w.keys);
  return o;
}

// w.dP from the gradient of the logits to that of the bare score.
template <typename M>
static void score_gradient(const GradParams& p, const QueryBlock& q, int64_t n, BackwardBuffers<M>& w) {
  using T = typename M::T;
  const T scale = T(p.scale);
  for (int64_t x = 0; x < n * q.lanes; x += kLanes<T>) {
    Vec<T> g = load(w.dP + x) * scale;
    if (p.softcap != 0) {
      const Vec<T> c = load(w.cap + x), none{};
      g = g == T(0) ? none : g * (T(1) - c * c);  // a masked pair's c may be NaN
    }
    store(w.dP + x, g);
  }
}

template <typename T>
SACCADE_FORCE T lane_sum(Vec<T> v) {
  T s = T(0);
  for (int l = 0; l < kLanes<T>; ++l) s += v[l];
  return s;
}

// Gradients of w . phi(q + k) from w.dP; dK rows are `ld` apart.
template <typename T>
static void additive_gradient(const GradParams& p, const QueryBlock& q, int64_t n, Broadcast<T> keys,
                              const T* queries, const T* dS, T* dQ, T* dK, int64_t ld, double* dW) {
  const T* w = static_cast<const T*>(p.weight) + q.h * p.head_dim;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t d = 0; d < p.head_dim; ++d) {
      const T key = keys.p[j * keys.row + d * keys.col];
      Vec<T> dk{}, dw{};
      for (int64_t i = 0; i < q.lanes; i += kLanes<T>) {
        const Vec<T> x = load(queries + d * q.lanes + i) + key, g = load(dS + j * q.lanes + i);
        const Vec<T> phi = phi_of<T>(p, x), slope_of = phi_slope<T>(p, x, phi);
        // A masked pair has g = 0, but phi may be NaN where its key is.
        const Vec<T> none{};
        const Vec<T> dx = g == T(0) ? none : g * w[d] * slope_of;
        dk += dx;
        dw += g == T(0) ? none : g * phi;
        store(dQ + d * q.lanes + i, load(dQ + d * q.lanes + i) + dx);
      }
      dK[j * ld + d] += lane_sum<T>(dk);
      dW[d] += double(lane_sum<T>(dw));
    }
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
