// Vectors in the language's own extension, so that one source serves every instruction set. Compiled once per
// set, in a namespace of its own: nothing here may become a weak symbol that another set's objects would
// share.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SACCADE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SACCADE_VECTOR_BYTES 32
#else
#define SACCADE_VECTOR_BYTES 16
#endif

namespace saccade {
namespace SACCADE_ISA {
namespace {

constexpr int kVectorBytes = SACCADE_VECTOR_BYTES;
template <typename T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
  using Int = int32_t;
#if defined(__AVX512F__)
  using Bits = uint16_t;  // one for each lane
#else
  using Bits = uint8_t;
#endif
};
template <>
struct VecOf<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t U __attribute__((vector_size(kVectorBytes)));
  using Int = int64_t;
  using Bits = uint8_t;
};
template <typename T>
using Vec = typename VecOf<T>::V;
template <typename T>
using VecI = typename VecOf<T>::I;
template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

#define SACCADE_FORCE static inline __attribute__((always_inline))
#define SACCADE_MEMBER inline __attribute__((always_inline))
// A loop that has registers of its own: put into its caller it would have what that leaves.
#define SACCADE_APART __attribute__((noinline))

template <typename T>
SACCADE_FORCE Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
SACCADE_FORCE void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof v);
}
// To memory, past the caches, which then need not read what is overwritten; p lies on a vector's boundary.
// Others see it after a fence.
template <typename T>
SACCADE_FORCE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), __m512i(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), __m256i(v));
#else
  store(p, v);
