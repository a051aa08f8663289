// Planted faults: kernels that are right until one line is left out. Each fault must be found under some
// seed, and the whole kernel be right under every seed.
#include "check.h"

using namespace saccade;

enum Missing {
  kNothing,
  kCopyWait,      // cp.async is read before it has landed
  kSyncThreads,   // a buffer is overwritten while another warp reads it
  kParity,        // the mbarrier is waited for with the wrong parity
  kWgmmaWait,     // the sum is read while the product is under way
  kEmptyBarrier,  // TMA does not ask whether a stage is free
  kEarlyRelease,  // a stage is given back, and overwritten, while a product still reads it
  kBounds,        // one element past the tensor
  kArrival,       // a barrier that nobody completes
  kHandBack,  // the place that one warpgroup hands numbers over in is filled again before the other has read
  kRegisterReuse,  // the registers of an operand change while the product is under way
};

// Sums rows of 64 numbers that go through two stages of shared memory.
template <Missing kMissing>
SACCADE_KERNEL(64, 1)
pipeline(const float* x, float* sums, int rows) {
  const int t = thread_index();
  const auto issue = [&](int row) {
    if (t < 16) copy_async(shared_memory() + uint32_t(row % 2 * 256 + t * 16), x + row * 64 + t * 4, 16);
    copy_commit();
  };
  float sum = 0;
  issue(0);
  for (int row = 0; row < rows; ++row) {
    if (kMissing != kCopyWait) copy_wait<0>();
    if (kMissing != kSyncThreads || row == 0) sync_threads();
    if (row + 1 < rows) issue(row + 1);
    sum += load_shared<float>(shared_memory() + uint32_t(row % 2 * 256 + (63 - t) * 4));
  }
  store_global(sums + t + (kMissing == kBounds ? 1 : 0), sum);
}
template <Missing kMissing>
void check_pipeline() {
  constexpr int kRows = 9;
  Numbers<float> x(kRows * 64);
  Array<float> sums(64);
  expect_ok(launch("pipeline", &pipeline<kMissing>, 1, 64, 512, nullptr, x.data(), sums.data(), kRows));
  for (int t = 0; t < 64; ++t) {
    double sum = 0;
    for (int row = 0; row < kRows; ++row) sum += x[size_t(row * 64 + 63 - t)];
    expect_equal(sums[size_t(t)], sum, "sum");
  }
}
TEST(pipeline_whole) { check_pipeline<kNothing>(); }
TEST(fault_copy_wait) { check_pipeline<kCopyWait>(); }
TEST(fault_sync_threads) { check_pipeline<kSyncThreads>(); }
TEST(fault_bounds) { check_pipeline<kBounds>(); }

// C = A B^T over a depth that goes through a ring of two stages: warpgroup 0 loads, warpgroup 1 multiplies.
template <Missing kMissing>
SACCADE_KERNEL(256, 1)
ring(SACCADE_PARAM TensorMap a, SACCADE_PARAM TensorMap b, float* c, int steps) {
  const uint32_t A = shared_memory(), B = A + 2 * 8192, full = B + 2 * 8192, empty = full + 16;
  const int t = thread_index();
  if (t == 0) {
    for (uint32_t s = 0; s < 2; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 1);
    }
    barrier_init_fence();
  }
  sync_threads();
  if (t < 128) {
    registers_shrink<24>();
    for (int k = 0; t == 0 && k < steps; ++k) {
      const uint32_t s = uint32_t(k) % 2, round = uint32_t(k) / 2 % 2;
      if (kMissing != kEmptyBarrier) barrier_wait(empty + 8 * s, round ^ 1);
      barrier_expect(full + 8 * s, 2 * 8192);
      tma_load(A + s * 8192, &a, full + 8 * s, k * 64, 0, 0, 0);
      tma_load(B + s * 8192, &b, full + 8 * s, k * 64, 0, 0, 0);
    }
    return;
  }
  registers_grow<240>();
  float d[32];
  for (int k = 0; k < steps; ++k) {
    const uint32_t s = uint32_t(k) % 2, round = uint32_t(k) / 2 % 2;
    barrier_wait(full + 8 * s, kMissing == kParity ? round ^ 1 : round);
    wgmma_fence();
    for (uint32_t i = 0; i < 4; ++i)
      wgmma_shared<bf16, 64, false>(d, matrix_descriptor(A + s * 8192 + i * 32, 16),
                                    matrix_descriptor(B + s * 8192 + i * 32, 16), k + int(i) > 0);
    wgmma_commit();
    if (kMissing == kEarlyRelease && t == 128) barrier_arrive(empty + 8 * s);
    if (kMissing != kWgmmaWait) wgmma_wait<0>();
    if (t == 128 && kMissing != kArrival && kMissing != kEarlyRelease) barrier_arrive(empty + 8 * s);
  }
  for (int i = 0; i < 32; ++i)
    store_global(c + ((t - 128) / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * 64 + i / 4 * 8 + t % 4 * 2 + i % 2,
                 d[i]);
}
template <Missing kMissing>
void check_ring() {
  constexpr int kSteps = 5, kDepth = kSteps * 64;
  Numbers<bf16> a(64 * kDepth), b(64 * kDepth, 3);
  Array<float> c(64 * 64);
  TensorMap map_a, map_b;
  expect_ok(encode_map<bf16>(map_a, a.data(), {kDepth, 64, 1, 1}, {1, kDepth, 64 * kDepth, 64 * kDepth}, 64));
  expect_ok(encode_map<bf16>(map_b, b.data(), {kDepth, 64, 1, 1}, {1, kDepth, 64 * kDepth, 64 * kDepth}, 64));
  expect_ok(launch("ring", &ring<kMissing>, 1, 256, 4 * 8192 + 32, nullptr, map_a, map_b, c.data(), kSteps));
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < 64; ++n) {
      double sum = 0;
      for (int k = 0; k < kDepth; ++k)
        sum += to_float(a[size_t(m * kDepth + k)]) * to_float(b[size_t(n * kDepth + k)]);
      expect_equal(c[size_t(m * 64 + n)], sum, "c");
    }
}
TEST(ring_whole) { check_ring<kNothing>(); }
TEST(fault_parity) { check_ring<kParity>(); }
TEST(fault_wgmma_wait) { check_ring<kWgmmaWait>(); }
TEST(fault_empty_barrier) { check_ring<kEmptyBarrier>(); }
TEST(fault_early_release) { check_ring<kEarlyRelease>(); }
TEST(fault_deadlock) { check_ring<kArrival>(); }

