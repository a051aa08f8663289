// The tiled body backward on Hopper: a block owns keys of one key head and meets the queries of every head
// that reads them through a ring filled by TMA. The tile is held transposed, 64 keys a warpgroup, so that P
// and dS are left operands in registers for dV and dK. dQ, where it is wanted here, is added to global memory
// by the copy engine, in no fixed order; the deterministic mode leaves it to backward_queries_sm80.
#pragma once
#include <type_traits>

#include "backward_ring_sm90.h"

namespace saccade {

// Which sums a consumer warpgroup forms (BackwardShape90::kSplit).
enum class Role90 { kBoth, kValues, kKeys };

template <typename T, typename Shape, Role90 kRole>
struct BackwardConsumer90 {
  static constexpr int kHeadDim = Shape::kHeadDim, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN;
  static constexpr bool kWithQueries = Shape::kWithQueries, kFormsValues = kRole != Role90::kKeys,
                        kFormsKeys = kRole != Role90::kValues;
  // A tile is worked on in strips of 64 queries.
  static constexpr int kStrip = 64, kStrips = kBlockM / kStrip;
  using Tile = float[kStrip / 2];
  using Left = uint32_t[kStrip / 16][4];
  using Sums = float[kHeadDim / 2];
  const Backward90Args& args;
  const BackwardRing90<Shape>& ring;
  const KeyBlock90 block;
  // By a shuffle, so that the compiler knows it to be uniform and keeps descriptors in uniform registers.
  const int group =
      kRole == Role90::kBoth ? shuffle(thread_index() / 128, 0) - 1 : int(kRole == Role90::kKeys);
  const int thread = thread_index() % 128, lane = thread_index() % 32;
  const int group_row = Shape::kSplit ? 0 : group * 64;      // the first of this warpgroup's keys
  const int row0 = group_row + thread / 32 * 16 + lane / 4;  // key of the block; the other is row0 + 8
  QueryTiles<Shape> at;
  Tile s, dp;
  Sums dk, dv;
  float dq[Shape::kShare / 2];
  Left weights, grads;

  SACCADE_DEVICE_MEMBER BackwardConsumer90(const Backward90Args& a, const BackwardRing90<Shape>& memory,
                                           const KeyBlock90& mine)
      : args(a), ring(memory), block(mine), at(a.all, mine.b, mine.hk, mine.j0) {}

  SACCADE_DEVICE_MEMBER void group_sync() { named_barrier_sync(1 + group, 128); }
  SACCADE_DEVICE_MEMBER void consumers_sync() { named_barrier_sync(3, 256); }
  // Warps leave a wait one by one, so each gives a tile back for itself, once every lane has read its own.
  SACCADE_DEVICE_MEMBER void release(uint32_t barrier) {
    sync_warp();
    if (lane == 0) barrier_arrive(barrier);
  }

  // x = rows of this warpgroup in tile `a` times a strip of tile `b`, transposed.
  SACCADE_DEVICE_MEMBER void issue_tile(Tile& x, uint32_t a, uint32_t b) {
    const uint64_t left = matrix_descriptor(a + uint32_t(group_row) * 128, 16),
                   right = matrix_descriptor(b, 16);
    wgmma_fence();
    SACCADE_UNROLL
    for (int d = 0; d < kHeadDim / 16; ++d)
      wgmma_shared<T, kStrip, false>(x, left + uint64_t(d / 4 * kBlockN * 128 + d % 4 * 32) / 16,
                                     right + uint64_t(d / 4 * kBlockM * 128 + d % 4 * 32) / 16, d > 0);
    wgmma_commit();
  }
  // sums += left times a strip of tile `b`.
  SACCADE_DEVICE_MEMBER void issue_sum(Sums& sums, const Left& left, uint32_t b) {
    const uint64_t right = matrix_descriptor(b, kBlockM * 128);
    wgmma_hold(sums);
    wgmma_fence();
    SACCADE_UNROLL
    for (int i = 0; i < kStrip / 16; ++i)
      wgmma_registers<T, kHeadDim, true>(sums, left[i], right + uint64_t(i * 16 * 128) / 16, true);
    wgmma_commit();
  }

