// Planted faults: numbers that threads store reach the copy engine and wgmma without a fence between.
#include "../sim/check.h"

using namespace saccade;

enum Missing { kNothing, kBarrierFence, kProductFence, kStoreFence, kReduceFence };

// A tile of ones goes through threads: times a tile that TMA brings, out by TMA, and added to sums.
template <Missing kMissing>
SACCADE_KERNEL(128, 1)
through_threads(SACCADE_PARAM TensorMap b, SACCADE_PARAM TensorMap out, float* c, float* sums) {
  const uint32_t A = shared_memory(), B = A + 8192, staged = B + 8192, numbers = staged + 8192;
  const uint32_t barrier = numbers + 512;
  const int t = thread_index();
  if (t == 0) {
    barrier_init(barrier, 1);
    if (kMissing != kBarrierFence) barrier_init_fence();
    barrier_expect(barrier, 8192);
    tma_load(B, &b, barrier, 0, 0, 0, 0);
  }
  for (uint32_t i = 0; i < 16; ++i) store_shared<uint32_t>(A + i * 512 + uint32_t(t) * 4, pack<bf16>(1, 1));
  if (kMissing != kProductFence) async_fence();
  sync_threads();
  barrier_wait(barrier, 0);
  float d[32];
  wgmma_fence();
  for (uint32_t k = 0; k < 4; ++k)
    wgmma_shared<bf16, 64, false>(d, matrix_descriptor(A + k * 32, 16), matrix_descriptor(B + k * 32, 16),
                                  k > 0);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i)
    store_global(c + (t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * 64 + i / 4 * 8 + t % 4 * 2 + i % 2, d[i]);
  store_shared(numbers + uint32_t(t) * 4, float(t));
  if (kMissing != kReduceFence) async_fence();
  for (uint32_t i = 0; i < 16; ++i)
    store_shared<uint32_t>(staged + i * 512 + uint32_t(t) * 4, pack<bf16>(2, 2));
  if (kMissing != kReduceFence && kMissing != kStoreFence) async_fence();
  sync_threads();
  if (t == 0) {
    bulk_reduce_add(sums, numbers, 512);
    tma_store(&out, staged, 0, 0, 0, 0);
    bulk_commit();
    bulk_wait<0>();
  }
}
template <Missing kMissing>
void check_fences() {
  Numbers<bf16> b(64 * 64);
  Array<bf16> out(64 * 64);
  Array<float> c(64 * 64), sums(128);
  TensorMap map_b, map_out;
  expect_ok(encode_map<bf16>(map_b, b.data(), {64, 64, 1, 1}, {1, 64, 4096, 4096}, 64));
  expect_ok(encode_map<bf16>(map_out, out.data(), {64, 64, 1, 1}, {1, 64, 4096, 4096}, 64));
  expect_ok(launch("through_threads", &through_threads<kMissing>, 1, 128, 3 * 8192 + 512 + 16, nullptr, map_b,
                   map_out, c.data(), sums.data()));
  for (size_t i = 0; i < 64 * 64; ++i) {
    double sum = 0;
    for (size_t k = 0; k < 64; ++k) sum += value(b[i % 64 * 64 + k]);
    expect_equal(c[i], sum, "product");
    expect_equal(value(out[i]), 2, "stored");
  }
  for (size_t t = 0; t < 128; ++t) expect_equal(sums[t], double(t), "summed");
}
TEST(every_fence_is_there) { check_fences<kNothing>(); }
TEST(fault_barrier_fence) { check_fences<kBarrierFence>(); }
TEST(fault_product_fence) { check_fences<kProductFence>(); }
TEST(fault_store_fence) { check_fences<kStoreFence>(); }
TEST(fault_reduce_fence) { check_fences<kReduceFence>(); }
