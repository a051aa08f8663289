// The gather body backward: dQ row by row, dK and dV key by key over the transposed graph, each from weights
// formed anew. No atomics: every sum has one order.
#pragma once
#include "gather.h"

namespace saccade {

// Of one query: lse as the sum of two numbers (one fp32 would lose the sum of logits near -1e9);
// rowsum(dO * O) - dlse.
struct GatherStats {
  float high, low, delta;
};
SACCADE_DEVICE int64_t stats_count(const Params& p) { return p.batch * p.heads * p.seqlen_q; }
SACCADE_DEVICE GatherStats gather_stats(const GatherArgs& args, const Head& x, int i) {
  const int64_t count = stats_count(args.p);
  const float* at = args.stats + (x.b * args.p.heads + x.h) * args.p.seqlen_q + i;
  return {load_global(at), load_global(at + count), load_global(at + 2 * count)};
}

// As kForwardBlocks.
constexpr int kQueryBlocks = 4, kKeyBlocks = 3;

template <typename T, int kDim>
SACCADE_KERNEL(kGatherThreads, 1)
gather_rows(SACCADE_PARAM GatherArgs args) {
  using Lanes = Team<T, kDim>;
  const GatherParams& p = args.p;
  const int64_t index =
      (block_index() * (kGatherThreads / 32) + thread_index() / 32) * Lanes::kTeams + Lanes::index();
  const int64_t count = stats_count(p);
  const bool inside = index < count;  // the whole warp takes part in the sums
  const int64_t head = inside ? index / p.seqlen_q : 0;
  const int i = inside ? int(index % p.seqlen_q) : 0;
  const Head x = gather_head(p, int(head / p.heads), int(head % p.heads));
  typename Lanes::Loaded dout, out;
  Lanes::load(dout, p.dout, x.b, x.h, i, int(p.head_dim_v), args.aligned_dout, inside);
  Lanes::load(out, p.out, x.b, x.h, i, int(p.head_dim_v), args.aligned_out, inside);
  float delta = Lanes::dot(dout, out), high = kInfinity, low = 0;  // no edge: weights of 0
  if (!inside || !Lanes::leads()) return;
  const int64_t at = lse_at(p, x) + i;
  const double lse = load_global(p.lse + at);
  if (p.dlse) delta -= float(load_global(p.dlse + at));
  if (lse != -double(kInfinity)) {
    high = float(lse);
    low = float(lse - double(high));
  }
  store_global(args.stats + index, high);
  store_global(args.stats + index + count, low);
  store_global(args.stats + index + 2 * count, delta);
}

// Of one edge: its weight after dropout, the gradients of its logit and of its product.
struct EdgeGradient {
  float used, logit, product;
};
SACCADE_DEVICE EdgeGradient edge_gradient(const GatherArgs& args, uint64_t seed, const Head& x,
                                          const Edge& edge, const GatherStats& row, float product,
                                          float dproduct, int i, int j) {
  float slope;
  const float logit = edge_logit(args, edge, product, slope);
  const float weight =
      logit == -kInfinity ? 0.0f : exp2_approx(((logit - row.high) - row.low) * args.terms.factor);
  if (weight == 0) return {0, 0, 0};
  const float kept = !undropped(args, seed, x, i, j) ? 0.0f : args.terms.keep_scale;
  const float gradient = weight * ((kept == 0 ? 0.0f : dproduct * kept) - row.delta);
  return {weight * kept, gradient, gradient * slope};
}

// dQ, and the gradients of logits that edge_bias waits for.
template <typename T, int kDim>
SACCADE_KERNEL(kGatherThreads, kQueryBlocks)
gather_backward_queries(SACCADE_PARAM GatherArgs args) {
  using Lanes = Team<T, kDim>;
  const GatherParams& p = args.p;
  Item item;
  if (!item_of(args.queries, p.batch, p.heads, item)) return;
  const Head x = gather_head(p, item.b, item.h);
  const Band band = band_of(p.mask, args.terms, x);
  const int dim = int(p.head_dim), dim_v = int(p.head_dim_v);
  const int64_t head = int64_t(x.b) * p.heads + x.h;
  const uint64_t seed = args.terms.dropout ? seed_of(args) : 0;
  for_each_piece(args.queries, item.t, [&](const Piece& piece) {
    const int i = piece.row;
    typename Lanes::Loaded q, dout;
    typename Lanes::Row dq = {};
    Lanes::load(q, p.q, x.b, x.h, i, dim, args.aligned_q, true);
    Lanes::load(dout, p.dout, x.b, x.h, i, dim_v, args.aligned_dout, true);
    const GatherStats row = gather_stats(args, x, i);
    SACCADE_ROLLED
    for (int64_t first = piece.begin; first < piece.end; first += Lanes::kTeams) {
      const int64_t e = first + Lanes::index();
      const int j = e < piece.end ? load_global(p.indices + e) : 0;
      const Edge edge = e < piece.end ? edge_of(args, x, band, i, j, e) : Edge{false, 0};
      typename Lanes::Loaded k, v;
      Lanes::load(k, p.k, x.b, x.hk, j, dim, args.aligned_k, edge.kept);
      Lanes::load(v, p.v, x.b, x.hk, j, dim_v, args.aligned_v, edge.kept);
      const EdgeGradient g =
          edge_gradient(args, seed, x, edge, row, Lanes::dot(q, k), Lanes::dot(dout, v), i, j);
      if (args.edges && Lanes::leads() && e < piece.end)
        store_global(args.edges + head * p.edges + e, g.logit);
      Lanes::add(dq, k, g.product);
    }
    if (!(p.needs & kNeedQ)) return;
    Lanes::add_teams(dq);
    if (Lanes::index()) return;
    if (piece.first && piece.last)
      Lanes::store(dq, 1, p.dq, x.b, x.h, i, dim, args.aligned_dq);
    else
      Lanes::store_piece(dq, piece_at(args, args.queries, head, item.t, piece.first, kDim));
  });
}

// dK and dV of a key, summed over the query heads of its head.
template <typename T, int kDim>
SACCADE_KERNEL(kGatherThreads, kKeyBlocks)
gather_backward_keys(SACCADE_PARAM GatherArgs args) {
  using Lanes = Team<T, kDim>;
  const GatherParams& p = args.p;
  Item item;
  if (!item_of(args.keys, p.batch, p.heads_k, item)) return;
  const int b = item.b, hk = item.h, group = int(p.heads / p.heads_k);
  const int dim = int(p.head_dim), dim_v = int(p.head_dim_v);
  const uint64_t seed = args.terms.dropout ? seed_of(args) : 0;
  for_each_piece(args.keys, item.t, [&](const Piece& piece) {
    const int j = piece.row;
    typename Lanes::Loaded k, v;
    typename Lanes::Row dk = {}, dv = {};
    Lanes::load(k, p.k, b, hk, j, dim, args.aligned_k, true);
    Lanes::load(v, p.v, b, hk, j, dim_v, args.aligned_v, true);
    SACCADE_ROLLED
    for (int h = hk * group; h < (hk + 1) * group; ++h) {
      const Head x = gather_head(p, b, h);
      const Band band = band_of(p.mask, args.terms, x);
      SACCADE_ROLLED
      for (int64_t first = piece.begin; first < piece.end; first += Lanes::kTeams) {
        const int64_t e = first + Lanes::index();
        int i = 0;
        Edge edge{false, 0};
        if (e < piece.end) {
          i = load_global(p.t_rows + e);
          edge = edge_of(args, x, band, i, j, p.edge_bias ? load_global(p.t_edges + e) : 0);
        }
        typename Lanes::Loaded q, dout;
        Lanes::load(q, p.q, b, h, i, dim, args.aligned_q, edge.kept);
        Lanes::load(dout, p.dout, b, h, i, dim_v, args.aligned_dout, edge.kept);
        const EdgeGradient g = edge_gradient(args, seed, x, edge, gather_stats(args, x, i), Lanes::dot(q, k),
                                             Lanes::dot(dout, v), i, j);
        Lanes::add(dk, q, g.product);
        Lanes::add(dv, dout, g.used);
      }
    }
    Lanes::add_teams(dk);
    Lanes::add_teams(dv);
    if (Lanes::index()) return;
    if (!piece.first || !piece.last) {
      float* to = piece_at(args, args.keys, int64_t(b) * p.heads_k + hk, item.t, piece.first, 2 * kDim);
      Lanes::store_piece(dk, to);
      Lanes::store_piece(dv, to + kDim);
      return;
    }
    if (p.needs & kNeedK) Lanes::store(dk, 1, p.dk, b, hk, j, dim, args.aligned_dk);
    if (p.needs & kNeedV) Lanes::store(dv, 1, p.dv, b, hk, j, dim_v, args.aligned_dv);
  });
}

// The gradients of rows, or keys, that were cut: their pieces are added in their order.
template <typename T, int kDim, bool kKeys>
SACCADE_KERNEL(kGatherThreads, 1)
gather_sum(SACCADE_PARAM GatherArgs args) {
  const GatherParams& p = args.p;
  const Split& split = kKeys ? args.keys : args.queries;
  const int64_t heads = kKeys ? p.heads_k : p.heads;
  Item item;
  if (!item_of(split, p.batch, heads, item)) return;
  int64_t end;
  const int64_t row = cut_row(split, item.t, end);
  if (row < 0) return;
  constexpr int kWidth = kKeys ? 2 * kDim : kDim;
  SACCADE_ROLLED
  for (int at = thread_index() % 32 * 4; at < kWidth; at += 128) {
    float4 sum{0, 0, 0, 0};
    SACCADE_UNROLL_BY(4)
    for (int64_t t = item.t; t <= end; ++t) {
      const float* piece = piece_at(args, split, item.b * heads + item.h, t, t == item.t, kWidth);
      add_four(sum, load_global(reinterpret_cast<const float4*>(piece + at)), 1);
    }
    const bool values = at >= kDim;
    const Rows& to = values ? p.dv : kKeys ? p.dk : p.dq;
    if (!to.data) continue;
    const int column = at % kDim, dim = int(values ? p.head_dim_v : p.head_dim);
    store_four(rows_at<T>(to, item.b, item.h, row) + column * to.col, to.col, dim - column,
               values  ? args.aligned_dv
               : kKeys ? args.aligned_dk
                       : args.aligned_dq,
               sum);
  }
}

// The gradient of edge_bias: of each edge, summed over the batch and, where heads share it, over them.
SACCADE_KERNEL(kGatherThreads, 1)
gather_edge_bias(SACCADE_PARAM GatherArgs args) {
  const GatherParams& p = args.p;
  const int64_t index = block_index() * kGatherThreads + thread_index(), e = index % p.edges;
  const int64_t shared = p.edge_bias_head ? 1 : p.heads, h0 = index / p.edges * shared;
  if (h0 >= p.heads) return;
  float sum = 0;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = h0; h < h0 + shared; ++h)
      sum += load_global(args.edges + (b * p.heads + h) * p.edges + e);
  const int64_t id = p.edge_ids ? load_global(p.edge_ids + e) : e;
  store_global(static_cast<float*>(p.dedge_bias) + h0 * p.edge_bias_head + id, sum);
}

}  // namespace saccade
