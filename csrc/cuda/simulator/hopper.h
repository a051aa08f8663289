// What sm_90 adds: mbarriers, the bulk copy engine (TMA), wgmma, setmaxnreg.
#pragma once
#include "warp.h"

namespace saccade {

// ---- mbarriers ----

namespace sim {
inline Mbarrier& mbarrier(uint32_t address) {
  shared_at(address, 8, 8);
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) fail("mbarrier at %u was never initialised", address - kSharedBase);
  return found->second;
}
}  // namespace sim

static inline void barrier_init(uint32_t address, int arrivals) {
  sim::shared_at(address, 8, 8);
  sim::block.mbarriers[address] = {arrivals, arrivals, 0, 0};
  sim::note_store(address, 8);
}
static inline void async_fence() { ++sim::block.current->fences; }
static inline void barrier_init_fence() { async_fence(); }
static inline void barrier_expect(uint32_t address, int bytes) {
  sim::Mbarrier& m = sim::mbarrier(address);
  m.bytes += bytes;
  if (--m.pending < 0) sim::fail("mbarrier at %u: more arrivals than expected", address - sim::kSharedBase);
  ++sim::block.progress;
  sim::complete(address, 0);
}
static inline void barrier_arrive(uint32_t address) { barrier_expect(address, 0); }
static inline void barrier_wait(uint32_t address, uint32_t parity) {
  const sim::Mbarrier& m = sim::mbarrier(address);
  sim::wait_while([&] { return (m.phase & 1) == parity; }, "mbarrier", address - sim::kSharedBase, parity);
}

// ---- TMA: tensors of 16-bit numbers in four dimensions, boxes 64 columns (128 bytes) wide, 128-byte swizzle

struct TensorMap {
  char* data;
  int64_t size[4], stride[4];  // elements; bytes
  int rows;                    // of a box
};

namespace sim {
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

inline void check_box(uint32_t tile, const TensorMap& map) {
  if (tile % 1024) fail("TMA: the tile at %u is not aligned to 1024 bytes", tile - kSharedBase);
  shared_at(tile, uint32_t(map.rows) * 128, 1024);
}
// Calls move(shared, global or null) for every element of a box.
template <typename Move>
void each_element(const TensorMap& map, uint32_t tile, const int (&at)[4], const char* what, Move move) {
  for (int r = 0; r < map.rows; ++r) {
    const int64_t row = at[1] + r;
    const bool inside = row >= 0 && row < map.size[1] && at[2] >= 0 && at[2] < map.size[2] && at[3] >= 0 &&
                        at[3] < map.size[3];
    char* line = map.data + row * map.stride[1] + at[2] * map.stride[2] + at[3] * map.stride[3];
    const int64_t columns = !inside ? 0 : map.size[0] - at[0] < 64 ? map.size[0] - at[0] : 64;
    if (columns > 0) check_global(line + at[0] * 2, columns * 2, 2, what);
    for (int c = 0; c < 64; ++c)
      move(shared_at(swizzled(tile + uint32_t(r) * 128 + uint32_t(c) * 2), 2, 2),
           c < columns ? line + (at[0] + c) * 2 : nullptr);
  }
}
// A load that is about to be issued; what it brings overwrites what threads have stored.
inline void check_load(uint32_t to, uint32_t bytes, uint32_t barrier, const char* what) {
  mbarrier(barrier);
  check_fenced(barrier, 8, what);
  check_fenced(to, bytes, what);
  memset(block.written + (to - kSharedBase) / 4, 0, bytes);
}
inline void issue_bulk(std::function<void()> run) {
  auto& open = block.current->bulk.open;
  open.push_back({std::move(run), false});
  if (random_below(4) == 0) land(open.back());
}
}  // namespace sim