  // 0 x NaN is NaN: what TMA brought from rows that take no part is zeroed. Every warpgroup writes the same
  // zeros for itself.
  SACCADE_DEVICE_MEMBER void zero_rows(uint32_t tile, int rows, int begin, int end) {
    if (begin <= 0 && end >= rows) return;
    SACCADE_ROLLED
    for (int c = thread; c < rows * kHeadDim / 8; c += 128) {
      const int row = c / 8 % rows;
      if (row < begin || row >= end) store_shared(tile + uint32_t(c) * 16, uint4{0, 0, 0, 0});
    }
    async_fence();
  }
  // Keys that no query keeps, before dQ = dS K. Heads with bounds of their own may leave some between them.
  SACCADE_DEVICE_MEMBER void zero_dead_keys() {
    uint32_t alive = 0;  // bit n: some head keeps row thread / 8 + 16 n, of those that this thread would zero
    Head x = at.head;
    SACCADE_ROLLED
    for (x.h = block.hk * int(args.all.p.heads / args.all.p.heads_k); x.h <= at.last_head; ++x.h) {
      const Band band = band_of(args.all.p.mask, args.all.terms, x);
      const int begin = first_key(band, 0), end = end_key(band, x.seqlen_q - 1);
      SACCADE_UNROLL
      for (int n = 0; n < kBlockN / 16; ++n) {
        const int j = block.j0 + thread / 8 + 16 * n;
        if (j >= begin && j < end) alive |= 1u << n;
      }
    }
    SACCADE_ROLLED
    for (int n = 0; n < kBlockN * kHeadDim / 8 / 128; ++n)
      if (!(alive >> n % (kBlockN / 16) & 1))
        store_shared(ring.keys() + uint32_t(thread + n * 128) * 16, uint4{0, 0, 0, 0});
    async_fence();
    consumers_sync();
  }
  // In packed tensors the next sequence's queries follow. Here, too: the other warpgroup may be reading those
  // rows, for pairs that are masked.
  SACCADE_DEVICE_MEMBER void zero_beyond(uint32_t rows, const QueryTile& tile) {
    const int end = at.head.seqlen_q - tile.m * kBlockM;
    if (!args.all.p.cu_seqlens_q || end >= kBlockM) return;
    zero_rows(rows, kBlockM, 0, end);
    group_sync();
  }

