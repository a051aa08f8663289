// The tiled body on Hopper: one thread of a producer warpgroup keeps a ring of key and value tiles filled by
// TMA; consumer warpgroups of 64 queries each multiply them by wgmma. The next Q K^T runs while this tile's
// softmax does. Blocks stay and take one item after another, the longest first.
#pragma once
#include <type_traits>

#include "softmax.h"

namespace saccade {

template <int kSize>
struct ForwardShape90 {
  static constexpr int kHeadDim = kSize;
  // Three warpgroups hide each other's softmax where their registers allow.
  static constexpr int kConsumers = kHeadDim <= 64 ? 3 : 2;
  static constexpr int kBlockM = 64 * kConsumers, kBlockN = kHeadDim <= 128 ? 128 : 64, kStages = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1), kPanels = kHeadDim / 64;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32,
                       kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr bool kTakeTurns = kHeadDim <= 128;
  static constexpr int kQueryBytes = kBlockM * kHeadDim * 2, kTileBytes = kBlockN * kHeadDim * 2;
  static constexpr int kKeys = kQueryBytes, kValues = kKeys + kStages * kTileBytes;
  static constexpr int kBarriers = kValues + kStages * kTileBytes;
  static constexpr int kItem = kBarriers + 8 * (4 + 4 * kStages);
  static constexpr int kSharedBytes = kItem + 8 + 1024;  // the last for alignment
  static_assert(kSharedBytes <= 227 << 10, "the shared memory of sm_90");
  static_assert(128 * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536, "the register file");
};

struct Forward90Args {
  TensorMap q, k, v, out;
  TiledArgs tiled;
  int items;
  int* counter;       // of the items taken beyond each block's first; null: blocks take them in turns
  int section;        // heads whose keys and values share the L2 cache
  bool store_by_tma;  // else rows are stored one by one: in packed tensors the next sequence follows
};

// A block of queries of one head.
struct Item90 {
  Head head;
  Band band;
  TileRange range;
  int i0;
  bool empty;  // beyond the end of a short sequence
};

// Within a section the last blocks, the longest of a causal mask, come first.
template <typename Shape>
SACCADE_DEVICE Item90 item_of(const Forward90Args& args, int index) {
  const Params& p = args.tiled.p;
  const int all = int(p.batch * p.heads), whole = args.section * args.tiled.blocks;
  const int first = index / whole * args.section, within = index % whole;
  const int heads = least(args.section, all - first), head = first + within % heads;
  Item90 item;
  item.head = head_of(p, args.tiled.terms, head / int(p.heads), head % int(p.heads));
  item.i0 = (args.tiled.blocks - 1 - within / heads) * Shape::kBlockM;
  item.empty = item.i0 >= item.head.seqlen_q;
  item.band = band_of(p.mask, args.tiled.terms, item.head);
  item.range =
      tiles_of<Shape::kBlockN>(item.band, item.i0, least(item.i0 + Shape::kBlockM, item.head.seqlen_q));
  return item;
}

// Where things lie in shared memory.
template <typename Shape>
struct Ring90 {
  uint32_t base;
  SACCADE_DEVICE_MEMBER uint32_t queries() const { return base; }
  SACCADE_DEVICE_MEMBER uint32_t keys(int stage) const {
    return base + Shape::kKeys + uint32_t(stage) * Shape::kTileBytes;
  }
  SACCADE_DEVICE_MEMBER uint32_t values(int stage) const {
    return base + Shape::kValues + uint32_t(stage) * Shape::kTileBytes;
  }
  SACCADE_DEVICE_MEMBER uint32_t barrier(int i) const { return base + Shape::kBarriers + uint32_t(i) * 8; }
  SACCADE_DEVICE_MEMBER uint32_t queries_full() const { return barrier(0); }
  SACCADE_DEVICE_MEMBER uint32_t queries_empty() const { return barrier(1); }
  SACCADE_DEVICE_MEMBER uint32_t item_full() const { return barrier(2); }
  SACCADE_DEVICE_MEMBER uint32_t item_empty() const { return barrier(3); }
  SACCADE_DEVICE_MEMBER uint32_t item() const { return base + Shape::kItem; }
  SACCADE_DEVICE_MEMBER uint32_t keys_full(int stage) const { return barrier(4 + stage); }
  SACCADE_DEVICE_MEMBER uint32_t keys_empty(int stage) const { return barrier(4 + Shape::kStages + stage); }
  SACCADE_DEVICE_MEMBER uint32_t values_full(int stage) const {
    return barrier(4 + 2 * Shape::kStages + stage);
  }
  SACCADE_DEVICE_MEMBER uint32_t values_empty(int stage) const {
    return barrier(4 + 3 * Shape::kStages + stage);
  }
};

