// The tiled body backward on Hopper: a block owns 128 keys of one key head, two warpgroups of 64, and meets
// the queries of every head that reads them through a ring filled by TMA. The tile is held transposed, so
// that P and dS are left operands in registers for dV and dK. dQ, where it is wanted here, is added to global
// memory by the copy engine, in no fixed order; the deterministic mode leaves it to backward_queries_sm80.
#pragma once
#include <type_traits>

#include "backward.h"

namespace saccade {

template <int kSize, bool kAddsQueries>
struct BackwardShape90 {
  static constexpr bool kWithQueries = kAddsQueries;  // dQ too
  static constexpr int kHeadDim = kSize, kConsumers = 2, kStages = 2;
  static constexpr int kBlockN = 128, kBlockM = 64, kThreads = 384;
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kShare = kHeadDim / 2;  // the columns of dQ that a warpgroup forms
  static constexpr int kKeyBytes = kBlockN * kHeadDim * 2, kQueryBytes = kBlockM * kHeadDim * 2;
  static constexpr int kGradBytes = kBlockN * kBlockM * 2, kShareBytes = kBlockM * kShare * 4;
  static constexpr int kStage = 2 * kKeyBytes, kGrads = kStage + 2 * kStages * kQueryBytes;
  static constexpr int kShares = kGrads + kGradBytes, kRows = kShares + 2 * kShareBytes;
  static constexpr int kBarriers = kRows + kStages * 2 * kBlockM * 4;
  static constexpr int kSharedBytes = kBarriers + 8 * (1 + 3 * kStages) + 1024;  // the last for alignment
  static_assert(kSharedBytes <= 227 << 10, "the shared memory of sm_90");
};

struct Backward90Args {
  TensorMap q, k, v, dout;
  BackwardArgs all;
  float* dq;  // sums in fp32, a tile after the other, each as the warpgroups hold it; null: dQ is not wanted
              // here
};

template <typename Shape>
struct BackwardRing90 {
  uint32_t base;
  SACCADE_DEVICE_MEMBER uint32_t keys() const { return base; }
  SACCADE_DEVICE_MEMBER uint32_t values() const { return base + Shape::kKeyBytes; }
  SACCADE_DEVICE_MEMBER uint32_t queries(int s) const {
    return base + Shape::kStage + uint32_t(2 * s) * Shape::kQueryBytes;
  }
  SACCADE_DEVICE_MEMBER uint32_t douts(int s) const { return queries(s) + Shape::kQueryBytes; }
  SACCADE_DEVICE_MEMBER uint32_t grads() const { return base + Shape::kGrads; }
  SACCADE_DEVICE_MEMBER uint32_t share(int group) const {
    return base + Shape::kShares + uint32_t(group) * Shape::kShareBytes;
  }
  SACCADE_DEVICE_MEMBER uint32_t highs(int s) const {
    return base + Shape::kRows + uint32_t(2 * s) * Shape::kBlockM * 4;
  }
  SACCADE_DEVICE_MEMBER uint32_t deltas(int s) const { return highs(s) + Shape::kBlockM * 4; }
  SACCADE_DEVICE_MEMBER uint32_t barrier(int i) const { return base + Shape::kBarriers + uint32_t(i) * 8; }
  SACCADE_DEVICE_MEMBER uint32_t keys_full() const { return barrier(0); }
  SACCADE_DEVICE_MEMBER uint32_t queries_full(int s) const { return barrier(1 + s); }
  SACCADE_DEVICE_MEMBER uint32_t douts_full(int s) const { return barrier(1 + Shape::kStages + s); }
  SACCADE_DEVICE_MEMBER uint32_t empty(int s) const { return barrier(1 + 2 * Shape::kStages + s); }
};

// Where a block works: all heads' first keys, which a causal mask gives most to do, come first.
struct KeyBlock90 {
  int b, hk, j0;
};
SACCADE_DEVICE KeyBlock90 key_block_of(const BackwardArgs& args, int block_n) {
  const int64_t heads = args.p.batch * args.p.heads_k, head = block_index() % heads;
  return {int(head / args.p.heads_k), int(head % args.p.heads_k), int(block_index() / heads) * block_n};
}

template <typename Shape>
SACCADE_DEVICE void produce(const Backward90Args& args, const BackwardRing90<Shape>& ring,
                            const KeyBlock90& block) {
  const BackwardArgs& all = args.all;
  QueryTiles<Shape> at(all, block.b, block.hk, block.j0);
  const int b = all.p.cu_seqlens_q ? 0 : block.b;
  const auto load = [&](const TensorMap& map, uint32_t tile, uint32_t full, int rows, int row, int head) {
    for (int panel = 0; panel < Shape::kPanels; ++panel)
      tma_load(tile + uint32_t(panel * rows) * 128, &map, full, panel * 64, row, head, b);
  };
  const int key = int(at.head.k_begin) + block.j0;
  barrier_expect(ring.keys_full(), 2 * Shape::kKeyBytes);
  load(args.k, ring.keys(), ring.keys_full(), Shape::kBlockN, key, block.hk);
  load(args.v, ring.values(), ring.keys_full(), Shape::kBlockN, key, block.hk);
  uint32_t parity = 0;
  for (int s = 0; at.valid(); at.next()) {
    const int row = int(at.head.q_begin) + at.m * Shape::kBlockM;
    const float* rows = all.rows + row_of(all, at.head) + at.m * Shape::kBlockM;
    barrier_wait(ring.empty(s), parity ^ 1);
    barrier_expect(ring.queries_full(s), Shape::kQueryBytes + Shape::kBlockM * 4);
    load(args.q, ring.queries(s), ring.queries_full(s), Shape::kBlockM, row, at.head.h);
    bulk_load(ring.highs(s), rows, ring.queries_full(s), Shape::kBlockM * 4);
    barrier_expect(ring.douts_full(s), Shape::kQueryBytes + Shape::kBlockM * 4);
    load(args.dout, ring.douts(s), ring.douts_full(s), Shape::kBlockM, row, at.head.h);
    bulk_load(ring.deltas(s), rows + 2 * all.row_count, ring.douts_full(s), Shape::kBlockM * 4);
    s ^= 1;
    parity ^= uint32_t(s == 0);
  }
}

template <typename T, typename Shape>
struct BackwardConsumer90 {
  static constexpr int kHeadDim = Shape::kHeadDim, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN;
  const Backward90Args& args;
  const BackwardRing90<Shape>& ring;
  const KeyBlock90 block;
  const int group = thread_index() / 128 - 1, thread = thread_index() % 128, lane = thread_index() % 32;
  const int row0 = group * 64 + thread / 32 * 16 + lane / 4;  // key of the block; the other is row0 + 8
  QueryTiles<Shape> at;
  float s[kBlockM / 2], dp[kBlockM / 2], dk[kHeadDim / 2], dv[kHeadDim / 2], dq[Shape::kShare / 2];
  uint32_t weights[kBlockM / 16][4], grads[kBlockM / 16][4];

