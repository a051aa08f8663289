// Rows of tensors as the gather body reads and writes them: those of the keys that edges point to, those of
// the queries that edges belong to.
#pragma once
#include "gather.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// The key head of head h, without a division where that is its own.
SACCADE_FORCE int64_t key_head(int64_t h, int64_t group) { return group == 1 ? h : h / group; }

// Up to kEdgeLanes rows of one tensor, by edge; the rows of other heads lie `head` elements on.
template <typename S>
struct EdgeRows {
  const S* at[kEdgeLanes];
  int64_t head = 0;

  EdgeRows() = default;
  EdgeRows(const Rows& x, int64_t b, const int32_t* index, int64_t n) : head(x.head) {
    for (int64_t e = 0; e < n; ++e) at[e] = typed_row<S>(x, b, 0, index[e]);
  }
};

// Rows of one query, a head each, padded with zeros to whole vectors.
template <typename T>
struct HeadRows {
  const T* at;
  int64_t head;
  SACCADE_MEMBER const T* operator[](int64_t h) const { return at + h * head; }
};

// Whether rows of d elements S are rows of T in whole vectors as they are.
template <typename T, typename S>
SACCADE_FORCE bool rows_in_place(int64_t d) {
  return sizeof(S) == sizeof(T) && d % kLanes<T> == 0;
}

// Padded rows of all heads, in T: the tensor's own where it holds them so.
template <typename T, typename S>
static HeadRows<T> read_heads(const Rows& x, int64_t b, int64_t row, int64_t heads, int64_t d, T* buffer) {
  constexpr int L = kLanes<T>;
  if constexpr (sizeof(S) == sizeof(T))
    if (rows_in_place<T, S>(d)) return {typed_row<S>(x, b, 0, row), x.head};
  const int64_t ld = round_up(d, L);
  for (int64_t h = 0; h < heads; ++h) {
    const S* from = typed_row<S>(x, b, h, row);
    T* to = buffer + h * ld;
    int64_t c = 0;
    for (; c + L <= d; c += L) store(to + c, load_as<T>(from + c));
    if (c < d) store(to + c, load_part<T>(from + c, d - c));
  }
  return {buffer, ld};
}

// The rows of x that edges belong to, or their queries are.
template <typename T>
struct OwnRows {
  const T* at[kEdgeLanes];
  int64_t head;
  SACCADE_MEMBER HeadRows<T> of(int64_t e) const { return {at[e], head}; }
};

template <typename T>
SACCADE_FORCE OwnRows<T> same_rows(HeadRows<T> x) {
  OwnRows<T> rows;
  for (const T*& at : rows.at) at = x.at;
  rows.head = x.head;
  return rows;
}

// Reads them; a row that must be converted is converted once for edges that follow each other. Where `ahead`
// says so, each row has one behind it asked for.
template <typename T, typename S>
class RowReader {
 public:
  RowReader(Arena& a, bool ahead, int64_t heads, int64_t d)
      : heads_(heads), d_(d), size_(heads * round_up(d, kLanes<T>)), ahead_(ahead) {
    buffer_ = a.take<T>(rows_in_place<T, S>(d) ? 0 : (kEdgeLanes + 1) * size_);
  }
  void read(const Rows& x, int64_t b, const int32_t* rows, int64_t n, OwnRows<T>& to) {
    const bool in_place = rows_in_place<T, S>(d_);
    const RowLines lines(x, b, heads_, d_);
    for (int64_t e = 0; e < n; ++e) {
      if (in_place) to.at[e] = reinterpret_cast<const T*>(typed_row<S>(x, b, 0, rows[e]));
      if (in_place && !ahead_) continue;
      const bool next = rows[e] != row_ || b != batch_;
      row_ = rows[e], batch_ = b;
      if (next && ahead_) lines.ask(row_ + kRowsAhead);
      if (in_place) continue;
      if (next) {
        slot_ = slot_ < kEdgeLanes ? slot_ + 1 : 0;
        read_heads<T, S>(x, b, row_, heads_, d_, buffer_ + slot_ * size_);
      }
      to.at[e] = buffer_ + slot_ * size_;
    }
    to.head = in_place ? x.head : round_up(d_, kLanes<T>);
  }

 private:
  int64_t heads_, d_, size_, batch_ = -1, row_ = -1, slot_ = 0;
  bool ahead_;
  T* buffer_;
};

// Row `row` of x where sums for all of its heads can be made in place, as T holds them in whole vectors; or
// null.
template <typename T, typename S>
SACCADE_FORCE T* sums_in_place(const Rows& x, int64_t b, int64_t row, int64_t heads, int64_t d) {
  if constexpr (sizeof(S) == sizeof(T))
    if (x.data && x.col == 1 && d % kLanes<T> == 0 && (heads == 1 || x.head == d))
      return reinterpret_cast<T*>(row_at(x, b, 0, row));
  return nullptr;
}

// Whether x, of that many rows, outgrows what cores share, so that its rows are best written past the caches.
// Results are dense: rows of whole vectors lie whole vectors apart.
SACCADE_FORCE bool outgrows_caches(const Rows& x, int64_t batch, int64_t rows, int64_t heads, int64_t d) {
  return batch * rows * heads * d * size_of(x.dtype) > kSharedBytes &&
         reinterpret_cast<uintptr_t>(x.data) % kVectorBytes == 0;
}

// Where the sums of a row go; `stream`: the output itself, past the caches, if one step makes them.
template <typename T>
struct SumRow {
  T* at;
  bool stream;

  SumRow(T* place, T* otherwise, bool past) : at(place ? place : otherwise), stream(place && past) {}
};

// Row `row` of all heads of x: x[b, h, row] = shares[h] * from[h * ld + 0..d), or without shares (null) as it
// is.
template <typename T, typename S>
SACCADE_FORCE void write_heads(const Rows& x, int64_t b, int64_t row, int64_t heads, const T* from,
                               int64_t ld, const T* shares, int64_t d) {
  S* to = reinterpret_cast<S*>(row_at(x, b, 0, row));
  const int64_t whole = sizeof(S) == sizeof(T) && x.col == 1 ? d / kLanes<T> * kLanes<T> : 0;
  for (int64_t h = 0; h < heads; ++h, to += x.head, from += ld) {
    const T share = shares ? shares[h] : T(1);
    int64_t c = 0;
    if constexpr (sizeof(S) == sizeof(T))
      for (; c < whole; c += kLanes<T>) store(to + c, load(from + c) * share);
    for (; c < d; ++c) narrow(from[c] * share, to[c * x.col]);
  }
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
