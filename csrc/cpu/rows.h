// Rows of a tensor in any of the four dtypes, read into and written from the accumulator type.
#pragma once
#include "../params.h"
#include "vec.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

template <typename T>
struct RemoveConst;
template <typename T>
struct RemoveConst<const T&> {
  using type = T;
};

using bf16 = uint16_t;  // only ever moved, widened or rounded
struct half_bits {
  uint16_t x;
};

SACCADE_FORCE int64_t size_of(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

SACCADE_FORCE float widen(float x) { return x; }
SACCADE_FORCE double widen(double x) { return x; }
SACCADE_FORCE float widen(bf16 x) { return bits<float>(uint32_t(x) << 16); }
SACCADE_FORCE float widen(half_bits h) {
#if defined(__F16C__)
  return _cvtsh_ss(h.x);
#else
  const uint32_t sign = uint32_t(h.x & 0x8000) << 16, rest = h.x & 0x7FFF;
  if (rest >= 0x7C00) return bits<float>(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  if (rest >= 0x400) return bits<float>(sign | ((rest << 13) + 0x38000000));
  const float tiny = float(rest) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -tiny : tiny;
#endif
}

SACCADE_FORCE void narrow(float x, float& out) { out = x; }
SACCADE_FORCE void narrow(double x, double& out) { out = x; }
SACCADE_FORCE void narrow(double x, float& out) { out = float(x); }
SACCADE_FORCE void narrow(float x, double& out) { out = x; }
SACCADE_FORCE void narrow(float x, bf16& out) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  out = uint16_t((u & 0x7FFFFFFF) > 0x7F800000 ? (u >> 16) | 0x40 : rounded);
}
SACCADE_FORCE void narrow(float x, half_bits& out) {
#if defined(__F16C__)
  out.x = uint16_t(_cvtss_sh(x, 0));
#else
  const uint32_t u = bits<uint32_t>(x), sign = (u >> 16) & 0x8000, a = u & 0x7FFFFFFF;
  if (a > 0x7F800000) {
    out.x = uint16_t(sign | 0x7E00);
  } else if (a >= 0x477FF000) {
    out.x = uint16_t(sign | 0x7C00);
  } else if (a < 0x38800000) {  // below the smallest normal half: let the addition round
    out.x = uint16_t(sign | (bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3F000000));
  } else {
    out.x = uint16_t(sign | ((a + 0xC8000FFF + ((a >> 13) & 1)) >> 13));
  }
#endif
}
SACCADE_FORCE void narrow(double x, bf16& out) { narrow(float(x), out); }
SACCADE_FORCE void narrow(double x, half_bits& out) { narrow(float(x), out); }

// f(pointer of the storage type) for the dtype at hand: the one switch over dtypes.
template <typename F>
SACCADE_FORCE void with_dtype(DType t, const void* p, F f) {
  switch (t) {
    case DType::kFloat64:
      f(static_cast<const double*>(p));
      break;
    case DType::kFloat32:
      f(static_cast<const float*>(p));
      break;
    case DType::kBFloat16:
      f(static_cast<const bf16*>(p));
      break;
    case DType::kFloat16:
      f(static_cast<const half_bits*>(p));
      break;
  }
}

#if defined(__F16C__)
SACCADE_FORCE void read_contiguous(float* dst, const half_bits* s, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i))));
  for (; i < n; ++i) dst[i] = widen(s[i]);
}
#endif
template <typename T, typename S>
SACCADE_FORCE void read_contiguous(T* __restrict__ dst, const S* __restrict__ s, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = T(widen(s[i]));
}

// dst[0..n) = n elements `stride` apart.
template <typename T>
static void read_row(T* dst, const void* src, DType t, int64_t stride, int64_t n) {
  with_dtype(t, src, [&](auto* s) {
    if (stride == 1) {
      read_contiguous(dst, s, n);
    } else {
      for (int64_t i = 0; i < n; ++i) dst[i] = T(widen(s[i * stride]));
    }
  });
}

