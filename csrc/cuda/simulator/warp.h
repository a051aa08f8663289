// What every device from sm_80 on has: memory, shuffles, barriers, cp.async, ldmatrix, mma.sync.
#pragma once
#include "schedule.h"
#include "types.h"

namespace saccade {

static inline int thread_index() { return sim::block.current->thread; }
static inline int64_t block_index() { return sim::block.index; }
static inline int64_t block_count() { return sim::block.blocks; }

// ---- memory; shared addresses are 32-bit numbers ----

static inline uint32_t shared_memory() { return sim::kSharedBase; }
template <typename T>
T load_shared(uint32_t address) {
  T x;
  memcpy(&x, sim::shared_at(address, sizeof(T), alignof(T)), sizeof(T));
  return x;
}
template <typename T>
void store_shared(uint32_t address, T x) {
  memcpy(sim::shared_at(address, sizeof(T), alignof(T)), &x, sizeof(T));
  sim::note_store(address, sizeof(T));
}
template <typename T>
T load_global(const T* p) {
  sim::check_global(p, sizeof(T), alignof(T), "load");
  return *p;
}
template <typename T>
void store_global(T* p, T x) {
  sim::check_global(p, sizeof(T), alignof(T), "store");
  *p = x;
}

static inline int fetch_add(int* p, int x) {
  sim::check_global(p, sizeof(int), alignof(int), "fetch_add");
  return (*p += x) - x;
}

// ---- arithmetic ----

static inline float exp2_approx(float x) { return exp2f(x); }
static inline float reciprocal_approx(float x) { return 1 / x; }
static inline int anew(int x) { return x; }

// ---- threads ----

static inline void sync_threads() {
  sim::collective(sim::block.all, sim::block.threads, 0, nullptr, "sync_threads", [](void**) {});
}
static inline void sync_warp() {
  sim::warp_collective(nullptr, "sync_warp", [](void**) {});
}

static inline void named_barrier_arrive(int id, int threads) {
  sim::Barrier& b = sim::block.named[id];
  if (b.arrived && b.count != threads)
    sim::fail("named barrier %d: %d threads expected, then %d", id, b.count, threads);
  b.count = threads;
  const size_t self = size_t(thread_index());
  if (b.there[self]) sim::fail("named barrier %d: thread %d is there again before the others", id, int(self));
  b.there[self] = true;
  ++sim::block.progress;
  if (++b.arrived == threads) {
    b.there.reset();
    b.arrived = 0;
    ++b.generation;
  }
}
static inline void named_barrier_sync(int id, int threads) {
  sim::Barrier& b = sim::block.named[id];
  const unsigned generation = b.generation;
  named_barrier_arrive(id, threads);
  sim::wait_while([&] { return b.generation == generation; }, "named barrier", uint32_t(id),
                  uint32_t(threads));
}

template <typename T>
T shuffle(T mine, int source) {
  struct Exchange {
    T in, out;
    int source;
  } x{mine, mine, source};
  sim::warp_collective(&x, "shuffle", [](void** slot) {
    for (int i = 0; i < 32; ++i) {
      Exchange* e = static_cast<Exchange*>(slot[i]);
      e->out = static_cast<Exchange*>(slot[e->source & 31])->in;
    }
  });
  return x.out;
}
template <typename T>
T shuffle_xor(T mine, int mask) {
  return shuffle(mine, sim::lane() ^ mask);
}

// ---- cp.async: 16 bytes, of which `bytes` come from global memory and the rest is zero ----

static inline void copy_async(uint32_t to, const void* from, int bytes) {
  sim::shared_at(to, 16, 16);
  if (bytes) sim::check_global(from, bytes, 16, "cp.async");
  auto& open = sim::block.current->copies.open;
  open.push_back({to, from, bytes, false});
  if (sim::random_below(4) == 0) sim::land(open.back());
}
static inline void copy_commit() { sim::block.current->copies.commit(); }
template <int kLeft>
void copy_wait() {
  sim::wait_groups<kLeft>(sim::block.current->copies);
}

// ---- ldmatrix: lane l names row l % 8 of 8 x 8 matrix l / 8 ----

template <bool kTransposed>
void load_matrix_x4(uint32_t address, uint32_t (&r)[4]) {
  struct Row {
    const uint16_t* at;
    uint32_t* r;
  } mine{static_cast<const uint16_t*>(sim::shared_at(address, 16, 16)), r};
  sim::warp_collective(&mine, "ldmatrix", [](void** slot) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m) {
        uint32_t pair = 0;
        for (int j = 0; j < 2; ++j) {
          const int across = l % 4 * 2 + j, down = l / 4;
          const int row = kTransposed ? across : down, col = kTransposed ? down : across;
          pair |= uint32_t(static_cast<Row*>(slot[m * 8 + row])->at[col]) << (16 * j);
        }
        static_cast<Row*>(slot[l])->r[m] = pair;
      }
  });
}

// ---- mma.sync m16n8k16, fp32 sums ----

template <typename T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } mine{c, a, {b0, b1}};
  sim::warp_collective(&mine, "mma", [](void** slot) {
    float A[16][16], B[16][8];
    for (int l = 0; l < 32; ++l) {
      const Fragments* f = static_cast<Fragments*>(slot[l]);
      const int g = l / 4, t = l % 4;
      for (int j = 0; j < 2; ++j) {
        for (int i = 0; i < 4; ++i) A[g + i % 2 * 8][t * 2 + j + i / 2 * 8] = unpack<T>(f->a[i], j);
        for (int i = 0; i < 2; ++i) B[t * 2 + j + i * 8][g] = unpack<T>(f->b[i], j);
      }
    }
    float C[16][8] = {};
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) C[m][n] += A[m][k] * B[k][n];
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i)
        static_cast<Fragments*>(slot[l])->c[i] += C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  });
}

}  // namespace saccade