  SACCADE_DEVICE_MEMBER BackwardConsumer90(const Backward90Args& a, const BackwardRing90<Shape>& memory,
                                           const KeyBlock90& mine)
      : args(a), ring(memory), block(mine), at(a.all, mine.b, mine.hk, mine.j0) {}

  SACCADE_DEVICE_MEMBER void group_sync() { named_barrier_sync(1 + group, 128); }
  SACCADE_DEVICE_MEMBER void consumers_sync() { named_barrier_sync(3, 256); }

  // x = rows of this warpgroup in tile `a` times the rows of tile `b`, transposed.
  SACCADE_DEVICE_MEMBER void issue_tile(float (&x)[kBlockM / 2], uint32_t a, uint32_t b) {
    const uint64_t left = matrix_descriptor(a + uint32_t(group) * 64 * 128, 16),
                   right = matrix_descriptor(b, 16);
    wgmma_fence();
    SACCADE_UNROLL
    for (int d = 0; d < kHeadDim / 16; ++d)
      wgmma_shared<T, kBlockM, false>(x, left + uint64_t(d / 4 * kBlockN * 128 + d % 4 * 32) / 16,
                                      right + uint64_t(d / 4 * kBlockM * 128 + d % 4 * 32) / 16, d > 0);
    wgmma_commit();
  }
  // sums += left times the rows of tile `b`.
  SACCADE_DEVICE_MEMBER void issue_sum(float (&sums)[kHeadDim / 2], const uint32_t (&left)[kBlockM / 16][4],
                                       uint32_t b) {
    const uint64_t right = matrix_descriptor(b, kBlockM * 128);
    wgmma_hold(sums);
    wgmma_fence();
    SACCADE_UNROLL
    for (int i = 0; i < kBlockM / 16; ++i)
      wgmma_registers<T, kHeadDim, true>(sums, left[i], right + uint64_t(i * 16 * 128) / 16, true);
    wgmma_commit();
  }
  SACCADE_DEVICE_MEMBER void round_to(const float (&x)[kBlockM / 2], uint32_t (&to)[kBlockM / 16][4]) {
    SACCADE_UNROLL
    for (int j = 0; j < kBlockM / 16; ++j)
      for (int i = 0; i < 4; ++i) to[j][i] = pack<T>(x[8 * j + 2 * i], x[8 * j + 2 * i + 1]);
  }