template <typename T>
static void write_row(void* dst, DType t, int64_t stride, const T* __restrict__ src, int64_t n) {
  with_dtype(t, dst, [&](auto* d) {
    auto* out = const_cast<typename RemoveConst<decltype(*d)>::type*>(d);
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) narrow(src[i], out[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) narrow(src[i], out[i * stride]);
    }
  });
}

// kLanes<T> elements of storage type S as accumulators.
template <typename T>
SACCADE_FORCE Vec<T> load_as(const T* p) {
  return load(p);
}
template <typename T>
SACCADE_FORCE Vec<T> load_as(const bf16* p) {
  static_assert(sizeof(T) == 4, "bf16 accumulates in float");
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  Half h;
  memcpy(&h, p, sizeof h);
  return bits<Vec<float>>(__builtin_convertvector(h, typename VecOf<float>::U) << 16);
}
template <typename T>
SACCADE_FORCE Vec<T> load_as(const half_bits* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<T> v;
  for (int l = 0; l < kLanes<T>; ++l) v[l] = widen(p[l]);
  return v;
#endif
}
// The first n of them, the rest 0.
template <typename T, typename S>
SACCADE_FORCE Vec<T> load_part(const S* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 8) return _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
  if constexpr (sizeof(S) == 4) return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#endif
  Vec<T> v{};
  for (int64_t l = 0; l < n; ++l) v[int(l)] = T(widen(p[l]));
  return v;
}
// Partial sums of x . row, one per lane.
template <typename T, typename S>
SACCADE_FORCE Vec<T> dot_part(const T* x, const S* row, int64_t d) {
  constexpr int L = kLanes<T>;
  Vec<T> sum{};
  int64_t c = 0;
  for (; c + L <= d; c += L) sum += load(x + c) * load_as<T>(row + c);
  if (c < d) sum += load_part<T>(x + c, d - c) * load_part<T>(row + c, d - c);
  return sum;
}
// S[j][i] = key(j) . query_i for the few rows of a narrow block, lanes along d: kLanes keys at a time are
// summed together. key(j) points to a contiguous row. Lanes of S beyond `rows` become 0.
template <typename T, typename Key>
static void dot_scores(int64_t n, int64_t rows, int64_t lanes, int64_t d, Key key, const T* queries,
                       int64_t ldq, T* S) {
  constexpr int L = kLanes<T>;
  for (int64_t j = 0; j < n; ++j) memset(S + j * lanes + rows, 0, size_t(lanes - rows) * sizeof(T));
  for (int64_t j0 = 0; j0 < n; j0 += L)
    for (int64_t i = 0; i < rows; ++i) {
      Vec<T> sums[L];
      for (int l = 0; l < L; ++l)
        sums[l] = j0 + l < n ? dot_part<T>(queries + i * ldq, key(j0 + l), d) : Vec<T>{};
      const Vec<T> total = sum_each<T, L>(sums);
      for (int l = 0; l < L && j0 + l < n; ++l) S[(j0 + l) * lanes + i] = total[l];
    }
}

SACCADE_FORCE char* row_at(const Rows& x, int64_t b, int64_t h, int64_t i) {
  return static_cast<char*>(x.data) + (b * x.batch + h * x.head + i * x.row) * size_of(x.dtype);
}

// Key or value row j of sequence b: in a cache it may lie on a page or in another beam's row.
SACCADE_FORCE const char* cache_row(const Params& p, const Rows& x, const Sequence& s, int64_t b, int64_t h,
                                    int64_t j) {
  int64_t batch = p.beam ? p.beam[b * p.beam_batch + j] : b;
  int64_t row = s.k_begin + j;
  if (p.page_table) {
    batch = p.page_table[batch * p.page_table_batch + j / p.page_size];
    row = j % p.page_size;
  }
  return row_at(x, batch, h, row);
}
SACCADE_FORCE bool scattered(const Params& p) { return p.page_table || p.beam; }

template <typename T>
struct AccumulatorOf;
template <>
struct AccumulatorOf<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct AccumulatorOf<double> {
  static constexpr DType value = DType::kFloat64;
};

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
