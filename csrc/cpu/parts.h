// The products of a tile, over those of its parts that the band of a mask leaves.
#pragma once
#include "logits.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// The rows of a query block as a T matrix [rows][ld], zero beyond d. Used in place where dtype and layout
// allow.
template <typename T>
struct Matrix {
  const T* p;
  int64_t ld;
};
template <typename T>
static Matrix<T> block_rows(const Rows& x, const QueryBlock& q, int64_t d, int64_t ld, T* buffer) {
  const char* base = row_at(x, q.b, q.h, q.seq.q_begin + q.i0);
  if (x.dtype == AccumulatorOf<T>::value && x.col == 1 && ld == d)
    return {reinterpret_cast<const T*>(base), x.row};
  for (int64_t i = 0; i < q.rows; ++i) {
    read_row(buffer + i * ld, base + i * x.row * size_of(x.dtype), x.dtype, x.col, d);
    for (int64_t c = d; c < ld; ++c) buffer[i * ld + c] = T(0);
  }
  return {buffer, ld};
}

// A tile that the edge of a band crosses is worked on in parts: runs of keys, each against the lanes of which
// some row keeps some key of the run. What lies outside the parts is masked and never computed.
struct TilePart {
  int64_t j, n, lane, lanes;
};
struct TileParts {
  TilePart part[kBlockN / 16];
  int count = 0;
  const TilePart* begin() const { return part; }
  const TilePart* end() const { return part + count; }
};

template <typename M>
static TileParts tile_parts(const Params& p, const QueryBlock& q, const KeyTile& t) {
  TileParts parts;
  if (t.whole || t.extra || t.words || p.score != Score::kDot || q.rows <= kNarrow) {
    parts.part[parts.count++] = {0, t.n, 0, q.lanes};
    return parts;
  }
  static_assert(M::kPartKeys >= 16, "there is room for so many parts");
  for (int64_t j = 0; j < t.n; j += M::kPartKeys) {
    const int64_t n = min64(M::kPartKeys, t.n - j), first_key = t.j0 + j, end_key = first_key + n;
    int64_t first = 0, last = q.rows;
    while (first < last && q.end[first] <= first_key) ++first;
    while (last > first && q.begin[last - 1] >= end_key) --last;
    if (first == last) continue;
    const int64_t lane = first / M::kPad * M::kPad, lanes = round_up(last, M::kPad) - lane;
    TilePart* before = parts.count ? &parts.part[parts.count - 1] : nullptr;
    if (before && before->lane == lane && before->lanes == lanes && before->j + before->n == j)
      before->n += n;
    else
      parts.part[parts.count++] = {j, n, lane, lanes};
  }
  return parts;
}

// S[j][i] = row_j . column_i over the parts of a tile.
template <typename M>
static void tile_scores(const QueryBlock& q, const TileParts& parts, int64_t d, typename M::A rows,
                        typename M::B columns, typename M::T* S) {
  for (const TilePart& x : parts)
    M::scores(x.n, x.lanes, d, M::skip_rows(rows, x.j), x.lane ? M::skip_lanes(columns, x.lane) : columns,
              S + x.j * q.lanes + x.lane, q.lanes);
}

// sums[d][i] += sum_j rows_j[d] X[j][i] over the parts of a tile: the output, and dQ.
template <typename M>
static void add_columns(const QueryBlock& q, const TileParts& parts, int64_t d, typename M::A rows,
                        const typename M::T* X, typename M::T* sums, typename M::Element* columns,
                        typename M::Element* packed) {
  for (const TilePart& x : parts)
    M::template product<true>(d, x.lanes, x.n, M::columns(M::skip_rows(rows, x.j), x.n, d, columns),
                              M::tile_b(X + x.j * q.lanes + x.lane, q.lanes, x.n, x.lanes, packed),
                              sums + x.lane, q.lanes);
}

// sums[j][d] += sum_i X[j][i] rows_i[d] over the parts of a tile: dK and dV.
template <typename M>
static void add_rows(const QueryBlock& q, const TileParts& parts, int64_t ld, typename M::B rows,
                     const typename M::T* X, typename M::T* sums, typename M::Element* packed) {
  for (const TilePart& x : parts) {
    const int64_t first = x.lane / M::kDepth * M::kDepth, count = min64(q.rows, x.lane + x.lanes) - first;
    M::template product<true>(x.n, ld, count,
                              M::tile_a(X + x.j * q.lanes + first, q.lanes, x.n, count, packed),
                              M::skip_depth(rows, first), sums + x.j * ld, ld);
  }
}

// The logits of one tile, masked. Returns whether some key of it is dead.
template <typename M>
static bool tile_logits(const Params& p, const QueryBlock& q, const KeyTile& t, const TileParts& parts,
                        typename M::A keys, typename M::B queries, typename M::T* S, typename M::T* cap,
                        typename M::T* buffer, bool* dead) {
  using T = typename M::T;
  if (p.score == Score::kDot) {
    tile_scores<M>(q, parts, p.head_dim, keys, queries, S);
  } else if constexpr (M::kSharesTile) {
    additive_scores<T>(p, q, t.n, keys, queries.p, S);
  }
  if (!bare_logits(p)) finish_logits<T>(p, q, t, S, cap, buffer);
  if (!t.whole) apply_mask<T>(p, q, t, S);
  return may_hold_dead(p, q, t) && find_dead<T>(q, t, S, dead);
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
