// What the tiled kernels of every architecture share: the work of a block, which keys it meets, how a product
// becomes a logit, what dropout keeps. Derivations: docs/numerics.md.
#pragma once
#include "../params.h"
#include "../philox.h"
#include "device.h"

namespace saccade {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2E = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
// Below this, lse in double could no longer hold ln of a sum of logits (csrc/cpu/tile.h).
constexpr float kLargestLogit = 1e11f;

// The numbers of a call in the form and precision in which kernels use them.
struct Terms {
  bool bare;                      // the logit is the product itself, up to a positive factor
  float factor, unit;             // of a tile's number x: exp(logit) = 2^(x factor), logit = x unit
  float scale, per_cap, softcap;  // scale / softcap
  bool dropout;
  uint32_t threshold;          // dropout keeps 16-bit numbers from here on
  float keep_scale;            // 1 / (1 - dropout_p), or 0 where all is dropped
  bool sink;                   // one more term in the sum, a number per head or 0
  bool may_be_dead;            // keys that no row keeps may lie between keys that some row keeps
  int chunk_size, chunk_left;  // of the mask; a size of 0: it has no chunks
  int64_t total_q, total_k;    // rows of packed q and of packed k and v; not read where nothing is packed
};

// Row i keeps an interval of keys whose ends never fall from a row to the next. Where chunks end, a band
// that leaves position i + shift out skips keys.
inline bool chunks_leave_gaps(const MaskParams& m) {
  const bool diagonal =
      m.band[0] >= 0 && m.band[1] >= 0 && m.band[2] >= kUnbounded && m.band[3] >= kUnbounded;
  return m.num_chunks && (m.head_bounds || !diagonal);
}

inline Terms terms_of(const Params& p, int64_t total_q = 0, int64_t total_k = 0) {
  Terms t{};
  t.bare = p.softcap == 0 && !p.bias && !p.rel_bias && p.scale > 0;
  t.unit = t.bare ? float(p.scale) : 1.0f;
  t.factor = float(double(t.unit) / kLn2);
  t.scale = float(p.scale);
  t.softcap = float(p.softcap);
  t.per_cap = p.softcap != 0 ? float(p.scale / p.softcap) : 0.0f;
  t.dropout = p.dropout_p > 0;
  t.threshold = dropout_threshold(p.dropout_p);
  t.keep_scale = p.dropout_p < 1 ? float(1 / (1 - p.dropout_p)) : 0.0f;  // 0 x infinity is NaN
  t.sink = p.sink || p.activation == Activation::kSoftmax1;
  t.may_be_dead = p.bias || p.mask.keep || p.mask.q_ids || chunks_leave_gaps(p.mask);
  if (p.mask.num_chunks) {  // sizes beyond the longest sequence are all alike
    constexpr int64_t kLongest = 1 << 30;
    const int64_t size = p.mask.chunks[0] < kLongest ? p.mask.chunks[0] : kLongest, all = kLongest / size;
    t.chunk_size = int(size);
    t.chunk_left = int(p.mask.chunks[1] < all ? p.mask.chunks[1] : all);
  }
  t.total_q = total_q;
  t.total_k = total_k;
  return t;
}

// Whether rows of 16-bit numbers can be moved 16 bytes at a time.
inline bool rows_aligned(const Rows& x) {
  return x.col == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch % 8 == 0 && x.head % 8 == 0 &&
         x.row % 8 == 0;
}

struct TiledArgs {
  Params p;
  Terms terms;
  const int64_t* seed;                                // on the device; null: p.seed
  int blocks;                                         // of the longest sequence
  bool aligned_q, aligned_k, aligned_v, aligned_out;  // rows move 16 bytes at a time
};

SACCADE_DEVICE int least(int a, int b) { return a < b ? a : b; }
SACCADE_DEVICE int most(int a, int b) { return a > b ? a : b; }
SACCADE_DEVICE int64_t least64(int64_t a, int64_t b) { return a < b ? a : b; }
SACCADE_DEVICE int64_t most64(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- the work of a block ----

// One head of one sequence.
struct Head {
  int b, h, hk;
  int seqlen_q, seqlen_k;
  int64_t q_begin, k_begin;  // rows in front of it in a packed tensor
};

// The length of packed sequence b: of rows that there are, and no longer than was promised, whatever the
// device holds.
SACCADE_DEVICE int span_of(const int64_t* cu_seqlens, int b, int64_t total, int longest, int64_t& begin) {
  begin = least64(most64(load_global(cu_seqlens + b), 0), total);
  const int64_t end = least64(load_global(cu_seqlens + b + 1), total);
  return int(least64(most64(end - begin, 0), longest));
}
SACCADE_DEVICE Head head_of(const Params& p, const Terms& t, int b, int h) {
  Head x{b, h, h / int(p.heads / p.heads_k), int(p.seqlen_q), int(p.seqlen_k), 0, 0};
  if (p.cu_seqlens_q) x.seqlen_q = span_of(p.cu_seqlens_q, b, t.total_q, x.seqlen_q, x.q_begin);
  if (p.cu_seqlens_k) x.seqlen_k = span_of(p.cu_seqlens_k, b, t.total_k, x.seqlen_k, x.k_begin);
  return x;
}

// Where row 0 of the sequence lies.
template <typename T>
SACCADE_DEVICE T* rows_at(const Rows& x, int b, int h, int64_t begin) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head + begin * x.row;
}
SACCADE_DEVICE int64_t lse_at(const Params& p, const Head& x) {
  return x.b * p.lse_batch + x.h * p.lse_head + x.q_begin;
}

// ---- the interval part of the mask (csrc/mask.h) in 32 bits: row i keeps keys [max(0, i + low),
// min(keys, i + high)), of chunks of `size` keys those of its position's and of `left` before it ----

struct Band {
  int low, high, keys;
  int shift, size, left;  // of a row to its position; size 0: no chunks
};
SACCADE_DEVICE Band band_of(const MaskParams& m, const Terms& t, const Head& x) {
  constexpr int64_t kFar = 1 << 30;  // lengths stay below it, so that sums fit 32 bits
  int64_t band[4];
  for (int i = 0; i < 4; ++i) band[i] = m.head_bounds ? load_global(m.head_bounds + 4 * x.h + i) : m.band[i];
  const int64_t shift = x.seqlen_k - x.seqlen_q;
  int64_t low = most64(shift - band[0], -band[2]), high = least64(shift + band[1], band[3]) + 1;
  // Where a row keeps nothing none does; their empty intervals would span keys all the same.
  if (low >= high) low = kFar, high = -kFar;
  const int64_t keys = m.lengths ? least64(x.seqlen_k, load_global(m.lengths + x.b)) : x.seqlen_k;
  return {int(most64(-kFar, least64(low, kFar))),
          int(most64(-kFar, least64(high, kFar))),
          int(most64(keys, 0)),
          int(shift),
          t.chunk_size,
          t.chunk_left};
}
// A row in front of position 0 keeps nothing: no key lies in chunk -1.
SACCADE_DEVICE int chunk_of(const Band& band, int i) {
  const int position = i + band.shift;
  return position < 0 ? -1 : int(uint32_t(position) / uint32_t(band.size));
}
SACCADE_DEVICE int first_key(const Band& band, int i) {
  const int first = most(0, i + band.low);
  return band.size ? most(first, most(0, chunk_of(band, i) - band.left) * band.size) : first;
}
SACCADE_DEVICE int end_key(const Band& band, int i) {
  const int end = least(band.keys, i + band.high);
  return band.size ? least(end, (chunk_of(band, i) + 1) * band.size) : end;
}
// The rows that keep key j >= 0: [first_query, end_query).
SACCADE_DEVICE int first_query(const Band& band, int j) {
  const int first = most(0, j - band.high + 1);
  return band.size ? most(first, int(uint32_t(j) / uint32_t(band.size)) * band.size - band.shift) : first;
}
SACCADE_DEVICE int end_query(const Band& band, int j, int seqlen_q) {
  int end = least(seqlen_q, j - band.low + 1);
  if (band.size) {
    const int64_t chunks = int64_t(uint32_t(j) / uint32_t(band.size)) + band.left + 1;
    end = int(least64(end, chunks * band.size - band.shift));
  }
  return j < band.keys ? end : 0;
}

// Tiles [first, last) hold every key that rows [i0, i1) keep; every row keeps all of [full_first, full_last).
struct TileRange {
  int begin, end;  // keys
  int first, full_first, full_last, last;
};
template <int kBlockN>
SACCADE_DEVICE TileRange tiles_of(const Band& band, int i0, int i1) {
  TileRange r;
  r.begin = first_key(band, i0);
  r.end = end_key(band, i1 - 1);
  if (i0 >= i1 || r.begin >= r.end) return {0, 0, 0, 0, 0, 0};
  r.first = r.begin / kBlockN;
  r.last = (r.end + kBlockN - 1) / kBlockN;
  r.full_first = least(r.last, (first_key(band, i1 - 1) + kBlockN - 1) / kBlockN);
  r.full_last = most(r.full_first, most(0, end_key(band, i0)) / kBlockN);
  return r;
}
// The same seen from keys [j0, j1): the rows that keep some of them, and those that keep all.
template <int kBlockM>
SACCADE_DEVICE TileRange query_tiles_of(const Band& band, int j0, int j1, int seqlen_q) {
  const int end = least(j1, band.keys);
  TileRange r;
  if (j0 >= end) return {0, 0, 0, 0, 0, 0};
  r.begin = first_query(band, j0);
  r.end = end_query(band, end - 1, seqlen_q);
  if (r.begin >= r.end) return {0, 0, 0, 0, 0, 0};
  r.first = r.begin / kBlockM;
  r.last = (r.end + kBlockM - 1) / kBlockM;
  // A key of padding is kept by no row.
  const int all_begin = j1 <= band.keys ? first_query(band, j1 - 1) : r.end;
  const int all_end = end_query(band, j0, seqlen_q);
  r.full_first = least(r.last, (all_begin + kBlockM - 1) / kBlockM);
  r.full_last = most(r.full_first, most(0, all_end) / kBlockM);
  return r;
}

// ---- the rest of the mask, logits and dropout, pair by pair ----

SACCADE_DEVICE bool keeps_pair(const MaskParams& m, int b, int i, int j) {
  if (m.keep && !load_global(m.keep + b * m.keep_batch + j)) return false;
  if (m.q_ids && load_global(m.q_ids + b * m.q_ids_batch + i) != load_global(m.k_ids + b * m.k_ids_batch + j))
    return false;
  return true;
}

// Near 0, where the difference would cancel, an odd polynomial, exact to rounding (minimax in x^2).
SACCADE_DEVICE float tanh_of(float x) {
  const float z = x * x;
  if (z < 0.390625f) {
    float p = fmaf(z, -0.005704978480935097f, 0.020639078691601753f);
    p = fmaf(p, z, -0.05373971164226532f);
    p = fmaf(p, z, 0.13331441581249237f);
    p = fmaf(p, z, -0.3333328068256378f);
    return fmaf(x * z, p, x);
  }
  return 1 - 2 * reciprocal_approx(1 + exp2_approx(2 * kLog2E * x));  // exact at both infinities
}

SACCADE_DEVICE float load_float(const void* p, DType type, int64_t at) {
  if (type == DType::kFloat32) return load_global(static_cast<const float*>(p) + at);
  const uint16_t bits = load_global(static_cast<const uint16_t*>(p) + at);
  return type == DType::kBFloat16 ? bits_to_float<bf16>(bits) : bits_to_float<fp16>(bits);
}

// The logit of a pair in natural units, before the mask; `slope` receives its derivative by the bare product.
SACCADE_DEVICE float logit_of(const Params& p, const Terms& t, const Head& x, float product, int i, int j,
                              float& slope) {
  float logit = t.scale * product;
  slope = t.scale;
  if (t.softcap != 0) {
    const float c = tanh_of(t.per_cap * product);
    logit = t.softcap * c;
    slope = t.scale * (1 - c * c);
  }
  if (p.bias) {
    const float bias = load_float(
        p.bias, p.bias_dtype,
        x.b * p.bias_stride[0] + x.h * p.bias_stride[1] + i * p.bias_stride[2] + j * p.bias_stride[3]);
    logit = bias == -kInfinity ? bias : fmaxf(logit + bias, -kLargestLogit);
  }
  if (p.rel_bias)
    logit += load_global(static_cast<const float*>(p.rel_bias) + x.h * p.rel_size + p.rel_center + j -
                         (i + x.seqlen_k - x.seqlen_q));
  return logit;
}

SACCADE_DEVICE float sink_of(const Params& p, int h) {
  return p.sink ? load_global(static_cast<const float*>(p.sink) + h) : 0.0f;
}

// Whether dropout keeps pairs (i, j) and (i, j + 1), for an even j: the low and high half of one word.
SACCADE_DEVICE uint32_t dropout_word(uint64_t seed, const Head& x, int i, int j) {
  uint32_t c[4] = {uint32_t(j >> 3), uint32_t(i), uint32_t(x.h), uint32_t(x.b)};
  philox(seed, c);
  const int word = (j & 7) >> 1;
  return word == 0 ? c[0] : word == 1 ? c[1] : word == 2 ? c[2] : c[3];
}
SACCADE_DEVICE bool keeps_half(uint32_t word, int half, uint32_t threshold) {
  return (word >> (16 * half) & 0xFFFF) >= threshold;
}
template <typename Args>
SACCADE_DEVICE uint64_t seed_of(const Args& args) {
  return args.seed ? uint64_t(load_global(args.seed)) : args.p.seed;
}

}  // namespace saccade
