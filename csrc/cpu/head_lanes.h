// Numbers of (edge, head) pairs. They lie edge by edge, the heads of an edge side by side: what belongs to
// one head stands in the same lanes of every vector, so that a softmax over edges needs no sum within a
// vector until its end, and few edges of many heads fill vectors as well as many edges of one.
#pragma once
#include "edge_rows.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

template <typename T>
struct HeadLanes {
  int64_t heads, heads_k, group;
  int64_t pitch = 1;  // numbers per edge: a power of two up to a vector, then whole vectors

  explicit HeadLanes(const GatherParams& p)
      : heads(p.heads), heads_k(p.heads_k), group(p.heads / max64(p.heads_k, 1)) {
    while (pitch < heads && pitch < kLanes<T>) pitch *= 2;
    if (pitch < heads) pitch = round_up(heads, kLanes<T>);
  }
  int64_t lanes() const { return round_up(pitch, kLanes<T>); }  // of one edge, repeated to fill a vector
  int64_t size(int64_t edges) const { return round_up(edges * pitch, kLanes<T>); }
  int64_t key(int64_t h) const { return key_head(h, group); }
  bool opens(int64_t h) const { return group == 1 || h % group == 0; }  // the first head of its key head
};

// How the rows of the graph, and those of its transpose, are cut into items.
template <typename T>
RowSplit row_split(const GatherParams& p) {
  return {p.indptr, p.seqlen_q, p.edges, HeadLanes<T>(p).pitch};
}
template <typename T>
RowSplit column_split(const GatherParams& p) {
  return {p.t_indptr, p.seqlen_k, p.edges, HeadLanes<T>(p).pitch};
}

// Every lane becomes f over the lanes of its head.
template <typename T, typename F, int S = kLanes<T> / 2>
SACCADE_FORCE Vec<T> fold_heads(Vec<T> v, int64_t pitch, F f) {
  if constexpr (S > 0)
    if (S >= pitch)
      return fold_heads<T, F, S / 2>(f(v, exchange<T, S>(v, typename MakeSeq<kLanes<T>>::type{})), pitch, f);
  return v;
}

// The first `pitch` lanes, again and again.
template <typename T, int S = kLanes<T> / 2>
SACCADE_FORCE Vec<T> repeat_heads(Vec<T> v, int64_t pitch) {
  if constexpr (S > 0)
    if (S >= pitch)
      return repeat_heads<T, S / 2>(repeat_low<T, S>(v, typename MakeSeq<kLanes<T>>::type{}), pitch);
  return v;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