// Numbers go from one warpgroup to the other, through one place; in between each works by itself, its warps
// in step.
template <Missing kMissing>
SACCADE_KERNEL(256, 1)
hand_over(float* sums, int steps) {
  const int t = thread_index() % 128, group = thread_index() / 128;
  const uint32_t place = shared_memory() + uint32_t(t) * 4;
  float sum = 0;
  for (int k = 0; k < steps; ++k) {
    for (int i = 0; i < 8; ++i) named_barrier_sync(1 + group, 128);
    if (group == 0) {
      if (kMissing != kHandBack && k > 0) named_barrier_sync(4, 256);
      store_shared(place, float(k * 128 + t));
      named_barrier_arrive(3, 256);
    } else {
      named_barrier_sync(3, 256);
      sum += load_shared<float>(place);
      if (kMissing != kHandBack && k + 1 < steps) named_barrier_arrive(4, 256);
    }
  }
  if (group) store_global(sums + t, sum);
}
template <Missing kMissing>
void check_hand_over() {
  Array<float> sums(128);
  expect_ok(launch("hand_over", &hand_over<kMissing>, 1, 256, 512, nullptr, sums.data(), 3));
  for (int t = 0; t < 128; ++t) expect_equal(sums[size_t(t)], 3 * (128 + t), "sum");
}
TEST(hand_over_whole) { check_hand_over<kNothing>(); }
TEST(fault_hand_back) { check_hand_over<kHandBack>(); }

// The operand's registers must keep their numbers until the wait.
template <Missing kMissing>
SACCADE_KERNEL(128, 1)
reuse(SACCADE_PARAM TensorMap b, float* c) {
  const uint32_t B = shared_memory(), barrier = B + 8192;
  if (thread_index() == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_expect(barrier, 8192);
    tma_load(B, &b, barrier, 0, 0, 0, 0);
  }
  sync_threads();
  barrier_wait(barrier, 0);
  float d[32];
  uint32_t ones[4];
  for (uint32_t& x : ones) x = pack<bf16>(1, 1);
  wgmma_fence();
  wgmma_registers<bf16, 64, false>(d, ones, matrix_descriptor(B, 16), false);
  wgmma_commit();
  if (kMissing != kRegisterReuse) wgmma_wait<0>();
  for (uint32_t& x : ones) x = 0;
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) store_global(c + thread_index() * 32 + i, d[i] + float(ones[i % 4]));
}
template <Missing kMissing>
void check_reuse() {
  Numbers<bf16> b(64 * 64);
  Array<float> c(128 * 32);
  TensorMap map;
  expect_ok(encode_map<bf16>(map, b.data(), {64, 64, 1, 1}, {1, 64, 4096, 4096}, 64));
  expect_ok(launch("reuse", &reuse<kMissing>, 1, 128, 8192 + 16, nullptr, map, c.data()));
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < 32; ++i) {
      double sum = 0;
      for (int k = 0; k < 16; ++k) sum += to_float(b[size_t((i / 4 * 8 + t % 4 * 2 + i % 2) * 64 + k)]);
      expect_equal(c[size_t(t * 32 + i)], sum, "c");
    }
}
TEST(reuse_whole) { check_reuse<kNothing>(); }
TEST(fault_register_reuse) { check_reuse<kRegisterReuse>(); }