  // The queries that each key of this warp reaches but for the band, in shared memory: numbers that only
  // tiles at an edge need.
  SACCADE_DEVICE_MEMBER void store_reach() {
    Band all = at.band;
    all.low = -(1 << 30), all.high = 1 << 30;
    if (lane % 4 == 0)
      for (int half = 0; half < 2; ++half) {
        const int key = row0 + half * 8, j = block.j0 + key;
        const uint2 reach{uint32_t(first_query(all, j)), uint32_t(end_query(all, j, at.head.seqlen_q))};
        store_shared(ring.reach(key), reach);
      }
    sync_warp();
  }
  // Pairs that are masked, to -inf, of which the weight is 0. `first`: the strip's first query of the tile.
  SACCADE_DEVICE_MEMBER void hide_scores(const QueryTile& tile, int first) {
    SACCADE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int j = block.j0 + row0 + half * 8, i0 = tile.m * kBlockM + first + lane % 4 * 2;
      const uint2 reach = load_shared<uint2>(ring.reach(row0 + half * 8));
      const int begin = most(j - tile.high + 1, int(reach.x)) - i0,
                end = least(j - tile.low + 1, int(reach.y)) - i0;
      SACCADE_UNROLL
      for (int t = 0; t < kStrip / 8; ++t)
        for (int c = 0; c < 2; ++c)
          if (t * 8 + c < begin || t * 8 + c >= end) s[4 * t + 2 * half + c] = -kInfinity;
    }
  }
  // S becomes the weights P, rounded in `weights`. Under softcap s keeps P times the slope of the cap, what
  // dP is to be multiplied by.
  template <bool kMasked, bool kCapped>
  SACCADE_DEVICE_MEMBER void weigh_as(const QueryTile& tile, uint32_t n, int first) {
    const Terms& terms = args.all.terms;
    if (kMasked) hide_scores(tile, first);
    SACCADE_UNROLL
    for (int t = 0; t < kStrip / 8; ++t) {
      const int column = first + t * 8 + lane % 4 * 2;
      float high[2];
      for (int c = 0; c < 2; ++c) high[c] = load_shared<float>(ring.highs(n) + uint32_t(column + c) * 4);
      SACCADE_UNROLL
      for (int half = 0; half < 2; ++half) {
        float weight[2], *products = s + 4 * t + 2 * half;
        SACCADE_UNROLL
        for (int c = 0; c < 2; ++c) {
          const bool kept = !kMasked || !kCapped || products[c] != -kInfinity;
          const float cap = kCapped ? tanh_of(terms.per_cap * products[c]) : 0;
          const float exponent = kCapped ? (terms.softcap * cap - high[c]) * terms.factor
                                         : fmaf(products[c], terms.factor, -high[c]);
          weight[c] = kept ? exp2_approx(exponent) : 0.0f;
          products[c] = kCapped ? weight[c] * (1 - cap * cap) : weight[c];
        }
        weights[t / 2][t % 2 * 2 + half] = pack<T>(weight[0], weight[1]);
      }
    }
  }
  template <bool kMasked>
  SACCADE_DEVICE_MEMBER void weigh(const QueryTile& tile, uint32_t n, int first = 0) {
    if (args.all.terms.softcap == 0)
      weigh_as<kMasked, false>(tile, n, first);
    else
      weigh_as<kMasked, true>(tile, n, first);
  }
  // dP to dS, rounded. A weight of 0 has no gradient, whatever stands in its key.
  SACCADE_DEVICE_MEMBER void differentiate(uint32_t n, int first = 0) {
    SACCADE_UNROLL
    for (int t = 0; t < kStrip / 8; ++t) {
      float delta[2];
      for (int c = 0; c < 2; ++c)
        delta[c] = load_shared<float>(ring.deltas(n) + uint32_t(first + t * 8 + lane % 4 * 2 + c) * 4);
      SACCADE_UNROLL
      for (int e = 4 * t; e < 4 * t + 4; ++e) dp[e] = s[e] == 0 ? 0.0f : s[e] * (dp[e] - delta[e % 2]);
    }
    SACCADE_UNROLL
    for (int j = 0; j < kStrip / 16; ++j)
      for (int i = 0; i < 4; ++i) grads[j][i] = pack<T>(dp[8 * j + 2 * i], dp[8 * j + 2 * i + 1]);
  }