// The place of a tile in the ring, counted over all items of the block.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  SACCADE_DEVICE_MEMBER void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <typename Shape>
SACCADE_DEVICE void produce(const Forward90Args& args, const Ring90<Shape>& ring) {
  Place<Shape::kStages> at;
  Place<1> q_at, item_at;
  const auto load = [&](const TensorMap& map, uint32_t tile, uint32_t full, int rows, int row, int head,
                        int b) {
    barrier_expect(full, rows * Shape::kHeadDim * 2);
    for (int panel = 0; panel < Shape::kPanels; ++panel)
      tma_load(tile + uint32_t(panel * rows) * 128, &map, full, panel * 64, row, head, b);
  };
  for (int index = int(block_index()), next;; index = next) {
    barrier_wait(ring.item_empty(), item_at.parity ^ 1);
    store_shared(ring.item(), index);
    barrier_arrive(ring.item_full());
    item_at.advance();
    if (index >= args.items) return;
    // Asked for now, since the answer takes its time.
    next = int(block_count()) + (args.counter ? fetch_add(args.counter, 1) : index);
    const Item90 item = item_of<Shape>(args, index);
    if (item.empty) continue;
    const Head& x = item.head;
    const int b = args.tiled.p.cu_seqlens_q ? 0 : x.b;
    // The first keys come before the queries, where the last item's output may still lie.
    bool queries_come = false;
    SACCADE_ROLLED
    for (int n = item.range.last - 1; n >= item.range.first || !queries_come; --n) {
      if (n >= item.range.first) {
        const int row = int(x.k_begin) + n * Shape::kBlockN;
        barrier_wait(ring.keys_empty(at.stage), at.parity ^ 1);
        load(args.k, ring.keys(at.stage), ring.keys_full(at.stage), Shape::kBlockN, row, x.hk, b);
        barrier_wait(ring.values_empty(at.stage), at.parity ^ 1);
        load(args.v, ring.values(at.stage), ring.values_full(at.stage), Shape::kBlockN, row, x.hk, b);
        at.advance();
      }
      if (queries_come) continue;
      barrier_wait(ring.queries_empty(), q_at.parity ^ 1);
      load(args.q, ring.queries(), ring.queries_full(), Shape::kBlockM, int(x.q_begin) + item.i0, x.h, b);
      q_at.advance();
      queries_come = true;
    }
  }
}

// What one consumer warpgroup holds in registers and how it works on an item.
template <typename T, typename Shape>
struct Consumer90 {
  static constexpr int kHeadDim = Shape::kHeadDim, kBlockN = Shape::kBlockN;
  const Forward90Args& args;
  const Ring90<Shape>& ring;
  // By a shuffle, so that the compiler knows it to be uniform and keeps descriptors in uniform registers.
  const int group = shuffle(thread_index() / 128, 0) - 1;
  const int thread = thread_index() % 128, lane = thread_index() % 32;
  const int row0 = group * 64 + thread / 32 * 16 + lane / 4;  // of the block; the other row is row0 + 8
  Place<Shape::kStages> keys_at, values_at;
  Place<1> q_at, item_at;
  RunningSoftmax softmax;
  float s[kBlockN / 2], out[kHeadDim / 2];
  uint32_t weights[kBlockN / 16][4];

