// One block of queries against one tile of keys: which blocks and tiles there are. A tile is held transposed,
// S[j][i]: the lanes run over queries, so the softmax over keys never crosses lanes and the weights are
// already in the form in which the next product wants them. logits.h says what stands in a tile, parts.h
// multiplies it. Derivations: docs/numerics.md.
#pragma once
#include "../mask.h"
#include "operands.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

constexpr int64_t kBlockM = 64;   // queries; equals kGraphTile, so that graph tiles need no regrouping
constexpr int64_t kBlockN = 128;  // keys
static_assert(kBlockM == kGraphTile, "a query block is one row of graph tiles");

template <typename T>
constexpr T kInf = T(__builtin_inf());

SACCADE_FORCE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A bump allocator over the thread's scratch. With a null base it only counts, so one function both sizes and
// lays out a kernel's memory.
struct Arena {
  char* base;
  size_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    const size_t at = used;
    used += size_t(round_up(count * int64_t(sizeof(T)), 64));
    return base ? reinterpret_cast<T*>(base + at) : nullptr;
  }
};

struct QueryBlock {
  int64_t b, h, hk, i0, rows, lanes;
  Sequence seq;
  Interval keys;    // every key that some row's interval holds lies here
  Interval shared;  // keys that every row's interval holds
  bool gaps;        // some row keeps no key, so a key inside `keys` may be kept by none
  int32_t id_min, id_max;
  int64_t begin[kBlockM], end[kBlockM];
};

// Lanes come in multiples of Pad.
template <int64_t Pad>
static QueryBlock query_block(const Params& p, int64_t b, int64_t h, int64_t m_block) {
  QueryBlock q;
  q.b = b;
  q.h = h;
  q.hk = h / (p.heads / p.heads_k);
  q.seq = sequence_of(p, b);
  q.i0 = m_block * kBlockM;
  q.rows = max64(0, min64(kBlockM, q.seq.seqlen_q - q.i0));
  q.lanes = round_up(q.rows, Pad);
  q.keys = {INT64_MAX, 0};
  q.shared = {0, INT64_MAX};
  q.gaps = false;
  for (int64_t i = 0; i < q.rows; ++i) {
    const Interval r = row_interval(p.mask, b, h, q.i0 + i, q.seq.seqlen_q, q.seq.seqlen_k);
    q.begin[i] = r.begin;
    q.end[i] = r.end;
    q.shared = {max64(q.shared.begin, r.begin), min64(q.shared.end, r.end)};
    if (r.begin < r.end)
      q.keys = {min64(q.keys.begin, r.begin), max64(q.keys.end, r.end)};
    else
      q.gaps = true;
  }
  for (int64_t i = q.rows; i < q.lanes; ++i) q.begin[i] = q.end[i] = 0;
  q.id_min = INT32_MAX;
  q.id_max = INT32_MIN;
  if (p.mask.q_ids)
    for (int64_t i = 0; i < q.rows; ++i) {
      const int32_t id = p.mask.q_ids[b * p.mask.q_ids_batch + q.i0 + i];
      q.id_min = id < q.id_min ? id : q.id_min;
      q.id_max = id > q.id_max ? id : q.id_max;
    }
  return q;
}

struct KeyTile {
  int64_t j0, n;
  bool extra;             // the one key given by extra_k, extra_v
  bool whole;             // every pair is kept: the mask is never looked at
  const uint64_t* words;  // graph: bit j of words[i]
};

// The key tiles of a query block inside [limit.begin, limit.end), in order, the empty ones left out.
struct KeyTiles {
  const Params& p;
  const QueryBlock& q;
  Interval limit;
  int64_t at, graph_at, graph_end;

  KeyTiles(const Params& params, const QueryBlock& block, Interval within)
      : p(params), q(block), limit{max64(block.keys.begin, within.begin), min64(block.keys.end, within.end)} {
    at = limit.begin;
    graph_at = graph_end = 0;
    if (p.mask.tile_ptr) {
      graph_at = p.mask.tile_ptr[q.i0 / kGraphTile];
      graph_end = p.mask.tile_ptr[q.i0 / kGraphTile + 1];
    }
  }

  bool next(KeyTile& t) { return p.mask.tile_ptr ? next_graph(t) : next_range(t); }

 private:
  bool next_range(KeyTile& t) {
    while (at < limit.end) {
      const int64_t n = min64(limit.end, at + kBlockN) - at;
      t = {at, n, false, at >= q.shared.begin && at + n <= q.shared.end, nullptr};
      at += n;
      if (keeps_some(t)) return true;
    }
    return false;
  }
  bool next_graph(KeyTile& t) {
    for (; graph_at < graph_end; ++graph_at) {
      const int64_t j0 = int64_t(p.mask.tile_col[graph_at]) * kGraphTile;
      const int64_t begin = max64(j0, limit.begin), end = min64(j0 + kGraphTile, limit.end);
      if (begin >= end) continue;
      // The tile keeps its place on the grid, so that bit numbers are key numbers; keys cut off by `limit`
      // are masked.
      t = {j0, end - j0, false, begin == j0 && j0 >= q.shared.begin && end <= q.shared.end,
           p.mask.tile_bits + graph_at * kGraphTile};
      const uint64_t all = t.n == 64 ? ~uint64_t(0) : (uint64_t(1) << t.n) - 1;
      for (int64_t i = 0; i < q.rows && t.whole; ++i) t.whole = (t.words[i] & all) == all;
      if (keeps_some(t)) {
        ++graph_at;
        return true;
      }
    }
    return false;
  }
  // Padding and segments: looks at the keys only, so that a tile no row keeps costs its keys and not its
  // pairs.
  bool keeps_some(KeyTile& t) const {
    const MaskParams& m = p.mask;
    if (m.keep) {
      const bool* keep = m.keep + q.b * m.keep_batch + t.j0;
      bool any = false, all = true;
      for (int64_t j = 0; j < t.n; ++j) any |= keep[j], all &= keep[j];
      if (!any) return false;
      t.whole &= all;
    }
    if (m.q_ids) {
      const int32_t* ids = m.k_ids + q.b * m.k_ids_batch + t.j0;
      int32_t lo = INT32_MAX, hi = INT32_MIN;
      for (int64_t j = 0; j < t.n; ++j) lo = ids[j] < lo ? ids[j] : lo, hi = ids[j] > hi ? ids[j] : hi;
      if (lo > q.id_max || hi < q.id_min) return false;
      t.whole &= lo == hi && q.id_min == q.id_max;
    }
    return true;
  }
};

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
