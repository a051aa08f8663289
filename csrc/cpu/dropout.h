// Which pairs dropout keeps, a vector of them at a time. The rounds are those of ../philox.h and of
// python/saccade/dropout.py; the tests of dropout compare the three.
#pragma once
#include "../philox.h"
#include "vec.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// Words of 32 bits in the low halves of lanes; what the high halves hold means nothing.
constexpr int kWordLanes = kLanes<double>;
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));

SACCADE_FORCE Words splat_word(uint64_t x) { return Words{} + x; }

// The whole products of the words by m.
SACCADE_FORCE Words wide_product(Words x, uint32_t m) {
#if defined(__AVX512F__)
  // gcc (12) says of _mm512_mul_epu32 that it reads what was never set.
  return Words(_mm512_maskz_mul_epu32(0xFF, __m512i(x), __m512i(splat_word(m))));
#elif defined(__AVX2__)
  return Words(_mm256_mul_epu32(__m256i(x), __m256i(splat_word(m))));
#else
  return (x & 0xFFFFFFFF) * splat_word(m);
#endif
}

SACCADE_FORCE void philox_each(uint64_t seed, Words (&c)[4]) {
  Words k0 = splat_word(uint32_t(seed)), k1 = splat_word(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    const Words a = wide_product(c[0], kPhiloxM0), b = wide_product(c[2], kPhiloxM1);
    c[0] = (b >> 32) ^ c[1] ^ k0;
    c[1] = b;
    c[2] = (a >> 32) ^ c[3] ^ k1;
    c[3] = a;
  }
}

// What a pair's weight is multiplied by: 0 where dropout drops it, 1 / (1 - p) elsewhere.
template <typename T>
class DropoutFactors {
 public:
  DropoutFactors(uint64_t seed, double p)
      : seed_(seed), threshold_(int64_t(dropout_threshold(p))), keep_(1 / (1 - p)) {}

  // The random words of pairs (b, h, i, j) and (b, h, i, j ^ 1), up to j ^ 7: groups of eight keys.
  SACCADE_MEMBER void draw(Words group, Words i, Words h, int64_t b, Words (&c)[4]) const {
    c[0] = group, c[1] = i, c[2] = h, c[3] = splat_word(uint64_t(b));
    philox_each(seed_, c);
  }
  // x[lane] = the factor of key `j` of the group, whose word this is; or x[lane] *= it.
  template <typename J>
  SACCADE_MEMBER void write(Words from, J j, T* x) const {
    const Factors z = of(from, j);
    memcpy(x, &z, sizeof z);
  }
  template <typename J>
  SACCADE_MEMBER void multiply(Words from, J j, T* x) const {
    Factors z;
    memcpy(&z, x, sizeof z);
    z *= of(from, j);
    memcpy(x, &z, sizeof z);
  }

 private:
  typedef T Factors __attribute__((vector_size(sizeof(T) * kWordLanes)));

  template <typename J>
  SACCADE_MEMBER Factors of(Words from, J j) const {
    const VecI<double> number = VecI<double>((from >> ((j & 1) << 4)) & 0xFFFF);
    return __builtin_convertvector(number >= threshold_ ? splat<double>(keep_) : Vec<double>{}, Factors);
  }

  uint64_t seed_;
  int64_t threshold_;
  double keep_;
};

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
