// The gather body forward: an online softmax over each row's edges.
#pragma once
#include "gather.h"

namespace saccade {

// Blocks that a multiprocessor holds at least: many warps hide the latency of their loads. As many as the
// registers allow without spilling.
constexpr int kForwardBlocks = 5;

// A piece of a row: maximum, sum, two numbers of padding, then the sums of values.
template <int kDim>
constexpr int kStateSize = kDim + 4;

// The softmax of a team, or of a row once the teams have met.
template <typename T, int kDim>
struct GatherState {
  using Lanes = Team<T, kDim>;
  float top = -kInfinity, total = 0;
  typename Lanes::Row sum = {};

  SACCADE_DEVICE_MEMBER void scale(float factor) {
    total *= factor;
    SACCADE_UNROLL
    for (int n = 0; n < Lanes::kNumbers; ++n) sum[n] *= factor;
  }
  // Raises the maximum; returns the pivot of what is weighed next.
  SACCADE_DEVICE_MEMBER float raise(float best, float factor) {
    const float pivot = best == -kInfinity ? 0.0f : best;  // -inf - -inf is NaN
    if (best != top) scale(exp2_approx((top - pivot) * factor));
    top = best;
    return pivot;
  }
  SACCADE_DEVICE_MEMBER void meet(float factor) {
    SACCADE_UNROLL
    for (int mask = Lanes::kLanes; mask < 32; mask *= 2) {
      raise(fmaxf(top, shuffle_xor(top, mask)), factor);
      total += shuffle_xor(total, mask);
      for (int n = 0; n < Lanes::kNumbers; ++n) sum[n] += shuffle_xor(sum[n], mask);
    }
  }
};

template <typename T, int kDim>
SACCADE_KERNEL(kGatherThreads, kForwardBlocks)
gather_forward(SACCADE_PARAM GatherArgs args) {
  using Lanes = Team<T, kDim>;
  constexpr int kEdges = Lanes::kEdges;
  const GatherParams& p = args.p;
  const float factor = args.terms.factor;
  Item item;
  if (!item_of(args.queries, p.batch, p.heads, item)) return;
  const Head x = gather_head(p, item.b, item.h);
  const Band band = band_of(p.mask, args.terms, x);
  const int dim = int(p.head_dim), dim_v = int(p.head_dim_v);
  const uint64_t seed = args.terms.dropout ? seed_of(args) : 0;
  for_each_piece(args.queries, item.t, [&](const Piece& piece) {
    const int i = piece.row;
    typename Lanes::Loaded q;
    Lanes::load(q, p.q, x.b, x.h, i, dim, args.aligned_q, true);
    GatherState<T, kDim> state;
    SACCADE_ROLLED
    for (int64_t first = piece.begin; first < piece.end; first += Lanes::kTeams * kEdges) {
      typename Lanes::Loaded k[kEdges], v[kEdges];
      Edge edge[kEdges];
      int j[kEdges];
      SACCADE_UNROLL
      for (int n = 0; n < kEdges; ++n) {
        const int64_t e = first + n * Lanes::kTeams + Lanes::index();
        j[n] = e < piece.end ? load_global(p.indices + e) : 0;
        edge[n] = e < piece.end ? edge_of(args, x, band, i, j[n], e) : Edge{false, 0};
        Lanes::load(k[n], p.k, x.b, x.hk, j[n], dim, args.aligned_k, edge[n].kept);
        Lanes::load(v[n], p.v, x.b, x.hk, j[n], dim_v, args.aligned_v, edge[n].kept);
      }
      float s[kEdges], best = state.top, slope;
      SACCADE_UNROLL
      for (int n = 0; n < kEdges; ++n) {
        s[n] = edge_logit(args, edge[n], Lanes::dot(q, k[n]), slope);
        best = fmaxf(best, s[n]);
      }
      const float pivot = state.raise(best, factor);
      SACCADE_UNROLL
      for (int n = 0; n < kEdges; ++n) {
        const float weight = exp2_approx((s[n] - pivot) * factor);
        state.total += weight;
        Lanes::add(state.sum, v[n], undropped(args, seed, x, i, j[n]) ? weight : 0);
      }
    }
    state.meet(factor);
    if (!piece.first || !piece.last) {
      if (Lanes::index()) return;
      float* to =
          piece_at(args, args.queries, int64_t(x.b) * p.heads + x.h, item.t, piece.first, kStateSize<kDim>);
      if (Lanes::leads()) {
        store_global(to, state.top);
        store_global(to + 1, state.total);
      }
      Lanes::store_piece(state.sum, to + 4);
      return;
    }
    float share;
    const double lse = finish_row(args.terms, state.top, state.total, sink_of(p, x.h), share);
    if (Lanes::index()) return;
    if (Lanes::leads()) store_global(p.lse + lse_at(p, x) + i, lse);
    Lanes::store(state.sum, share, p.out, x.b, x.h, i, dim_v, args.aligned_out);
  });
}

// The rows that were cut: a warp for each item in which one may begin.
template <typename T, int kDim>
SACCADE_KERNEL(kGatherThreads, kForwardBlocks)
gather_merge(SACCADE_PARAM GatherArgs args) {
  const GatherParams& p = args.p;
  const float factor = args.terms.factor;
  Item item;
  if (!item_of(args.queries, p.batch, p.heads, item)) return;
  int64_t end;
  const int64_t row = cut_row(args.queries, item.t, end);
  if (row < 0) return;
  const Head x = gather_head(p, item.b, item.h);
  const auto piece = [&](int64_t t) -> const float* {
    return piece_at(args, args.queries, int64_t(x.b) * p.heads + x.h, t, t == item.t, kStateSize<kDim>);
  };
  const int l = thread_index() % 32;
  float best = -kInfinity;
  for (int64_t t = item.t + l; t <= end; t += 32) best = fmaxf(best, load_global(piece(t)));
  for (int mask = 16; mask; mask /= 2) best = fmaxf(best, shuffle_xor(best, mask));
  const float pivot = best == -kInfinity ? 0.0f : best;
  SACCADE_ROLLED
  for (int column = l * 4; column < kDim; column += 128) {
    float total = 0;
    float4 sum{0, 0, 0, 0};
    SACCADE_UNROLL_BY(4)
    for (int64_t t = item.t; t <= end; ++t) {
      const float* at = piece(t);
      const float weight = exp2_approx((load_global(at) - pivot) * factor);
      total += load_global(at + 1) * weight;
      add_four(sum, load_global(reinterpret_cast<const float4*>(at + 4 + column)), weight);
    }
    float share;
    const double lse = finish_row(args.terms, best, total, sink_of(p, x.h), share);
    if (column == 0) store_global(p.lse + lse_at(p, x) + row, lse);
    store_four(rows_at<T>(p.out, x.b, x.h, row) + column * p.out.col, p.out.col, int(p.head_dim_v) - column,
               args.aligned_out, times(sum, share));
  }
}

}  // namespace saccade
