// Rows of numbers outside matrix tiles: 16 bytes at a time where they are aligned, else one by one.
#pragma once
#include "tile.h"

namespace saccade {

template <typename T>
constexpr int kVector = 16 / int(sizeof(T));  // numbers of 16 bytes

template <typename T>
bool vectors_aligned(const Rows& x) {
  constexpr int64_t kMany = kVector<T>;
  return x.col == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch % kMany == 0 &&
         x.head % kMany == 0 && x.row % kMany == 0;
}

// Numbers as they lie in memory, in registers of 32 bits: half of what 16-bit numbers would take as fp32.
template <typename T>
struct Packed {
  using Word = uint32_t;
  static constexpr int kCount = 2;  // numbers of a word
  static SACCADE_DEVICE_MEMBER Word none() { return 0; }
  static SACCADE_DEVICE_MEMBER void load(const T* from, Word* to) {
    const uint4 four = load_global(reinterpret_cast<const uint4*>(from));
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
  // One more number behind four words' others, of which the first falls out: a loop of it stays rolled.
  static SACCADE_DEVICE_MEMBER void push(Word* to, const T* from, bool wanted) {
    const uint32_t bits = wanted ? load_global(reinterpret_cast<const uint16_t*>(from)) : 0;
    SACCADE_UNROLL
    for (int n = 0; n < 4; ++n) to[n] = to[n] >> 16 | (n < 3 ? to[n + 1] : bits) << 16;
  }
  static SACCADE_DEVICE_MEMBER float number(const Word* words, int n) {
    return bits_to_float<T>(uint16_t(words[n / 2] >> (16 * (n % 2))));
  }
};
template <>
struct Packed<float> {
  using Word = float;
  static constexpr int kCount = 1;
  static SACCADE_DEVICE_MEMBER Word none() { return 0; }
  static SACCADE_DEVICE_MEMBER void load(const float* from, Word* to) {
    const float4 four = load_global(reinterpret_cast<const float4*>(from));
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
  static SACCADE_DEVICE_MEMBER void push(Word* to, const float* from, bool wanted) {
    const float last = wanted ? load_global(from) : 0;
    SACCADE_UNROLL
    for (int n = 0; n < 4; ++n) to[n] = n < 3 ? to[n + 1] : last;
  }
  static SACCADE_DEVICE_MEMBER float number(const Word* words, int n) { return words[n]; }
};

SACCADE_DEVICE void store_aligned(float* to, const float4& x) {
  store_global(reinterpret_cast<float4*>(to), x);
}
template <typename T>
SACCADE_DEVICE void store_aligned(T* to, const float4& x) {
  store_global(reinterpret_cast<uint2*>(to), uint2{pack<T>(x.x, x.y), pack<T>(x.z, x.w)});
}
// Four columns of a row, of which `left` are there.
template <typename T>
SACCADE_DEVICE void store_four(T* to, int64_t col, int left, bool aligned, const float4& x) {
  if (aligned && left >= 4) {
    store_aligned(to, x);
    return;
  }
  const float numbers[4] = {x.x, x.y, x.z, x.w};
  SACCADE_UNROLL
  for (int c = 0; c < 4; ++c)
    if (c < left) store_global(to + c * col, from_float<T>(numbers[c]));
}

SACCADE_DEVICE float4 times(const float4& x, float factor) {
  return {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
}
SACCADE_DEVICE void add_four(float4& sum, const float4& x, float weight) {
  sum.x += x.x * weight;
  sum.y += x.y * weight;
  sum.z += x.z * weight;
  sum.w += x.w * weight;
}

}  // namespace saccade
