// Forward and the weights in one pass. A block's tiles of unnormalised weights stay in cache, each with the
// maxima that it was formed against, until the row sums are known; then one sweep brings them to a common
// scale and adds them up over heads. The logits are formed once.
#pragma once
#include "tiled_weights.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// The tiles of one query block and head as they were left behind: S at [key][lane], from which key, against
// which maxima. `held` bounds their number: whole tiles of keys or of a graph, and the extra key.
template <typename T>
struct KeptTiles {
  T *S, *tops;
  int64_t *begin, *keys;
  int64_t count = 0;

  static int64_t held(const WeightParams& p) { return p.seqlen_k / kGraphTile + 3; }
  KeptTiles(const WeightParams& p, Arena& a)
      : S(a.take<T>(kBlockM * (p.columns + kRowPad))),
        tops(a.take<T>(kBlockM * held(p))),
        begin(a.take<int64_t>(held(p))),
        keys(a.take<int64_t>(held(p))) {}
  void keep(const KeyTile& t, const T* top, int64_t lanes) {
    memcpy(tops + count * kBlockM, top, size_t(lanes) * sizeof(T));
    begin[count] = t.j0;
    keys[count++] = t.n;
  }
};

// sums += the kept weights, normalised: `inverse` is what finish_block left, 1 / sum of each row.
template <typename T>
static void add_kept(const WeightParams& p, const QueryBlock& q, const KeptTiles<T>& kept, const T* m,
                     const T* inverse, T share, T* sums) {
  const T factor = exponent_factor<T>(p);
  alignas(64) T scale[kBlockM];
  for (int64_t x = 0; x < kept.count; ++x) {
    for (int64_t i = 0; i < q.lanes; i += kLanes<T>) {
      // A row that has met no key yet has weights of zero, whatever their scale.
      const Vec<T> top = load(kept.tops + x * kBlockM + i), last = load(m + i);
      const Vec<T> gap = top == -kInf<T> ? Vec<T>{} : top - last;
      store(scale + i, is_softmax(p) ? exp2v<T>(gap * factor) * load(inverse + i) * share : splat<T>(share));
    }
    const T* from = kept.S + kept.begin[x] * q.lanes;
    T* to = sums + kept.begin[x] * q.lanes;
    for (int64_t j = 0; j < kept.keys[x]; ++j, from += q.lanes, to += q.lanes)
      for (int64_t i = 0; i < q.lanes; i += kLanes<T>)
        store(to + i, load(to + i) + load(from + i) * load(scale + i));
  }
}

template <typename M>
static void forward_weights_item(const WeightParams& p, int64_t item, char* scratch, char*) {
  using T = typename M::T;
  const WeightsIndex at(p, item);
  const typename M::Scope scope;
  Arena arena{scratch};
  WeightBuffers<M> w(p, arena);
  KeptTiles<T> kept(p, arena);
  ForwardBuffers<M>& tile = w.tile;
  const T share = T(1) / T(at.end - at.begin);
  memset(w.sums, 0, size_t(kBlockM * p.columns) * sizeof(T));
  int64_t lanes = 0;
  for (int64_t h = at.begin; h < at.end; ++h) {
    const QueryBlock q = query_block<M::kPad>(p, at.b, h, at.m_block);
    lanes = q.lanes;
    kept.count = 0;
    const auto one_tile = [&](const KeyTile& t, typename M::B queries) {
      tile.S = kept.S + t.j0 * lanes;
      forward_tile<M>(p, q, t, queries, tile);
      kept.keep(t, tile.state.m, lanes);
    };
    forward_tiles<M>(p, q, {0, INT64_MAX}, true, tile, one_tile);
    finish_block<T>(p, q, tile.state, tile.alpha, tile.block);
    add_kept<T>(p, q, kept, tile.state.m, tile.alpha, share, w.sums);
    add_zero_column<M>(p, q, share, w.sums);
  }
  write_weights<M>(p, at, lanes, w);
}

template <typename M>
static Plan<WeightParams> forward_weights_plan(const WeightParams& p) {
  Plan<WeightParams> plan;
  Arena arena{nullptr};
  const WeightBuffers<M> sizes(p, arena);
  const KeptTiles<typename M::T> kept(p, arena);
  plan.scratch_bytes = arena.used;
  plan.add(WeightsIndex::items(p), &forward_weights_item<M>);
  return plan;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