  // Where in a panel of 64 columns two numbers of this thread lie, under the swizzle: those of 16-byte chunk
  // t. Both rows of a thread have the same place among eight, so one exclusive or on a sum of aligned parts
  // will do.
  SACCADE_DEVICE_MEMBER uint32_t entry(uint32_t panel, int t, int half) const {
    const uint32_t first = panel + uint32_t(row0) * 128 + uint32_t(lane / 4) * 16 + uint32_t(lane % 4) * 4;
    return (first ^ uint32_t(t) * 16) + uint32_t(half) * 8 * 128;
  }
  // dS to shared memory, for dQ; a strip is a panel.
  SACCADE_DEVICE_MEMBER void store_grads(int strip = 0) {
    SACCADE_UNROLL
    for (int t = 0; t < kStrip / 8; ++t)
      for (int half = 0; half < 2; ++half)
        store_shared(entry(ring.grads() + uint32_t(strip * kBlockN) * 128, t, half),
                     grads[t / 2][t % 2 * 2 + half]);
    async_fence();
  }
  // This warpgroup's share of dQ = dS K, once dS is there.
  SACCADE_DEVICE_MEMBER void issue_queries() {
    consumers_sync();
    // Panels of 64 queries, or of 64 columns.
    const int query_panel = Shape::kShareRows ? group : 0,
              panel = Shape::kShareRows ? 0 : group * Shape::kShare / 64;
    const uint64_t left = matrix_descriptor(ring.grads() + uint32_t(query_panel * kBlockN) * 128, 16);
    const uint64_t right = matrix_descriptor(ring.keys() + uint32_t(panel * kBlockN) * 128, kBlockN * 128);
    wgmma_fence();
    SACCADE_UNROLL
    for (int j = 0; j < kBlockN / 16; ++j)
      wgmma_shared<T, Shape::kShare, true, true>(dq, left + uint64_t(j * 16 * 128) / 16,
                                                 right + uint64_t(j * 16 * 128) / 16, j > 0);
    wgmma_commit();
  }
  SACCADE_DEVICE_MEMBER void add_queries(const QueryTile& tile) {
    wgmma_wait<0>();
    wgmma_hold(dq);
    Head x = at.head;
    x.h = tile.h;
    float* to =
        args.dq + (row_of(args.all, x) + int64_t(tile.m) * kBlockM) * kHeadDim + group * 64 * Shape::kShare;
    SACCADE_UNROLL
    for (int part = 0; part < Shape::kShare / Shape::kPart; ++part) {
      const uint32_t slot = ring.slot(group, part % Shape::kSlots);
      if (thread == 0) bulk_wait_read<Shape::kSlots - 1>();
      group_sync();
      SACCADE_UNROLL
      for (int i = 0; i < Shape::kPart / 8; ++i) {
        const float* four = dq + part * Shape::kPart / 2 + 4 * i;
        store_shared(slot + uint32_t(i * 128 + thread) * 16, float4{four[0], four[1], four[2], four[3]});
      }
      async_fence();
      group_sync();
      if (thread == 0) {
        bulk_reduce_add(to + part * 64 * Shape::kPart, slot, Shape::kPartBytes);
        bulk_commit();
      }
    }
  }

  // The end of a step: dQ on its way, then the sums that this warpgroup forms.
  SACCADE_DEVICE_MEMBER void finish(const QueryTile& tile, uint32_t n) {
    if constexpr (kWithQueries) issue_queries();
    wgmma_wait<kWithQueries ? 1 : 0>();
    if constexpr (kFormsValues) {
      wgmma_hold(dv);
      release(ring.douts_empty(n));
    }
    if constexpr (kFormsKeys) {
      wgmma_hold(dk);
      release(ring.queries_empty(n));
    }
    if constexpr (kWithQueries) add_queries(tile);
  }

  // Up to head_dim 128: dV and dK of 64 keys in each warpgroup.
  template <bool kMasked>
  SACCADE_DEVICE_MEMBER void step_both(const QueryTile& tile, uint32_t n) {
    SACCADE_UNROLL
    for (int strip = 0; strip < kStrips; ++strip) {
      const int first = strip * kStrip;
      const uint32_t queries = ring.queries(n) + uint32_t(first) * 128,
                     douts = ring.douts(n) + uint32_t(first) * 128;
      if (strip == 0) ring.wait_queries(n);
      issue_tile(s, ring.keys(), queries);
      if (strip == 0) ring.wait_douts(n);
      issue_tile(dp, ring.values(), douts);
      wgmma_wait<1>();
      wgmma_hold(s);
      weigh<kMasked>(tile, n, first);
      wgmma_wait<0>();
      wgmma_hold(dp);
      if (strip == 0) zero_beyond(ring.queries(n), tile);
      if (strip == 0) zero_beyond(ring.douts(n), tile);
      issue_sum(dv, weights, douts);
      differentiate(n, first);
      issue_sum(dk, grads, queries);
      if (kWithQueries && strip == 0) consumers_sync();  // both have read the last tile's dS
      if constexpr (kWithQueries) store_grads(strip);
    }
    finish(tile, n);
  }