#endif
}
SACCADE_FORCE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
template <typename T>
SACCADE_FORCE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}
template <typename T>
SACCADE_FORCE VecI<T> iota() {
  VecI<T> v;
  for (int l = 0; l < kLanes<T>; ++l) v[l] = l;
  return v;
}
template <typename T>
SACCADE_FORCE Vec<T> vmax(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <typename I>
SACCADE_FORCE bool any_lane(I mask) {
  uint64_t words[sizeof mask / 8], any = 0;
  memcpy(words, &mask, sizeof mask);
  for (uint64_t word : words) any |= word;
  return any != 0;
}
// A mask as bits, one for each lane, the lowest first; and the mask again.
template <typename T>
using MaskBits = typename VecOf<T>::Bits;
template <typename T>
SACCADE_FORCE MaskBits<T> pack_mask(VecI<T> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask(__m512i(mask));
  return MaskBits<T>(_mm512_movepi64_mask(__m512i(mask)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return MaskBits<T>(_mm256_movemask_ps(__m256(mask)));
  return MaskBits<T>(_mm256_movemask_pd(__m256d(mask)));
#else
  unsigned all = 0;
  for (int l = 0; l < kLanes<T>; ++l) all |= unsigned(mask[l] & 1) << l;
  return MaskBits<T>(all);
#endif
}
template <typename T>
SACCADE_FORCE VecI<T> unpack_mask(MaskBits<T> packed) {
  using Int = typename VecOf<T>::Int;
  return ((VecI<T>{} + Int(packed)) & (Int(1) << iota<T>())) != 0;
}
template <typename To, typename From>
SACCADE_FORCE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "a change of type, not of value");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <typename T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr int kTerms = 6, kMantissa = 23, kBias = 127;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float c[kTerms] = {0.00015453162945120691f, 0.0013390863364666712f, 0.0096180825572773315f,
                                      0.055503571142198082f,   0.24022650760568126f,   0.69314718802622876f};
};
template <>
struct Exp2<double> {
  static constexpr int kTerms = 11, kMantissa = 52, kBias = 1023;
  static constexpr double kMagic = 6755399441055744.0;
  static constexpr double c[kTerms] = {4.4549605981865184e-10, 7.0725859492692237e-09, 1.0178062445845774e-07,
                                       1.3215442587921690e-06, 1.5252733829836118e-05, 1.5403530440736051e-04,
                                       1.3333558146416935e-03, 9.6181291076068885e-03, 5.5504108664821594e-02,
                                       2.4022650695910098e-01, 6.9314718055994531e-01};
};

// q = 2^r - 1 without cancellation, s = 2^n, for r = x - n, where n is x rounded to an integer by adding the
// magic number.
template <typename T>
SACCADE_FORCE void exp2_parts(Vec<T> shifted, Vec<T> r, Vec<T>& q, Vec<T>& s) {
  using E = Exp2<T>;
  Vec<T> p = splat<T>(E::c[0]);
#pragma GCC unroll 16
  for (int i = 1; i < E::kTerms; ++i) p = p * r + E::c[i];
  q = p * r;
  const VecI<T> n = bits<VecI<T>>(shifted) - bits<typename VecOf<T>::Int>(E::kMagic);
  s = bits<Vec<T>>((n + typename VecOf<T>::Int(E::kBias)) << E::kMantissa);
}

// 2^x; exactly 0 below the smallest normal number and for -inf; NaN stays NaN. x must not exceed kBias.
template <typename T>
SACCADE_FORCE Vec<T> exp2v(Vec<T> x) {
  const T low = T(1 - Exp2<T>::kBias);
  const Vec<T> held = vmax<T>(splat<T>(low), x), shifted = held + Exp2<T>::kMagic;
  Vec<T> q, s;
  exp2_parts<T>(shifted, held - (shifted - Exp2<T>::kMagic), q, s);
  return x < low ? Vec<T>{} : q * s + s;
}

// tanh(x) = e / (e + 2) with e = exp(2 |x|) - 1 formed without cancellation, so that small x keep their
// relative precision.
template <typename T>
SACCADE_FORCE Vec<T> tanhv(Vec<T> x) {
  Vec<T> a = x < T(0) ? -x : x;
  a = a > T(20) ? splat<T>(T(20)) : a;
  // 2 log2 e in two parts: what the product a * high loses, the fused subtraction and the low part give back.
  constexpr T high = T(2 * kLog2e),
              low = T(2 * kLog2e - double(high)) + (sizeof(T) == 8 ? T(4.0710547481862066e-17) : T(0));
  const Vec<T> shifted = a * high + Exp2<T>::kMagic;
  Vec<T> q, s;
  exp2_parts<T>(shifted, (a * high - (shifted - Exp2<T>::kMagic)) + a * low, q, s);
  const Vec<T> e = q * s + (s - T(1));
  const Vec<T> t = e / (e + T(2));
  return x < T(0) ? -t : t;
}

// 1 / (1 + exp(-x)).
template <typename T>
SACCADE_FORCE Vec<T> sigmoidv(Vec<T> x) {
  const T high = T(Exp2<T>::kBias - 1);
  Vec<T> y = x * T(-kLog2e);
  y = y > high ? splat<T>(high) : y;
  return T(1) / (T(1) + exp2v<T>(y));
}

// ln x of positive normal numbers that were summed in T: x = 2^e m with m in [sqrt(1/2), sqrt(2)), ln m = 2
// atanh(t), t = (m - 1) / (m + 1), whose series in t^2 <= 0.0295 ends below rounding after 12 terms, and at
// 2^-39 after 7, where the sum itself is only good to 2^-24. NaN stays NaN.
template <typename T>
SACCADE_FORCE Vec<double> logv(Vec<double> v) {
  // Subtracting the bits of sqrt(1/2) before the shift rounds the exponent so that m falls in the interval.
  const VecI<double> shifted = bits<VecI<double>>(v) - bits<int64_t>(0.70710678118654752440);
  const VecI<double> e = shifted >> 52;
  const Vec<double> m = bits<Vec<double>>(bits<VecI<double>>(v) - (e << 52));
  const Vec<double> t = (m - 1.0) / (m + 1.0), t2 = t * t;
  constexpr int last = sizeof(T) == sizeof(double) ? 23 : 13;
  Vec<double> sum = splat<double>(1.0 / last);
#pragma GCC unroll 16
  for (int k = last - 2; k > 0; k -= 2) sum = sum * t2 + 1.0 / k;
  const Vec<double> whole = bits<Vec<double>>(e + bits<int64_t>(6755399441055744.0)) - 6755399441055744.0;
  return whole * kLn2 + 2.0 * t * sum + (v - v);
}

// out[i] = ln x[i].
template <typename T>
static void log_each(const double* x, double* out, int64_t n) {
  constexpr int64_t L = kLanes<double>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(out + i, logv<T>(load(x + i)));
  if (i == n) return;
  double part[L];
  for (int64_t l = 0; l < L; ++l) part[l] = i + l < n ? x[i + l] : 1.0;
  store(part, logv<T>(load(part)));
  for (int64_t l = 0; i + l < n; ++l) out[i + l] = part[l];
}

// to[l] = v[l].
template <typename T>
SACCADE_FORCE void widen(Vec<T> v, double* to) {
  using Wide __attribute__((vector_size(sizeof(double) * kLanes<T>))) = double;
  const Wide wide = __builtin_convertvector(v, Wide);
  memcpy(to, &wide, sizeof(wide));
}

// ---- L x L transposition by butterflies ----

template <int... I>
struct Seq {};
template <int N, int... I>
struct MakeSeq : MakeSeq<N - 1, N - 1, I...> {};
template <int... I>
struct MakeSeq<0, I...> {
  using type = Seq<I...>;
};

template <typename T, int S, int... I>
SACCADE_FORCE Vec<T> exchange(Vec<T> v, Seq<I...>) {
  return __builtin_shufflevector(v, v, (I ^ S)...);
}
template <typename T, int S, int... I>
SACCADE_FORCE Vec<T> repeat_low(Vec<T> v, Seq<I...>) {
  return __builtin_shufflevector(v, v, (I & ~S)...);
}
template <typename T, int S, int... I>
SACCADE_FORCE Vec<T> swap_low(Vec<T> a, Vec<T> b, Seq<I...>) {
  return __builtin_shufflevector(a, b, ((I & S) ? (I ^ S) + kLanes<T> : I)...);
}
template <typename T, int S, int... I>
SACCADE_FORCE Vec<T> swap_high(Vec<T> a, Vec<T> b, Seq<I...>) {
  return __builtin_shufflevector(a, b, ((I & S) ? I + kLanes<T> : (I ^ S))...);
}
template <typename T, int S>
SACCADE_FORCE void butterfly(Vec<T> (&r)[kLanes<T>]) {
  using All = typename MakeSeq<kLanes<T>>::type;
  if constexpr (S < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if (!(i & S)) {
        const Vec<T> a = r[i], b = r[i | S];
        r[i] = swap_low<T, S>(a, b, All{});
        r[i | S] = swap_high<T, S>(a, b, All{});
      }
    butterfly<T, S * 2>(r);
  }
}

// Lane l is the sum of all lanes of r[l % N]; N is a power of two, r is overwritten.
template <typename T, int N, int S = 1>
SACCADE_FORCE Vec<T> sum_each(Vec<T>* r) {
  using All = typename MakeSeq<kLanes<T>>::type;
  if constexpr (N > 1) {
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) {
      const Vec<T> a = r[2 * i], b = r[2 * i + 1];
      r[i] = swap_low<T, S>(a, b, All{}) + swap_high<T, S>(a, b, All{});
    }
    return sum_each<T, N / 2, S * 2>(r);
  } else if constexpr (S < kLanes<T>) {
    r[0] += exchange<T, S>(r[0], All{});
    return sum_each<T, 1, S * 2>(r);
  } else {
    return r[0];
  }
}