static inline void prefetch_map(const TensorMap*) {}
static inline void tma_load(uint32_t tile, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2,
                            int c3) {
  sim::check_box(tile, *map);
  sim::check_load(tile, uint32_t(map->rows) * 128, barrier, "TMA load");
  const TensorMap m = *map;
  const auto run = [=] {
    const int at[4] = {c0, c1, c2, c3};
    sim::each_element(m, tile, at, "TMA load", [](void* shared, const void* global) {
      memset(shared, 0, 2);
      if (global) memcpy(shared, global, 2);
    });
  };
  sim::block.loads.push_back({run, barrier, m.rows * 128});
  if (sim::random_below(4) == 0) sim::land_load(sim::block.loads.size() - 1);
}
static inline void bulk_load(uint32_t to, const float* from, uint32_t barrier, int bytes) {
  sim::check_global(from, bytes, 16, "bulk load");
  void* at = sim::shared_at(to, uint32_t(bytes), 16);
  if (bytes % 16) sim::fail("bulk load: %d bytes are not a multiple of 16", bytes);
  sim::check_load(to, uint32_t(bytes), barrier, "bulk load");
  sim::block.loads.push_back({[=] { memcpy(at, from, size_t(bytes)); }, barrier, bytes});
  if (sim::random_below(4) == 0) sim::land_load(sim::block.loads.size() - 1);
}
static inline void tma_store(const TensorMap* map, uint32_t tile, int c0, int c1, int c2, int c3) {
  sim::check_box(tile, *map);
  sim::check_fenced(tile, uint32_t(map->rows) * 128, "TMA store");
  const TensorMap m = *map;
  sim::issue_bulk([=] {
    const int at[4] = {c0, c1, c2, c3};
    sim::each_element(m, tile, at, "TMA store", [](const void* shared, void* global) {
      if (global) memcpy(global, shared, 2);
    });
  });
}
static inline void bulk_reduce_add(float* to, uint32_t from, int bytes) {
  sim::check_global(to, bytes, 16, "bulk reduce-add");
  sim::shared_at(from, uint32_t(bytes), 16);
  if (bytes % 16) sim::fail("bulk reduce-add: %d bytes are not a multiple of 16", bytes);
  sim::check_fenced(from, uint32_t(bytes), "bulk reduce-add");
  sim::issue_bulk([=] {
    for (int i = 0; i < bytes / 4; ++i) to[i] += load_shared<float>(from + uint32_t(i) * 4);
  });
}
static inline void bulk_commit() { sim::block.current->bulk.commit(); }
// Until all but kLeft groups have read their shared memory; the simulator writes at the same time.
template <int kLeft>
void bulk_wait_read() {
  sim::wait_groups<kLeft>(sim::block.current->bulk);
}
template <int kLeft>
void bulk_wait() {
  sim::wait_groups<kLeft>(sim::block.current->bulk);
}

// ---- wgmma: 64 x N x 16 by a warpgroup; the accumulators hold NaN from issue to wait

namespace sim {
// Fields as in the PTX manual, all in 16-byte units.
inline uint32_t field(uint64_t descriptor, int bit) { return uint32_t(descriptor >> bit & 0x3FFF) << 4; }
template <typename T>
float element(uint64_t d, bool transposed, int n, int k) {
  if (d >> 62 != 1) fail("wgmma: only the 128-byte swizzle is simulated");
  const uint32_t start = field(d, 0), leading = field(d, 16), stride = field(d, 32);
  const uint32_t at = transposed ? start + uint32_t(n / 64) * leading + uint32_t(k / 8) * stride +
                                       uint32_t(k % 8) * 128 + uint32_t(n % 64) * 2
                                 : start + uint32_t(n / 8) * stride + uint32_t(n % 8) * 128 + uint32_t(k) * 2;
  T x;
  memcpy(&x, shared_at(swizzled(at), 2, 2), 2);
  check_fenced(swizzled(at), 2, "wgmma");
  return to_float(x);
}

struct Operands {
  Accumulator* sum;
  const uint32_t* a;  // null: A lies in shared memory
};

// Reads its operands when it runs, which is at the wait.
template <typename T, int N, bool kTransposed, bool kTransposedA>
void run_product(const std::vector<Operands>& threads, uint64_t desc_a, uint64_t desc_b, bool accumulate) {
  static float A[64][16], B[16][N], D[64][N];
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < N; ++n) B[k][n] = element<T>(desc_b, kTransposed, n, k);
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k) {
      const uint32_t* a = threads[size_t(m / 16 * 32 + m % 8 * 4 + k % 8 / 2)].a;
      A[m][k] = a ? unpack<T>(a[m / 8 % 2 + k / 8 * 2], k % 2) : element<T>(desc_a, kTransposedA, m, k);
    }
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < N; ++n) D[m][n] = 0;
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < N; ++n) D[m][n] += A[m][k] * B[k][n];
  }
  for (int t = 0; t < 128; ++t) {
    Accumulator& sum = *threads[size_t(t)].sum;
    --sum.products;
    for (int i = 0; i < N / 2; ++i) {
      const float x = D[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][i / 4 * 8 + t % 4 * 2 + i % 2];
      sum.values[size_t(i)] = accumulate ? sum.values[size_t(i)] + x : x;
    }
  }
}