  SACCADE_DEVICE_MEMBER Consumer90(const Forward90Args& all, const Ring90<Shape>& memory)
      : args(all), ring(memory) {}

  // Warps leave a wait one by one, so each gives a tile back for itself.
  SACCADE_DEVICE_MEMBER void release(uint32_t barrier) {
    if (lane == 0) barrier_arrive(barrier);
  }
  SACCADE_DEVICE_MEMBER int next_item() {
    barrier_wait(ring.item_full(), item_at.parity);
    item_at.advance();
    const int index = load_shared<int>(ring.item());
    sync_warp();
    release(ring.item_empty());
    return index;
  }
  SACCADE_DEVICE_MEMBER void group_sync() { named_barrier_sync(1 + Shape::kConsumers + group, 128); }

  SACCADE_DEVICE_MEMBER void issue_scores() {
    barrier_wait(ring.keys_full(keys_at.stage), keys_at.parity);
    const uint64_t q = matrix_descriptor(ring.queries() + uint32_t(group) * 64 * 128, 16);
    const uint64_t k = matrix_descriptor(ring.keys(keys_at.stage), 16);
    wgmma_fence();
    SACCADE_UNROLL
    for (int d = 0; d < kHeadDim / 16; ++d)
      wgmma_shared<T, kBlockN, false>(s, q + uint64_t(d / 4 * Shape::kBlockM * 128 + d % 4 * 32) / 16,
                                      k + uint64_t(d / 4 * kBlockN * 128 + d % 4 * 32) / 16, d > 0);
    wgmma_commit();
  }

  SACCADE_DEVICE_MEMBER void issue_output(const Item90& item, int n) {
    barrier_wait(ring.values_full(values_at.stage), values_at.parity);
    zero_dead_rows(item.range, n);
    const uint64_t v = matrix_descriptor(ring.values(values_at.stage), kBlockN * 128);
    wgmma_fence();
    SACCADE_UNROLL
    for (int j = 0; j < kBlockN / 16; ++j)
      wgmma_registers<T, kHeadDim, true>(out, weights[j], v + uint64_t(j * 16 * 128) / 16, true);
    wgmma_commit();
  }

  // Values outside the keys of the block are no longer zeros where other tokens follow in memory, and 0 x NaN
  // is NaN. Every warpgroup writes the same zeros for itself.
  SACCADE_DEVICE_MEMBER void zero_dead_rows(const TileRange& range, int n) {
    const int begin = range.begin - n * kBlockN, end = range.end - n * kBlockN;
    if (begin <= 0 && end >= kBlockN) return;
    const uint32_t tile = ring.values(values_at.stage);
    SACCADE_ROLLED
    for (int c = thread; c < kBlockN * kHeadDim / 8; c += 128) {
      const int row = c / 8 % kBlockN;
      if (row < begin || row >= end) store_shared(tile + uint32_t(c) * 16, uint4{0, 0, 0, 0});
    }
    async_fence();
    group_sync();
  }

