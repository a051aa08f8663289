// The tiled body backward on Hopper (backward_sm90.h): where things lie, the thread that fills shared memory,
// and the kernel that rounds the sums of dQ.
#pragma once
#include "backward.h"

namespace saccade {

template <int kSize, bool kAddsQueries>
struct BackwardShape90 {
  static constexpr bool kWithQueries = kAddsQueries;  // dQ too
  static constexpr int kHeadDim = kSize, kPanels = kHeadDim / 64, kConsumers = 2, kThreads = 384;
  // Two warpgroups hold dK and dV of 64 keys each. At head_dim 256 that is more than the registers there are:
  // there both work on the same 64 keys, one for dV, the other for dK.
  static constexpr bool kSplit = kHeadDim > 128;
  static constexpr int kBlockN = kSplit ? 64 : 128, kBlockM = kHeadDim <= 64 ? 128 : 64;
  // Where only one tile of dO fits beside dQ, it is loaded while dK and dQ are formed.
  static constexpr int kQueryStages = 2, kDoutStages = kSplit && kWithQueries ? 1 : 2;
  // A warpgroup forms 64 rows of dQ: half of the rows or, of a tile of 64, half of the columns. (Never part
  // of a panel of 64 columns: no manual says that wgmma can read one.)
  static constexpr bool kShareRows = kBlockM == 128;
  static constexpr int kShare = kShareRows ? kHeadDim : kHeadDim / 2;  // its columns
  static_assert(kShare % 64 == 0, "whole panels");
  static constexpr int kPart = kSplit ? 32 : kShare, kSlots = kSplit ? 2 : 1;  // columns that a slot holds
  static constexpr int kKeyBytes = kBlockN * kHeadDim * 2, kQueryBytes = kBlockM * kHeadDim * 2;
  static constexpr int kGradBytes = kWithQueries ? kBlockN * kBlockM * 2 : 0;
  static constexpr int kPartBytes = 64 * kPart * 4, kSlotBytes = kSlots * kPartBytes;
  static constexpr int kQueries = 2 * kKeyBytes, kDouts = kQueries + kQueryStages * kQueryBytes;
  static constexpr int kGrads = kDouts + kDoutStages * kQueryBytes, kSlotsAt = kGrads + kGradBytes;
  static constexpr int kRows = kSlotsAt + (kWithQueries ? kConsumers : kSplit ? 1 : 0) * kSlotBytes;
  static constexpr int kReach = kRows + (kQueryStages + kDoutStages) * kBlockM * 4;
  static constexpr int kBarriers = kReach + kBlockN * 8;
  static constexpr int kSharedBytes =
      kBarriers + 8 * (1 + 2 * kQueryStages + 2 * kDoutStages) + 1024;  // the last for alignment
  static_assert(kSharedBytes <= 227 << 10, "the shared memory of sm_90");
  static_assert(!kSplit || kSlotBytes >= kBlockM * kBlockN * 4, "weights pass through the slots of dQ");
};

struct Backward90Args {
  TensorMap q, k, v, dout;
  BackwardArgs all;
  float* dq;  // sums in fp32, a tile after the other, each as the warpgroups hold it; null: dQ is not wanted
              // here
};

// Tiles of queries are counted over all heads of the block; tile n of dO lies in stage n % kDoutStages.
template <typename Shape>
struct BackwardRing90 {
  static constexpr uint32_t kQ = Shape::kQueryStages, kO = Shape::kDoutStages;
  uint32_t base;
  SACCADE_DEVICE_MEMBER uint32_t keys() const { return base; }
  SACCADE_DEVICE_MEMBER uint32_t values() const { return base + Shape::kKeyBytes; }
  SACCADE_DEVICE_MEMBER uint32_t queries(uint32_t n) const {
    return base + Shape::kQueries + n % kQ * Shape::kQueryBytes;
  }
  SACCADE_DEVICE_MEMBER uint32_t douts(uint32_t n) const {
    return base + Shape::kDouts + n % kO * Shape::kQueryBytes;
  }
  SACCADE_DEVICE_MEMBER uint32_t grads() const { return base + Shape::kGrads; }
  SACCADE_DEVICE_MEMBER uint32_t slot(int group, int i) const {
    return base + Shape::kSlotsAt + uint32_t(group * Shape::kSlotBytes + i * Shape::kPartBytes);
  }
  SACCADE_DEVICE_MEMBER uint32_t highs(uint32_t n) const {
    return base + Shape::kRows + n % kQ * Shape::kBlockM * 4;
  }
  SACCADE_DEVICE_MEMBER uint32_t deltas(uint32_t n) const {
    return base + Shape::kRows + (kQ + n % kO) * Shape::kBlockM * 4;
  }
  SACCADE_DEVICE_MEMBER uint32_t reach(int key) const { return base + Shape::kReach + uint32_t(key) * 8; }
  SACCADE_DEVICE_MEMBER uint32_t barrier(uint32_t i) const { return base + Shape::kBarriers + i * 8; }
  SACCADE_DEVICE_MEMBER uint32_t keys_full() const { return barrier(0); }
  SACCADE_DEVICE_MEMBER uint32_t queries_full(uint32_t n) const { return barrier(1 + n % kQ); }
  SACCADE_DEVICE_MEMBER uint32_t queries_empty(uint32_t n) const { return barrier(1 + kQ + n % kQ); }
  SACCADE_DEVICE_MEMBER uint32_t douts_full(uint32_t n) const { return barrier(1 + 2 * kQ + n % kO); }
  SACCADE_DEVICE_MEMBER uint32_t douts_empty(uint32_t n) const { return barrier(1 + 2 * kQ + kO + n % kO); }
  // Until a tile is there; until its stage is free.
  SACCADE_DEVICE_MEMBER void wait_queries(uint32_t n) const { barrier_wait(queries_full(n), n / kQ & 1); }
  SACCADE_DEVICE_MEMBER void wait_douts(uint32_t n) const { barrier_wait(douts_full(n), n / kO & 1); }
  SACCADE_DEVICE_MEMBER void free_queries(uint32_t n) const { barrier_wait(queries_empty(n), ~(n / kQ) & 1); }
  SACCADE_DEVICE_MEMBER void free_douts(uint32_t n) const { barrier_wait(douts_empty(n), ~(n / kO) & 1); }
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
  for (uint32_t n = 0; at.valid(); at.next(), ++n) {
    const int row = int(at.head.q_begin) + at.m * Shape::kBlockM;
    const float* rows = all.rows + row_of(all, at.head) + at.m * Shape::kBlockM;
    ring.free_queries(n);
    barrier_expect(ring.queries_full(n), Shape::kQueryBytes + Shape::kBlockM * 4);
    load(args.q, ring.queries(n), ring.queries_full(n), Shape::kBlockM, row, at.head.h);
    bulk_load(ring.highs(n), rows, ring.queries_full(n), Shape::kBlockM * 4);
    ring.free_douts(n);
    barrier_expect(ring.douts_full(n), Shape::kQueryBytes + Shape::kBlockM * 4);
    load(args.dout, ring.douts(n), ring.douts_full(n), Shape::kBlockM, row, at.head.h);
    bulk_load(ring.deltas(n), rows + 2 * all.row_count, ring.douts_full(n), Shape::kBlockM * 4);
  }
}

// dQ from its sums: each thread takes what one thread of a warpgroup held.
template <typename T, typename Shape>
SACCADE_KERNEL(256, 1)
backward_round_sm90(SACCADE_PARAM Backward90Args args) {
  const GradParams& p = args.all.p;
  const int64_t heads = block_index() / args.all.blocks;
  const Head x = head_of(p, args.all.terms, int(heads / p.heads), int(heads % p.heads));
  const int i0 = int(block_index() % args.all.blocks) * Shape::kBlockM;
  if (i0 >= x.seqlen_q) return;
  const int group = thread_index() / 128, thread = thread_index() % 128;
  const float* from = args.dq + (row_of(args.all, x) + i0) * Shape::kHeadDim + group * 64 * Shape::kShare;
  T* to = rows_at<T>(p.dq, x.b, x.h, x.q_begin);
  const float scale = args.all.terms.scale;
  SACCADE_UNROLL_BY(8)
  for (int t = 0; t < Shape::kShare / 8; ++t) {
    const float4 four = load_global(reinterpret_cast<const float4*>(from) + t * 128 + thread);
    const float sums[4] = {four.x * scale, four.y * scale, four.z * scale, four.w * scale};
    const int d = (Shape::kShareRows ? 0 : group * Shape::kShare) + t * 8 + thread % 4 * 2;
    SACCADE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = i0 + (Shape::kShareRows ? group * 64 : 0) + thread / 32 * 16 + thread % 32 / 4 + half * 8;
      if (i >= x.seqlen_q) continue;
      T* at = to + i * p.dq.row + d * p.dq.col;
      if (args.all.aligned_dq && d + 2 <= p.head_dim) {
        store_global(reinterpret_cast<uint32_t*>(at), pack<T>(sums[2 * half], sums[2 * half + 1]));
        continue;
      }
      for (int c = 0; c < 2; ++c)
        if (d + c < p.head_dim) store_global(at + c * p.dq.col, from_float<T>(sums[2 * half + c]));
    }
  }
}

}  // namespace saccade
