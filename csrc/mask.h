// The mask in C++: which keys a query keeps. The definition is Mask.keep in python/saccade/masks.py; tests
// compare the two.
#pragma once
#include "params.h"

#ifdef __CUDACC__
#define SACCADE_INLINE __host__ __device__ static inline
#else
#define SACCADE_INLINE static inline
#endif

namespace saccade {

SACCADE_INLINE int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b != 0 && (a % b < 0) != (b < 0));
}
SACCADE_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
SACCADE_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Keys [begin, end); empty when end <= begin.
struct Interval {
  int64_t begin, end;
};

// Bands, chunks and lengths keep an interval of keys; both ends never fall from a row to the next.
SACCADE_INLINE Interval row_interval(const MaskParams& m, int64_t b, int64_t h, int64_t i, int64_t seqlen_q,
                                     int64_t seqlen_k) {
  const int64_t* band = m.head_bounds ? m.head_bounds + 4 * h : m.band;
  const int64_t pos = i + seqlen_k - seqlen_q;
  int64_t first = max64(0, max64(pos - band[0], i - band[2]));
  int64_t last = min64(seqlen_k - 1, min64(pos + band[1], i + band[3]));
  for (int64_t c = 0; c < m.num_chunks; ++c) {
    const int64_t size = m.chunks[2 * c], chunk = floor_div(pos, size);
    first = max64(first, (chunk - m.chunks[2 * c + 1]) * size);
    last = min64(last, (chunk + 1) * size - 1);
  }
  if (m.lengths) last = min64(last, m.lengths[b] - 1);
  return {first, last + 1};
}

// What an interval cannot say: padding by a boolean tensor and segments. (Graph tiles carry their own bits.)
SACCADE_INLINE bool irregular(const MaskParams& m) { return m.keep || m.q_ids; }
SACCADE_INLINE bool keeps_pair(const MaskParams& m, int64_t b, int64_t i, int64_t j) {
  if (m.keep && !m.keep[b * m.keep_batch + j]) return false;
  if (m.q_ids && m.q_ids[b * m.q_ids_batch + i] != m.k_ids[b * m.k_ids_batch + j]) return false;
  return true;
}

}  // namespace saccade
