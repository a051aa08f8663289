// Each wrapper of the device layer that every GPU has, against plain C++: in the simulator, and on a GPU
// (tests/test_gpu_wrappers.py).

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
        sum += value(a[size_t(m * 16 + k)]) * value(b[size_t(kTransposed ? k * 16 + n : n * 16 + k)]);
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

// ---- numbers: 12 threads round theirs, by itself and as a pair ----

template <typename T>
SACCADE_KERNEL(32, 1)
round_numbers(const float* numbers, int count, float* single, float* pair) {
  const int t = thread_index();
  if (t >= count) return;
  const float x = load_global(numbers + t), next = load_global(numbers + (t + 1) % count);
  store_global(single + t, to_float(from_float<T>(x)));
  const uint32_t both = pack<T>(x, next);
  store_global(pair + 2 * t, bits_to_float<T>(uint16_t(both)));
  store_global(pair + 2 * t + 1, bits_to_float<T>(uint16_t(both >> 16)));
}
template <typename T>
void check_rounding(const float (&wanted)[12], float error) {
  const float numbers[] = {0,     1,     -2.5f,   1.00390625f, 1.01171875f, 65519,
                           65520, 6e-8f, 2.9e-8f, 5.96e-5f,    1e30f,       -INFINITY};
  Array<float> from(12), single(12), pair(24);
  for (size_t i = 0; i < 12; ++i) from[i] = numbers[i];
  expect_ok(launch("round_numbers", &round_numbers<T>, 1, 32, 0, nullptr, from.data(), 12, single.data(),
                   pair.data()));
  for (size_t i = 0; i < 12; ++i) {
    const float got = single[i];
    expect(fabsf(got - wanted[i]) <= error * fabsf(got) || got == wanted[i],
           "of " + std::to_string(numbers[i]));
    expect(pair[2 * i] == got && pair[(2 * i + 23) % 24] == got, "packed " + std::to_string(numbers[i]));
  }
}
TEST(rounding_fp16) {
  check_rounding<fp16>({0, 1, -2.5f, 1.00390625f, 1.01171875f, 65504, INFINITY, 5.9604645e-8f, 0,
                        5.9604645e-5f, INFINITY, -INFINITY},
                       1e-3f);
}
TEST(rounding_bf16) {
  check_rounding<bf16>({0, 1, -2.5f, 1, 1.015625f, 65536, 65536, 5.9837475e-8f, 2.8987415e-8f, 5.9604645e-5f,
                        1.0000362e30f, -INFINITY},
                       5e-3f);
}

SACCADE_KERNEL(32, 1) fp16_round_trip(int* wrong) {
  int mine = 0;
  for (uint32_t bits = uint32_t(thread_index()); bits < 0x7C00; bits += 32)
    mine += (pack<fp16>(bits_to_float<fp16>(uint16_t(bits)), 0) & 0xFFFF) != bits;
  const float half = to_float(from_float<fp16>(NAN)), brain = to_float(from_float<bf16>(NAN));
  store_global(wrong + thread_index(), mine + (half == half) + (brain == brain));
}
TEST(every_fp16) {
  Array<int> wrong(32);
  expect_ok(launch("fp16_round_trip", &fp16_round_trip, 1, 32, 0, nullptr, wrong.data()));
  for (size_t i = 0; i < 32; ++i) expect_equal(wrong[i], 0, "changed");
}

SACCADE_KERNEL(32, 1) approximate(const float* x, float* powers, float* inverses) {
  const int t = thread_index();
  store_global(powers + t, exp2_approx(load_global(x + t)));
  store_global(inverses + t, reciprocal_approx(load_global(x + t)));
}
TEST(approximations) {
  Array<float> x(32), powers(32), inverses(32);
  for (int i = 0; i < 32; ++i) x[size_t(i)] = i == 31 ? -INFINITY : float(i - 16) * 1.37f + 0.5f;
  expect_ok(launch("approximate", &approximate, 1, 32, 0, nullptr, x.data(), powers.data(), inverses.data()));
  for (size_t i = 0; i < 32; ++i) {
    expect_equal(powers[i], exp2(double(x[i])), "power");
    expect_equal(inverses[i], 1 / double(x[i]), "inverse");
  }
}

// ---- blocks, loads by type, more shared memory than comes unasked ----

constexpr int kMuchShared = 64 << 10;
SACCADE_KERNEL(64, 1) number_blocks(const bool* flags, const int64_t* longs, int64_t* to) {
  const int t = thread_index();
  const uint32_t mine = shared_memory() + kMuchShared - 256 + uint32_t(t) * 4;
  store_shared<int>(mine, t);
  sync_threads();
  const int other = load_shared<int>(mine ^ 4);
  const int64_t sum = load_global(longs + t) + (load_global(flags + t) ? 1 : 0) + other;
  store_global(to + block_index() * 64 + t, sum * 10 + block_count());
}
TEST(blocks_and_loads) {
  Array<bool> flags(64);
  Array<int64_t> longs(64), to(5 * 64);
  for (size_t i = 0; i < 64; ++i) {
    flags[i] = i % 3 == 0;
    longs[i] = (int64_t(1) << 40) + int64_t(i);
  }
  expect_ok(launch("number_blocks", &number_blocks, 5, 64, kMuchShared, nullptr, flags.data(), longs.data(),
                   to.data()));
  for (int i = 0; i < 5 * 64; ++i) {
    const int t = i % 64;
    expect(to[size_t(i)] == (longs[size_t(t)] + (t % 3 == 0) + (t ^ 1)) * 10 + 5, "a block's numbers");
  }
}
TEST(fill) {
  Numbers<float> x(100);
  expect_ok(fill_zero(x.data(), 99 * sizeof(float), nullptr));
  for (size_t i = 0; i < 99; ++i) expect_equal(x[i], 0, "filled");
  expect_equal(x[99], number(99), "left");
}