  template <bool kMasked>
  SACCADE_DEVICE_MEMBER void weigh(const Item90& item, int n, float (&rescale)[2]) {
    const Terms& terms = args.tiled.terms;
    if (!terms.bare) {
      SACCADE_UNROLL
      for (int i = 0; i < kBlockN / 2; ++i) s[i] = terms.softcap * tanh_of(terms.per_cap * s[i]);
    }
    if (kMasked) {
      SACCADE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int i = item.i0 + row0 + half * 8, j0 = n * kBlockN + lane % 4 * 2;
        const int begin = first_key(item.band, i) - j0, end = end_key(item.band, i) - j0;
        SACCADE_UNROLL
        for (int t = 0; t < kBlockN / 8; ++t)
          for (int c = 0; c < 2; ++c)
            if (t * 8 + c < begin || t * 8 + c >= end) s[4 * t + 2 * half + c] = -kInfinity;
      }
    }
    softmax.weigh<false>(s, terms.factor, rescale);
  }
  SACCADE_DEVICE_MEMBER void round_weights() {
    SACCADE_UNROLL
    for (int j = 0; j < kBlockN / 16; ++j)
      for (int i = 0; i < 4; ++i) weights[j][i] = pack<T>(s[8 * j + 2 * i], s[8 * j + 2 * i + 1]);
  }

  // Logits of tile n while the output of tile n + 1 is being added.
  template <bool kMasked>
  SACCADE_DEVICE_MEMBER void step(const Item90& item, int n) {
    if (Shape::kTakeTurns) named_barrier_sync(1 + group, 256);
    issue_scores();
    issue_output(item, n + 1);
    // The next warpgroup's products now, while this one's exponentials run.
    if (Shape::kTakeTurns) named_barrier_arrive(1 + (group + 1) % Shape::kConsumers, 256);
    wgmma_wait<1>();
    wgmma_hold(s);
    release(ring.keys_empty(keys_at.stage));
    keys_at.advance();
    float rescale[2];
    weigh<kMasked>(item, n, rescale);
    settle(ring.base, fminf(softmax.sum[0], softmax.sum[1]));  // the exponentials, while the products run
    wgmma_wait<0>();
    wgmma_hold(out);
    release(ring.values_empty(values_at.stage));
    values_at.advance();
    SACCADE_UNROLL
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= rescale[i / 2 % 2];
    round_weights();
  }

  SACCADE_DEVICE_MEMBER void run(const Item90& item) {
    const TileRange& range = item.range;
    softmax = RunningSoftmax();
    SACCADE_UNROLL
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0;
    barrier_wait(ring.queries_full(), q_at.parity);
    q_at.advance();
    if (range.first < range.last) {
      int n = range.last - 1;
      issue_scores();
      wgmma_wait<0>();
      wgmma_hold(s);
      release(ring.keys_empty(keys_at.stage));
      keys_at.advance();
      float rescale[2];
      weigh<true>(item, n, rescale);
      round_weights();
      // Loops of their own for tiles that are tested and for those that every row keeps whole.
      for (--n; n >= range.first;) {
        if (n < range.full_last && n >= range.full_first) {
          for (; n >= range.full_first; --n) step<false>(item, n);
        } else {
          const int stop =
              n >= range.full_last && range.full_first < range.full_last ? range.full_last : range.first;
          for (; n >= stop; --n) step<true>(item, n);
        }
      }
      issue_output(item, range.first);
      wgmma_wait<0>();
      wgmma_hold(out);
      release(ring.values_empty(values_at.stage));
      values_at.advance();
    }
    finish(item);
  }

  // Normalises; out goes through this warpgroup's rows of the queries, which nobody needs any more.
  SACCADE_DEVICE_MEMBER void finish(const Item90& item) {
    const Params& p = args.tiled.p;
    const Head& x = item.head;
    SACCADE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float scale;
      const double lse = softmax.finish(args.tiled.terms, sink_of(p, x.h), half, scale);
      const int i = item.i0 + row0 + half * 8;
      if (lane % 4 == 0 && i < x.seqlen_q) store_global(p.lse + lse_at(p, x) + i, lse);
      SACCADE_UNROLL
      for (int t = 2 * half; t < kHeadDim / 2; t += 4) {
        out[t] *= scale;
        out[t + 1] *= scale;
      }
    }
    group_sync();  // every warp has read its queries
    SACCADE_UNROLL
    for (int t = 0; t < kHeadDim / 8; ++t)
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = uint32_t(row0 + half * 8);
        const uint32_t line = ring.queries() + uint32_t(t / 8 * Shape::kBlockM) * 128 + row * 128;
        store_shared(line + (uint32_t(t % 8) ^ (row & 7)) * 16 + uint32_t(lane % 4) * 4,
                     pack<T>(out[4 * t + 2 * half], out[4 * t + 2 * half + 1]));
      }
    async_fence();
    group_sync();
    if (args.store_by_tma) {
      if (thread == 0) {
        for (int panel = 0; panel < Shape::kPanels && panel * 64 < p.head_dim_v; ++panel)
          tma_store(&args.out, ring.queries() + uint32_t(panel * Shape::kBlockM + group * 64) * 128,
                    panel * 64, item.i0 + group * 64, x.h, x.b);
        bulk_commit();
        bulk_wait_read<0>();
      }
    } else {
      store_by_rows(item);
      async_fence();  // the copy engine writes here next
      group_sync();
    }
    if (thread == 0) barrier_arrive(ring.queries_empty());
  }

  SACCADE_DEVICE_MEMBER void store_by_rows(const Item90& item) {
    const Params& p = args.tiled.p;
    const Head& x = item.head;
    T* to = rows_at<T>(p.out, x.b, x.h, x.q_begin);
    SACCADE_ROLLED
    for (int c = thread; c < 64 * kHeadDim / 8; c += 128) {
      const int row = group * 64 + c / 8 % 64, panel = c / (8 * 64), column = panel * 64 + c % 8 * 8,
                i = item.i0 + row;
      if (i >= x.seqlen_q || column >= p.head_dim_v) continue;
      const uint32_t from =
          ring.queries() + uint32_t(panel * Shape::kBlockM + row) * 128 + uint32_t(c % 8 ^ (row & 7)) * 16;
      T* at = to + i * p.out.row + column * p.out.col;
      if (args.tiled.aligned_out && column + 8 <= p.head_dim_v) {
        store_global(reinterpret_cast<uint4*>(at), load_shared<uint4>(from));
        continue;
      }
      SACCADE_ROLLED
      for (int e = 0; e < 8 && column + e < p.head_dim_v; ++e)
        store_global(at + e * p.out.col, load_shared<T>(from + uint32_t(e) * 2));
    }
  }
};