  // At head_dim 256 the first warpgroup forms S and dV, the second dP and dK. Weights go over in fp32, each
  // number from a thread to its counterpart, through the slots that the first one's dQ passes later.
  SACCADE_DEVICE_MEMBER uint32_t place(int four) const {
    return ring.slot(0, 0) + uint32_t(four * 128 + thread) * 16;
  }
  SACCADE_DEVICE_MEMBER void send_weights(uint32_t n) {
    // The second has read the last tile's: it has said so with dS, or does so where there is no dQ.
    if (!kWithQueries && n > 0) named_barrier_sync(5, 256);
    if (kWithQueries && thread == 0) bulk_wait_read<0>();
    if (kWithQueries) group_sync();
    SACCADE_UNROLL
    for (int t = 0; t < kStrip / 8; ++t)
      store_shared(place(t), float4{s[4 * t], s[4 * t + 1], s[4 * t + 2], s[4 * t + 3]});
    named_barrier_arrive(4, 256);
  }
  SACCADE_DEVICE_MEMBER void receive_weights() {
    named_barrier_sync(4, 256);
    SACCADE_UNROLL
    for (int t = 0; t < kStrip / 8; ++t) {
      const float4 four = load_shared<float4>(place(t));
      s[4 * t] = four.x, s[4 * t + 1] = four.y, s[4 * t + 2] = four.z, s[4 * t + 3] = four.w;
    }
    if (!kWithQueries && at.valid()) named_barrier_arrive(5, 256);
  }
  template <bool kMasked>
  SACCADE_DEVICE_MEMBER void step_values(const QueryTile& tile, uint32_t n) {
    ring.wait_queries(n);
    issue_tile(s, ring.keys(), ring.queries(n));
    wgmma_wait<0>();
    wgmma_hold(s);
    weigh<kMasked>(tile, n);
    release(ring.queries_empty(n));
    send_weights(n);
    ring.wait_douts(n);
    zero_beyond(ring.douts(n), tile);
    issue_sum(dv, weights, ring.douts(n));
    finish(tile, n);
  }
  SACCADE_DEVICE_MEMBER void step_keys(const QueryTile& tile, uint32_t n) {
    ring.wait_douts(n);
    issue_tile(dp, ring.values(), ring.douts(n));
    receive_weights();
    wgmma_wait<0>();
    wgmma_hold(dp);
    differentiate(n);
    release(ring.douts_empty(n));
    ring.wait_queries(n);
    zero_beyond(ring.queries(n), tile);
    issue_sum(dk, grads, ring.queries(n));
    if constexpr (kWithQueries) store_grads();
    finish(tile, n);
  }

  SACCADE_DEVICE_MEMBER void run() {
    const BackwardArgs& all = args.all;
    SACCADE_UNROLL
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0;
    barrier_wait(ring.keys_full(), 0);
    if constexpr (kFormsValues) store_reach();
    if constexpr (kWithQueries) zero_dead_keys();
    for (uint32_t n = 0; at.valid(); ++n) {
      const QueryTile tile = at.tile();
      at.next();
      if constexpr (kRole == Role90::kKeys)
        step_keys(tile, n);  // the weights come masked
      else if constexpr (kRole == Role90::kValues)
        tile.whole ? step_values<false>(tile, n) : step_values<true>(tile, n);
      else
        tile.whole ? step_both<false>(tile, n) : step_both<true>(tile, n);
    }
    consumers_sync();  // both have read their keys and values
    if (kFormsKeys) {
      SACCADE_UNROLL
      for (int i = 0; i < kHeadDim / 2; ++i) dk[i] *= all.terms.scale;
      store(ring.keys(), dk, all.p.dk, int(all.p.head_dim), all.aligned_dk);
    }
    if (kFormsValues) store(ring.values(), dv, all.p.dv, int(all.p.head_dim_v), all.aligned_dv);
    if (thread == 0) bulk_wait<0>();
  }

