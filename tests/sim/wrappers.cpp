// Each wrapper of the device layer against plain C++.
#include <memory>

#include "check.h"

using namespace saccade;

// ---- mma.sync and ldmatrix: C = A B^T and C = A B ----

template <typename T, bool kTransposed>
SACCADE_KERNEL(32, 1)
multiply_16x16x16(const T* a, const T* b, float* c) {
  const uint32_t A = shared_memory(), B = A + 512;
  const int l = thread_index();
  for (int i = l; i < 32; i += 32) {
    copy_async(A + uint32_t(i) * 16, a + i * 8, 16);
    copy_async(B + uint32_t(i) * 16, b + i * 8, 16);
  }
  copy_commit();
  copy_wait<0>();
  sync_warp();
  uint32_t fa[4], fb[4];
  load_matrix_x4<false>(A + uint32_t(l % 16 * 32 + l / 16 * 16), fa);
  if (kTransposed)
    load_matrix_x4<true>(B + uint32_t(l % 16 * 32 + l / 16 * 16), fb);
  else
    load_matrix_x4<false>(B + uint32_t((l / 16 * 8 + l % 8) * 32 + l / 8 % 2 * 16), fb);
  for (int n = 0; n < 2; ++n) {
    float sum[4] = {1, 1, 1, 1};
    mma_16x8x16<T>(sum, fa, fb[2 * n], fb[2 * n + 1]);
    for (int i = 0; i < 4; ++i)
      store_global(c + (l / 4 + i / 2 * 8) * 16 + n * 8 + l % 4 * 2 + i % 2, sum[i]);
  }
}
template <typename T, bool kTransposed>
void check_multiply() {
  Numbers<T> a(256), b(256, 5);
  Array<float> c(256);
  expect_ok(launch("multiply", &multiply_16x16x16<T, kTransposed>, 1, 32, 1024, nullptr, a.data(), b.data(),
                   c.data()));
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      double sum = 1;
      for (int k = 0; k < 16; ++k)
        sum += to_float(a[size_t(m * 16 + k)]) * to_float(b[size_t(kTransposed ? k * 16 + n : n * 16 + k)]);
      expect_equal(c[size_t(m * 16 + n)], sum, "c");
    }
}
TEST(mma_bf16) { check_multiply<bf16, false>(); }
TEST(mma_bf16_transposed) { check_multiply<bf16, true>(); }
TEST(mma_fp16) { check_multiply<fp16, false>(); }
TEST(mma_fp16_transposed) { check_multiply<fp16, true>(); }

// ---- cp.async: part of the 16 bytes, the rest zero ----

SACCADE_KERNEL(32, 1) copy_parts(const uint16_t* from, uint16_t* to) {
  const int l = thread_index();
  copy_async(shared_memory() + uint32_t(l) * 16, from + l * 8, l % 9 * 2);
  copy_commit();
  copy_async(shared_memory() + 512, from, 16);
  copy_commit();
  copy_wait<1>();
  for (int i = 0; i < 8; ++i)
    store_global(to + l * 8 + i, load_shared<uint16_t>(shared_memory() + uint32_t(l * 16 + i * 2)));
}
TEST(cp_async_parts) {
  Array<uint16_t> from(256), to(256);
  for (size_t i = 0; i < 256; ++i) from[i] = uint16_t(i + 1);
  expect_ok(launch("copy", &copy_parts, 1, 32, 1024, nullptr, from.data(), to.data()));
  for (int i = 0; i < 256; ++i) expect_equal(to[size_t(i)], i % 8 < i / 8 % 9 ? i + 1 : 0, "copied");
}

// ---- shuffles and barriers ----

SACCADE_KERNEL(96, 1) exchange(int* to) {
  const int t = thread_index(), warp = t / 32;
  const int sum = shuffle_xor(t, 5) + shuffle(t, 3);
  // Warps 1 and 2 wait for warp 0, which does not wait for them.
  if (warp == 0) {
    store_shared<int>(shared_memory() + uint32_t(t) * 4, sum);
    named_barrier_arrive(3, 96);
  } else {
    named_barrier_sync(3, 96);
    store_global(to + t, load_shared<int>(shared_memory() + uint32_t(t % 32) * 4));
  }
  sync_threads();
  if (warp == 0) store_global(to + t, sum);
}
TEST(shuffles_and_named_barriers) {
  Array<int> to(96);
  expect_ok(launch("exchange", &exchange, 1, 96, 128, nullptr, to.data()));
  for (int t = 0; t < 96; ++t) expect_equal(to[size_t(t)], (t % 32 ^ 5) + 3, "exchanged");
}

TEST(rounding) {
  const float numbers[] = {0,     1,     -2.5f,   1.00390625f, 1.01171875f, 65519,
                           65520, 6e-8f, 2.9e-8f, 5.96e-5f,    1e30f,       -INFINITY};
  const float as_half[] = {0,        1,        -2.5f,         1.00390625f, 1.01171875f,
                           65504,    INFINITY, 5.9604645e-8f, 0,           5.9604645e-5f,
                           INFINITY, -INFINITY};
  const float as_bf16[] = {0,
                           1,
                           -2.5f,
                           1,
                           1.015625f,
                           65536,
                           65536,
                           5.9837475e-8f,
                           2.8987415e-8f,
                           5.9604645e-5f,
                           1.0000362e30f,
                           -INFINITY};
  for (int i = 0; i < 12; ++i) {
    const float half = to_float(from_float<fp16>(numbers[i])), brain = to_float(from_float<bf16>(numbers[i]));
    expect(fabs(half - as_half[i]) <= 1e-3f * fabsf(half) || half == as_half[i],
           "fp16 of " + std::to_string(numbers[i]));
    expect(fabs(brain - as_bf16[i]) <= 5e-3f * fabsf(brain) || brain == as_bf16[i],
           "bf16 of " + std::to_string(numbers[i]));
  }
  for (uint32_t bits = 0; bits < 0x7C00; ++bits)
    expect(from_float<fp16>(to_float(fp16{uint16_t(bits)})).bits == bits, "fp16 round trip");
  expect(isnan(to_float(from_float<fp16>(NAN))) && isnan(to_float(from_float<bf16>(NAN))), "NaN");
}

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
    expect_equal(to_float(out[size_t(i)]), inside ? to_float(in[size_t(i)]) : 0, "stored");
  }
  for (int t = 0; t < 128; ++t) {
    // Thread t read the 64 bytes at t * 64 of the tile: line t / 2, 16-byte chunk 4 (t & 1) under the
    // swizzle.
    const int line = t / 2, d = 32 + ((t % 2 * 4) ^ (line % 8)) * 8, s = row + line;
    const float x = d < D && s < S ? to_float(in[size_t(((3 * S) + s) * D + d)]) : 0;
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
        sum += to_float(a[size_t(kTransposedA ? k * 64 + m : m * 64 + k)]) *
               to_float(b[size_t(kTransposed ? k * N + n : n * 64 + k)]);
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
