// Each wrapper that Hopper adds, against plain C++: in the simulator, and on a GPU
// (tests/test_gpu_wrappers.py).
#include "check.h"

using namespace saccade;

// ---- TMA: a box of a 4-D tensor in, out again and summed ----

SACCADE_KERNEL(128, 1)
tma_round_trip(SACCADE_PARAM TensorMap in, SACCADE_PARAM TensorMap out, float* sums, int row) {
  const uint32_t tile = shared_memory(), barrier = tile + 8192, numbers = barrier + 16;
  const int t = thread_index();
  if (t == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  sync_threads();
  if (t == 0) {
    barrier_expect(barrier, 8192);
    tma_load(tile, &in, barrier, 32, row, 1, 1);
  }
  barrier_wait(barrier, 0);
  store_shared<float>(numbers + uint32_t(t) * 4, to_float(load_shared<bf16>(tile + uint32_t(t) * 64)));
  async_fence();
  sync_threads();
  if (t == 0) {
    tma_store(&out, tile, 32, row, 1, 1);
    bulk_reduce_add(sums, numbers, 512);
    bulk_commit();
    bulk_wait<0>();
  }
}
TEST(tma_load_store_reduce) {
  constexpr int D = 80, S = 70, H = 2, B = 2, row = 40;
  Numbers<bf16> in(D * S * H * B);
  Array<bf16> out(in.size());
  Array<float> sums(128);
  for (size_t i = 0; i < 128; ++i) sums[i] = float(i);
  const int64_t size[4] = {D, S, H, B}, stride[4] = {1, D, D * S, D * S * H};
  TensorMap from, to;
  expect_ok(encode_map<bf16>(from, in.data(), size, stride, 64));
  expect_ok(encode_map<bf16>(to, out.data(), size, stride, 64));
  expect_ok(launch("round_trip", &tma_round_trip, 1, 128, 9216, nullptr, from, to, sums.data(), row));
  for (int i = 0; i < D * S * H * B; ++i) {
    const int d = i % D, s = i / D % S;
    const bool inside = d >= 32 && s >= row && i / (D * S) == 3;
    expect_equal(value(out[size_t(i)]), inside ? value(in[size_t(i)]) : 0, "stored");
  }
  for (int t = 0; t < 128; ++t) {
    // Thread t read the 64 bytes at t * 64 of the tile: line t / 2, 16-byte chunk 4 (t & 1) under the
    // swizzle.
    const int line = t / 2, d = 32 + ((t % 2 * 4) ^ (line % 8)) * 8, s = row + line;
    const float x = d < D && s < S ? value(in[size_t(((3 * S) + s) * D + d)]) : 0;
    expect_equal(sums[size_t(t)], float(t) + x, "summed");
  }
}

// ---- wgmma, operands placed by TMA ----

template <typename T, int N, bool kTransposed, bool kRegisters, bool kTransposedA = false>
SACCADE_KERNEL(128, 1)
multiply_64xNx64(SACCADE_PARAM TensorMap a, SACCADE_PARAM TensorMap b, const T* rows, float* c) {
  constexpr int kPanels = kTransposed ? N / 64 : 1, kRows = kTransposed ? 64 : N;
  const uint32_t A = shared_memory(), B = A + 8192, barrier = B + kPanels * kRows * 128;
  const int t = thread_index();
  if (t == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  sync_threads();
  if (t == 0) {
    barrier_expect(barrier, 8192 + kPanels * kRows * 128);
    tma_load(A, &a, barrier, 0, 0, 0, 0);
    for (int p = 0; p < kPanels; ++p) tma_load(B + uint32_t(p) * kRows * 128, &b, barrier, p * 64, 0, 0, 0);
  }
  float d[N / 2];
  uint32_t f[4][4];
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < 4; ++i) {
      const T* at = rows + (t / 32 * 16 + t % 32 / 4 + i % 2 * 8) * 64 + k * 16 + t % 4 * 2 + i / 2 * 8;
      f[k][i] = pack<T>(to_float(load_global(at)), to_float(load_global(at + 1)));
    }
  barrier_wait(barrier, 0);
  wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const uint64_t desc_b =
        matrix_descriptor(B + uint32_t(k) * (kTransposed ? 2048 : 32), kTransposed ? 8192 : 16);
    if (kRegisters)
      wgmma_registers<T, N, kTransposed>(d, f[k], desc_b, k > 0);
    else
      wgmma_shared<T, N, kTransposed, kTransposedA>(
          d, matrix_descriptor(A + uint32_t(k) * (kTransposedA ? 2048 : 32), 16), desc_b, k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i)
    store_global(c + (t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + t % 4 * 2 + i % 2, d[i]);
}
template <typename T, int N, bool kTransposed, bool kRegisters, bool kTransposedA = false>
void check_wgmma() {
  Numbers<T> a(64 * 64), b(64 * size_t{N}, 3);
  Array<float> c(64 * size_t{N});
  TensorMap map_a, map_b;
  const int64_t columns = kTransposed ? N : 64, lines = kTransposed ? 64 : N;
  expect_ok(encode_map<T>(map_a, a.data(), {64, 64, 1, 1}, {1, 64, 4096, 4096}, 64));
  expect_ok(encode_map<T>(map_b, b.data(), {columns, lines, 1, 1}, {1, columns, 64 * N, 64 * N}, int(lines)));
  expect_ok(launch("wgmma", &multiply_64xNx64<T, N, kTransposed, kRegisters, kTransposedA>, 1, 128,
                   8192 + N * 128 + 16, nullptr, map_a, map_b, a.data(), c.data()));
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < N; ++n) {
      double sum = 0;
      for (int k = 0; k < 64; ++k)
        sum += value(a[size_t(kTransposedA ? k * 64 + m : m * 64 + k)]) *
               value(b[size_t(kTransposed ? k * N + n : n * 64 + k)]);
      expect_equal(c[size_t(m * N + n)], sum, "d");
    }
}
TEST(wgmma_64) { check_wgmma<bf16, 64, false, false>(); }
TEST(wgmma_128_fp16) { check_wgmma<fp16, 128, false, false>(); }
TEST(wgmma_256_registers) { check_wgmma<bf16, 256, false, true>(); }
TEST(wgmma_64_transposed_registers) { check_wgmma<fp16, 64, true, true>(); }
TEST(wgmma_128_transposed_registers) { check_wgmma<bf16, 128, true, true>(); }
TEST(wgmma_256_transposed) { check_wgmma<bf16, 256, true, false>(); }
TEST(wgmma_32) { check_wgmma<fp16, 32, false, false>(); }
TEST(wgmma_64_both_transposed) { check_wgmma<bf16, 64, true, false, true>(); }
TEST(wgmma_128_both_transposed) { check_wgmma<fp16, 128, true, false, true>(); }

// ---- bulk load: a run of numbers ----

SACCADE_KERNEL(32, 1) load_run(const float* from, float* to) {
  const uint32_t run = shared_memory(), barrier = run + 128;
  const int t = thread_index();
  if (t == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_expect(barrier, 128);
    bulk_load(run, from, barrier, 128);
  }
  sync_threads();
  barrier_wait(barrier, 0);
  store_global(to + t, load_shared<float>(run + uint32_t(t) * 4));
}
TEST(bulk_load_run) {
  Numbers<float> from(40);
  Array<float> to(32);
  expect_ok(launch("load_run", &load_run, 1, 32, 256, nullptr, from.data() + 8, to.data()));
  for (size_t t = 0; t < 32; ++t) expect_equal(to[t], from[t + 8], "loaded");
}

// ---- two products under way, and registers that change hands ----

SACCADE_KERNEL(128, 1)
two_products(SACCADE_PARAM TensorMap a, SACCADE_PARAM TensorMap b, float* first, float* second) {
  const uint32_t A = shared_memory(), B = A + 8192, barrier = B + 8192;
  const int t = thread_index();
  if (t == 0) {
    prefetch_map(&a);
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  sync_threads();
  if (t == 0) {
    barrier_expect(barrier, 16384);
    tma_load(A, &a, barrier, 0, 0, 0, 0);
    tma_load(B, &b, barrier, 0, 0, 0, 0);
  }
  barrier_wait(barrier, 0);
  float c[32], d[32];
  wgmma_fence();
  wgmma_shared<bf16, 64, false>(c, matrix_descriptor(A, 16), matrix_descriptor(B, 16), false);
  wgmma_commit();
  wgmma_shared<bf16, 64, false>(d, matrix_descriptor(A + 32, 16), matrix_descriptor(B + 32, 16), false);
  wgmma_commit();
  const int at = (t / 32 * 16 + t % 32 / 4) * 64 + t % 4 * 2;
  wgmma_wait<1>();
  wgmma_hold(c);
  for (int i = 0; i < 32; ++i) store_global(first + at + i / 2 % 2 * 512 + i / 4 * 8 + i % 2, c[i]);
  wgmma_wait<0>();
  wgmma_hold(d);
  for (int i = 0; i < 32; ++i) store_global(second + at + i / 2 % 2 * 512 + i / 4 * 8 + i % 2, d[i]);
}
TEST(wgmma_groups) {
  Numbers<bf16> a(64 * 64), b(64 * 64, 3);
  Array<float> sums[2] = {Array<float>(64 * 64), Array<float>(64 * 64)};
  TensorMap map_a, map_b;
  expect_ok(encode_map<bf16>(map_a, a.data(), {64, 64, 1, 1}, {1, 64, 4096, 4096}, 64));
  expect_ok(encode_map<bf16>(map_b, b.data(), {64, 64, 1, 1}, {1, 64, 4096, 4096}, 64));
  expect_ok(launch("two_products", &two_products, 1, 128, 16384 + 16, nullptr, map_a, map_b, sums[0].data(),
                   sums[1].data()));
  for (size_t half = 0; half < 2; ++half)
    for (size_t i = 0; i < 64 * 64; ++i) {
      double sum = 0;
      for (size_t k = 16 * half; k < 16 * half + 16; ++k)
        sum += value(a[i / 64 * 64 + k]) * value(b[i % 64 * 64 + k]);
      expect_equal(sums[half][i], sum, "product");
    }
}

SACCADE_KERNEL(384, 1) share_registers(int* to) {
  const int t = thread_index();
  if (t < 128) {
    registers_shrink<24>();
    named_barrier_arrive(1, 384);
    store_global(to + t, t);
    return;
  }
  registers_grow<240>();
  named_barrier_sync(1, 384);
  store_global(to + t, t);
}
TEST(registers_change_hands) {
  Array<int> to(384);
  expect_ok(launch("share_registers", &share_registers, 1, 384, 0, nullptr, to.data()));
  for (size_t t = 0; t < 384; ++t) expect_equal(to[t], double(t), "thread");
}