  // Through this warpgroup's rows of a tile that nobody needs any more.
  SACCADE_DEVICE_MEMBER void store(uint32_t tile, const Sums& sums, const Rows& to, int dim, bool aligned) {
    if (!to.data) return;
    SACCADE_UNROLL
    for (int t = 0; t < kHeadDim / 8; ++t)
      for (int half = 0; half < 2; ++half)
        store_shared(entry(tile + uint32_t(t / 8 * kBlockN) * 128, t % 8, half),
                     pack<T>(sums[4 * t + 2 * half], sums[4 * t + 2 * half + 1]));
    group_sync();
    // Again, rather than kept in registers.
    const Head head = head_of(args.all.p, args.all.terms, block.b, block.hk);
    T* base = rows_at<T>(to, block.b, block.hk, head.k_begin);
    SACCADE_ROLLED
    for (int c = thread; c < 64 * kHeadDim / 8; c += 128) {
      const int row = group_row + c / 8 % 64, panel = c / (8 * 64), column = panel * 64 + c % 8 * 8,
                j = block.j0 + row;
      if (j >= head.seqlen_k || column >= dim) continue;
      const uint32_t from = tile + uint32_t(panel * kBlockN + row) * 128 + uint32_t(c % 8 ^ (row & 7)) * 16;
      T* out = base + j * to.row + column * to.col;
      if (aligned && column + 8 <= dim) {
        store_global(reinterpret_cast<uint4*>(out), load_shared<uint4>(from));
        continue;
      }
      SACCADE_ROLLED
      for (int e = 0; e < 8 && column + e < dim; ++e)
        store_global(out + e * to.col, load_shared<T>(from + uint32_t(e) * 2));
    }
  }
};

template <typename T, typename Shape>
SACCADE_KERNEL(Shape::kThreads, 1)
backward_sm90(SACCADE_PARAM Backward90Args args) {
  const BackwardRing90<Shape> ring{(shared_memory() + 1023) & ~1023u};
  const KeyBlock90 block = key_block_of(args.all, Shape::kBlockN);
  if (block.j0 >= head_of(args.all.p, args.all.terms, block.b, block.hk).seqlen_k) return;
  if (thread_index() == 0) {
    for (const TensorMap* map : {&args.q, &args.k, &args.v, &args.dout}) prefetch_map(map);
    barrier_init(ring.keys_full(), 1);
    for (int n = 0; n < Shape::kQueryStages; ++n) barrier_init(ring.queries_full(n), 1);
    for (int n = 0; n < Shape::kDoutStages; ++n) barrier_init(ring.douts_full(n), 1);
    for (int n = 0; n < Shape::kQueryStages; ++n) barrier_init(ring.queries_empty(n), Shape::kConsumers * 4);
    for (int n = 0; n < Shape::kDoutStages; ++n) barrier_init(ring.douts_empty(n), Shape::kConsumers * 4);
    barrier_init_fence();
  }
  sync_threads();
  if (thread_index() < 128) {
    registers_shrink<24>();
    if (thread_index() == 0) produce<Shape>(args, ring, block);
    return;
  }
  registers_grow<240>();
  if constexpr (!Shape::kSplit)
    BackwardConsumer90<T, Shape, Role90::kBoth>(args, ring, block).run();
  else if (thread_index() < 256)
    BackwardConsumer90<T, Shape, Role90::kValues>(args, ring, block).run();
  else
    BackwardConsumer90<T, Shape, Role90::kKeys>(args, ring, block).run();
}

}  // namespace saccade