template <typename T, typename Shape>
SACCADE_KERNEL(Shape::kThreads, 1)
forward_sm90(SACCADE_PARAM Forward90Args args) {
  const Ring90<Shape> ring{(shared_memory() + 1023) & ~1023u};
  if (thread_index() == 0) {
    prefetch_map(&args.q);
    if (args.tiled.p.seqlen_k > 0) prefetch_map(&args.k);  // maps of nothing are not encoded
    if (args.tiled.p.seqlen_k > 0) prefetch_map(&args.v);
    if (args.store_by_tma) prefetch_map(&args.out);
    barrier_init(ring.queries_full(), 1);
    barrier_init(ring.queries_empty(), Shape::kConsumers);
    barrier_init(ring.item_full(), 1);
    barrier_init(ring.item_empty(), Shape::kConsumers * 4);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      barrier_init(ring.keys_full(stage), 1);
      barrier_init(ring.keys_empty(stage), Shape::kConsumers * 4);
      barrier_init(ring.values_full(stage), 1);
      barrier_init(ring.values_empty(stage), Shape::kConsumers * 4);
    }
    barrier_init_fence();
  }
  sync_threads();
  if (thread_index() < 128) {
    registers_shrink<Shape::kProducerRegisters>();
    if (thread_index() == 0) produce<Shape>(args, ring);
    return;
  }
  registers_grow<Shape::kConsumerRegisters>();
  Consumer90<T, Shape> consumer(args, ring);
  if (Shape::kTakeTurns && consumer.group == Shape::kConsumers - 1)
    named_barrier_arrive(1, 256);  // the first turn
  for (int index = consumer.next_item(); index < args.items; index = consumer.next_item()) {
    const Item90 item = item_of<Shape>(args, index);
    if (!item.empty) consumer.run(item);
  }
  if (consumer.thread == 0) bulk_wait<0>();
}

}  // namespace saccade
