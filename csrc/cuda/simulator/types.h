// 16-bit numbers of the simulated device, with the roundings of the real one.
#pragma once
#include <stdint.h>
#include <string.h>

#include <vector>

namespace saccade {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace sim {

inline uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3FF;
  if (exponent == 31) return float_of(sign | 0x7F800000 | fraction << 13);
  const float magnitude = exponent ? float_of((exponent + 112) << 23 | fraction << 13)
                                   : float(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -magnitude : magnitude;
}
inline uint16_t float_to_half(float f) {
  const uint32_t u = bits_of(f), magnitude = u & 0x7FFFFFFF;
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  if (magnitude > 0x7F800000) return sign | 0x7E00;
  if (magnitude >= 0x477FF000) return sign | 0x7C00;  // rounds beyond 65504
  if (magnitude < 0x38800000) {                       // subnormal: adding 0.5 rounds at 2^-24
    return sign | uint16_t(bits_of(float_of(magnitude) + 0.5f) - 0x3F000000);
  }
  return sign | uint16_t((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace sim

static inline float to_float(bf16 x) { return sim::float_of(uint32_t(x.bits) << 16); }
static inline float to_float(fp16 x) {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (uint32_t i = 0; i < 65536; ++i) t[i] = sim::half_to_float(uint16_t(i));
    return t;
  }();
  return table[x.bits];
}
static inline float to_float(float x) { return x; }

template <typename T>
T from_float(float x);
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = sim::bits_of(x);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return {uint16_t(u >> 16 | 0x40)};
  return {uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  return {sim::float_to_half(x)};
}
template <>
inline float from_float<float>(float x) {
  return x;
}
template <typename T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
template <typename T>
float bits_to_float(uint16_t bits) {
  return to_float(T{bits});
}
// Half 0 or 1 of a register that holds two numbers.
template <typename T>
float unpack(uint32_t pair, int half) {
  return bits_to_float<T>(uint16_t(pair >> (16 * half)));
}

}  // namespace saccade