template <typename T, int N, bool kTransposed, bool kTransposedA>
void issue_product(float* d, const uint32_t* a, uint64_t desc_a, uint64_t desc_b, bool accumulate) {
  const int group = thread_index() / 128;
  Accumulator& sum = block.accumulators[group][d];
  if (sum.products++ == 0) sum.values.assign(d, d + N / 2);
  for (int i = 0; i < N / 2; ++i) d[i] = float_of(kPoison);
  Operands mine{&sum, a};
  group_collective(&mine, "wgmma", [=](void** slot) {
    std::vector<Operands> threads;
    for (int t = 0; t < 128; ++t) threads.push_back(*static_cast<Operands*>(slot[t]));
    block.products[group].open.push_back(
        [=] { run_product<T, N, kTransposed, kTransposedA>(threads, desc_a, desc_b, accumulate); });
  });
}

// Hands the sums that no product is left to change back to their registers.
inline void release_accumulators(int group) {
  auto& all = block.accumulators[group];
  for (auto at = all.begin(); at != all.end();) {
    if (at->second.products) {
      ++at;
      continue;
    }
    memcpy(at->first, at->second.values.data(), at->second.values.size() * sizeof(float));
    at = all.erase(at);
  }
}
}  // namespace sim

// Of a tile of 128-byte rows under the 128-byte swizzle. `leading`: from one 64-column panel to the next,
// which only transposed operands need; groups of eight rows are 1024 bytes apart.
static inline uint64_t matrix_descriptor(uint32_t address, uint32_t leading) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}
template <typename T, int N, bool kTransposed, bool kTransposedA = false>
void wgmma_shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  sim::issue_product<T, N, kTransposed, kTransposedA>(d, nullptr, a, b, accumulate);
}
template <typename T, int N, bool kTransposed>
void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  sim::issue_product<T, N, kTransposed, false>(d, a, 0, b, accumulate);
}
static inline void wgmma_fence() {}
template <int N>
void wgmma_hold(float (&)[N]) {}
static inline void settle(uint32_t, float) {}
static inline void wgmma_commit() {
  sim::group_collective(nullptr, "wgmma_commit",
                        [](void**) { sim::block.products[thread_index() / 128].commit(); });
}
template <int kLeft>
void wgmma_wait() {
  sim::group_collective(nullptr, "wgmma_wait", [](void**) {
    const int group = thread_index() / 128;
    auto& products = sim::block.products[group];
    for (; products.closed.size() > kLeft; products.closed.pop_front())
      for (const auto& product : products.closed.front()) product();
    sim::release_accumulators(group);
  });
}

template <int kRegisters>
void registers_shrink() {
  sim::group_collective(nullptr, "setmaxnreg", [](void**) {});
}
template <int kRegisters>
void registers_grow() {
  sim::group_collective(nullptr, "setmaxnreg", [](void**) {});
}

}  // namespace saccade