  // 0 x NaN is NaN: what TMA brought from rows that take no part is zeroed.
  SACCADE_DEVICE_MEMBER void zero_rows(uint32_t tile, int rows, int begin, int end) {
    if (begin <= 0 && end >= rows) return;
    SACCADE_ROLLED
    for (int c = thread; c < rows * kHeadDim / 8; c += 128) {
      const int row = c / 8 % rows;
      if (row < begin || row >= end) store_shared(tile + uint32_t(c) * 16, uint4{0, 0, 0, 0});
    }
    async_fence();
  }

  template <bool kMasked>
  SACCADE_DEVICE_MEMBER void weigh(const QueryTile& tile, int stage) {
    const float factor = args.all.terms.factor;
    SACCADE_UNROLL
    for (int n = 0; n < kBlockM / 8; ++n)
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + lane % 4 * 2 + c, i = tile.m * kBlockM + column;
        const float high = load_shared<float>(ring.highs(stage) + uint32_t(column) * 4);
        SACCADE_UNROLL
        for (int half = 0; half < 2; ++half) {
          float& x = s[4 * n + 2 * half + c];
          const bool kept =
              !kMasked || (i < at.head.seqlen_q && band_keeps(tile.band, i, block.j0 + row0 + half * 8));
          x = kept ? exp2_approx(fmaf(x, factor, -high)) : 0.0f;
        }
      }
  }
  SACCADE_DEVICE_MEMBER void differentiate(int stage) {
    SACCADE_UNROLL
    for (int n = 0; n < kBlockM / 8; ++n)
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + lane % 4 * 2 + c;
        const float delta = load_shared<float>(ring.deltas(stage) + uint32_t(column) * 4);
        for (int e = 4 * n + c; e < 4 * n + 4; e += 2) dp[e] = s[e] == 0 ? 0.0f : s[e] * (dp[e] - delta);
      }
  }

  // This warpgroup's share of dQ = dS K, dS from the shared memory that both have written.
  SACCADE_DEVICE_MEMBER void issue_queries() {
    SACCADE_UNROLL
    for (int n = 0; n < kBlockM / 8; ++n)
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = uint32_t(row0 + half * 8);
        store_shared(ring.grads() + row * 128 + (uint32_t(n % 8) ^ (row & 7)) * 16 + uint32_t(lane % 4) * 4,
                     grads[n / 2][n % 2 * 2 + half]);
      }
    async_fence();
    consumers_sync();
    const int column = group * Shape::kShare;
    const uint64_t left = matrix_descriptor(ring.grads(), 16);
    const uint64_t right = matrix_descriptor(
        ring.keys() + uint32_t(column / 64 * kBlockN) * 128 + uint32_t(column % 64) * 2, 16);
    wgmma_fence();
    SACCADE_UNROLL
    for (int j = 0; j < kBlockN / 16; ++j)
      wgmma_shared<T, Shape::kShare, true, true>(dq, left + uint64_t(j * 16 * 128) / 16,
                                                 right + uint64_t(j * 16 * 128) / 16, j > 0);
    wgmma_commit();
  }
  SACCADE_DEVICE_MEMBER void add_queries(const Head& x, int m) {
    if (thread == 0) bulk_wait_read<0>();
    group_sync();
    SACCADE_UNROLL
    for (int i = 0; i < Shape::kShare / 8; ++i)
      for (int e = 0; e < 4; ++e)
        store_shared(ring.share(group) + uint32_t((i * 128 + thread) * 4 + e) * 4, dq[4 * i + e]);
    async_fence();
    group_sync();
    if (thread == 0) {
      float* to =
          args.dq + (row_of(args.all, x) + int64_t(m) * kBlockM) * kHeadDim + group * kBlockM * Shape::kShare;
      bulk_reduce_add(to, ring.share(group), Shape::kShareBytes);
      bulk_commit();
    }
  }

  template <bool kMasked>
  SACCADE_DEVICE_MEMBER void step(const QueryTile& tile, int stage, uint32_t parity) {
    Head x = at.head;
    x.h = tile.h;
    barrier_wait(ring.queries_full(stage), parity);
    issue_tile(s, ring.keys(), ring.queries(stage));
    barrier_wait(ring.douts_full(stage), parity);
    issue_tile(dp, ring.values(), ring.douts(stage));
    wgmma_wait<1>();
    wgmma_hold(s);
    weigh<kMasked>(tile, stage);
    round_to(s, weights);
    wgmma_wait<0>();
    wgmma_hold(dp);
    if (args.all.p.cu_seqlens_q && (tile.m + 1) * kBlockM > x.seqlen_q) {
      // The next sequence's queries follow in memory.
      consumers_sync();
      zero_rows(ring.queries(stage), kBlockM, 0, x.seqlen_q - tile.m * kBlockM);
      zero_rows(ring.douts(stage), kBlockM, 0, x.seqlen_q - tile.m * kBlockM);
      consumers_sync();
    }
    issue_sum(dv, weights, ring.douts(stage));
    differentiate(stage);
    round_to(dp, grads);
    issue_sum(dk, grads, ring.queries(stage));
    if constexpr (Shape::kWithQueries) issue_queries();
    wgmma_wait<Shape::kWithQueries ? 1 : 0>();
    wgmma_hold(dv);
    wgmma_hold(dk);
    if (lane == 0) barrier_arrive(ring.empty(stage));
    if constexpr (Shape::kWithQueries) {
      wgmma_wait<0>();
      wgmma_hold(dq);
      add_queries(x, tile.m);
      consumers_sync();  // both have read dS
    }
  }

  SACCADE_DEVICE_MEMBER void run() {
    SACCADE_UNROLL
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0;
    const int seqlen_k = at.head.seqlen_k;
    const int64_t k_begin = at.head.k_begin;
    barrier_wait(ring.keys_full(), 0);
    if constexpr (Shape::kWithQueries) {  // keys that no query keeps
      const int begin = at.band.low - block.j0;
      const int end = least(at.band.keys, at.head.seqlen_q - 1 + at.band.high) - block.j0;
      zero_rows(ring.keys(), kBlockN, begin, end);
      consumers_sync();
    }
    uint32_t parity = 0;
    for (int stage = 0; at.valid();) {
      const QueryTile tile = at.tile();
      at.next();
      if (tile.whole)
        step<false>(tile, stage, parity);
      else
        step<true>(tile, stage, parity);
      stage ^= 1;
      parity ^= uint32_t(stage == 0);
    }
    const BackwardArgs& all = args.all;
    SACCADE_UNROLL
    for (int i = 0; i < kHeadDim / 2; ++i) dk[i] *= all.terms.unit;
    consumers_sync();  // both have read their keys and values
    if (all.p.dk.data)
      store(ring.keys(), dk, all.p.dk, k_begin, seqlen_k, int(all.p.head_dim), all.aligned_dk);
    if (all.p.dv.data)
      store(ring.values(), dv, all.p.dv, k_begin, seqlen_k, int(all.p.head_dim_v), all.aligned_dv);
    if (thread == 0) bulk_wait<0>();
  }

  // Through this warpgroup's rows of a tile that nobody needs any more.
  SACCADE_DEVICE_MEMBER void store(uint32_t tile, const float (&sums)[kHeadDim / 2], const Rows& to,
                                   int64_t begin, int seqlen_k, int dim, bool aligned) {
    SACCADE_UNROLL
    for (int t = 0; t < kHeadDim / 8; ++t)
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = uint32_t(row0 + half * 8),
                       line = tile + uint32_t(t / 8 * kBlockN) * 128 + row * 128;
        store_shared(line + (uint32_t(t % 8) ^ (row & 7)) * 16 + uint32_t(lane % 4) * 4,
                     pack<T>(sums[4 * t + 2 * half], sums[4 * t + 2 * half + 1]));
      }
    group_sync();
    T* base = rows_at<T>(to, block.b, block.hk, begin);
    SACCADE_ROLLED
    for (int c = thread; c < 64 * kHeadDim / 8; c += 128) {
      const int row = group * 64 + c / 8 % 64, panel = c / (8 * 64), column = panel * 64 + c % 8 * 8,
                j = block.j0 + row;
      if (j >= seqlen_k || column >= dim) continue;
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
  if (block.j0 >= head_of(args.all.p, block.b, block.hk).seqlen_k) return;
  if (thread_index() == 0) {
    for (const TensorMap* map : {&args.q, &args.k, &args.v, &args.dout}) prefetch_map(map);
    barrier_init(ring.keys_full(), 1);
    for (int s = 0; s < Shape::kStages; ++s) {
      barrier_init(ring.queries_full(s), 1);
      barrier_init(ring.douts_full(s), 1);
      barrier_init(ring.empty(s), Shape::kConsumers * 4);
    }
    barrier_init_fence();
  }
  sync_threads();
  if (thread_index() < 128) {
    registers_shrink<24>();
    if (thread_index() == 0) produce<Shape>(args, ring, block);
    return;
  }
  registers_grow<240>();
  BackwardConsumer90<T, Shape> consumer(args, ring, block);
  consumer.run();
}

