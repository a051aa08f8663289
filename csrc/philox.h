// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): which pairs dropout
// keeps. Key: the 64-bit seed. Counter: (j >> 3, i, h, b). Pair j reads 16-bit lane j & 7: word lane >> 1,
// low half first.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define SACCADE_PHILOX __host__ __device__ static inline
#else
#define SACCADE_PHILOX static inline
#endif

namespace saccade {

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57, kPhiloxW0 = 0x9E3779B9,
                   kPhiloxW1 = 0xBB67AE85;

SACCADE_PHILOX void philox(uint64_t seed, uint32_t c[4]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * c[0], p1 = uint64_t(kPhiloxM1) * c[2];
    const uint32_t hi0 = uint32_t(p0 >> 32), hi1 = uint32_t(p1 >> 32);
    c[0] = hi1 ^ c[1] ^ k0;
    c[1] = uint32_t(p1);
    c[2] = hi0 ^ c[3] ^ k1;
    c[3] = uint32_t(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

SACCADE_PHILOX uint32_t dropout_threshold(double p) { return uint32_t(p * 65536.0 + 0.5); }

SACCADE_PHILOX bool dropout_keeps(uint64_t seed, uint32_t threshold, int64_t b, int64_t h, int64_t i,
                                  int64_t j) {
  uint32_t c[4] = {uint32_t(j >> 3), uint32_t(i), uint32_t(h), uint32_t(b)};
  philox(seed, c);
  const int lane = int(j & 7);
  return ((c[lane >> 1] >> (16 * (lane & 1))) & 0xFFFF) >= threshold;
}

}  // namespace saccade