template <typename T, int S = 1>
SACCADE_FORCE T largest_lane(Vec<T> v) {
  if constexpr (S < kLanes<T>)
    return largest_lane<T, S * 2>(vmax<T>(exchange<T, S>(v, typename MakeSeq<kLanes<T>>::type{}), v));
  return v[0];
}

// dst[c][r] = src[r][c] for rows x cols; tails are scalar.
template <typename T>
static void transpose(const T* src, int64_t ld_src, T* dst, int64_t ld_dst, int64_t rows, int64_t cols) {
  constexpr int L = kLanes<T>;
  int64_t r0 = 0;
  for (; r0 + L <= rows; r0 += L) {
    int64_t c0 = 0;
    for (; c0 + L <= cols; c0 += L) {
      Vec<T> t[L];
      // One pointer that walks: of two times 16 addresses, computed ahead, most would be spilled.
      const T* from = src + r0 * ld_src + c0;
      T* to = dst + c0 * ld_dst + r0;
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i, from += ld_src) {
        t[i] = load(from);
        asm("" : "+r"(from));
      }
      butterfly<T, 1>(t);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i, to += ld_dst) {
        store(to, t[i]);
        asm("" : "+r"(to));
      }
    }
    for (int i = 0; i < L; ++i)
      for (int64_t c = c0; c < cols; ++c) dst[c * ld_dst + r0 + i] = src[(r0 + i) * ld_src + c];
  }
  for (; r0 < rows; ++r0)
    for (int64_t c = 0; c < cols; ++c) dst[c * ld_dst + r0] = src[r0 * ld_src + c];
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