// dQ from its sums: each thread takes what one thread of a warpgroup held.
template <typename T, typename Shape>
SACCADE_KERNEL(256, 1)
backward_round_sm90(SACCADE_PARAM Backward90Args args) {
  const GradParams& p = args.all.p;
  const int64_t heads = block_index() / args.all.blocks;
  const Head x = head_of(p, int(heads / p.heads), int(heads % p.heads));
  const int i0 = int(block_index() % args.all.blocks) * Shape::kBlockM;
  if (i0 >= x.seqlen_q) return;
  const int group = thread_index() / 128, thread = thread_index() % 128;
  const float* from =
      args.dq + (row_of(args.all, x) + i0) * Shape::kHeadDim + group * Shape::kBlockM * Shape::kShare;
  T* to = rows_at<T>(p.dq, x.b, x.h, x.q_begin);
  for (int e = 0; e < Shape::kShare / 2; ++e) {
    const int i = i0 + thread / 32 * 16 + thread % 32 / 4 + e / 2 % 2 * 8;
    const int d = group * Shape::kShare + e / 4 * 8 + thread % 4 * 2 + e % 2;
    if (i < x.seqlen_q && d < p.head_dim)
      store_global(
          to + i * p.dq.row + d * p.dq.col,
          from_float<T>(load_global(from + (e / 4 * 128 + thread) * 4 + e % 4) * args.all.terms.unit));
  }
}

}  // namespace saccade
