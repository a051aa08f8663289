// What the passes of the gather body share: rows of any dtype as vectors, and the even split of edges over
// work items.
#pragma once
#include "kernels.h"
#include "tile.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

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
#elif defined(__F16C__)
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
  Vec<T> v{};
  for (int64_t l = 0; l < n; ++l) v[int(l)] = T(widen(p[l]));
  return v;
}
template <typename T>
SACCADE_FORCE void store_part(T* p, Vec<T> v, int64_t n) {
  for (int64_t l = 0; l < n; ++l) p[l] = v[int(l)];
}

// Rows [0, rows) with indptr[r + 1] - indptr[r] edges each, cut into items of equal cost: a row costs 1 and
// each of its edges 1. A hub is shared by several items, a thousand leaves fill one.
struct RowSplit {
  const int64_t* indptr;
  int64_t rows, step;

  RowSplit(const int64_t* ptr, int64_t count, int64_t edges) : indptr(ptr), rows(count) {
    step = max64(1024, min64(16384, (count + edges) / 64));
    items_ = (count + edges + step - 1) / step;
  }
  int64_t items() const { return items_; }

  struct Piece {
    int64_t row, begin, end;  // edges [begin, end) of the row
    bool first, last;         // the row begins, ends in this item
  };
  // f(Piece) for each piece of item t, in order.
  template <typename F>
  void for_each(int64_t t, F f) const {
    const int64_t low = t * step, high = low + step;
    for (int64_t r = row_at_cost(low); r < rows && indptr[r] + r < high; ++r) {
      const int64_t begin = max64(indptr[r], low - r - 1), end = min64(indptr[r + 1], high - r - 1);
      f(Piece{r, begin, end, indptr[r] + r >= low, end == indptr[r + 1]});
    }
  }
  // The row that is cut at the end of item t and begins in it (-1: none), and the item in which it ends.
  int64_t cut_row(int64_t t, int64_t& end_item) const {
    const int64_t high = (t + 1) * step;
    if (rows == 0 || high >= indptr[rows] + rows) return -1;
    const int64_t r = row_at_cost(high - 1);
    if (indptr[r + 1] + r + 1 <= high || indptr[r] + r < t * step) return -1;
    end_item = (indptr[r + 1] + r) / step;
    return r;
  }

 private:
  // The last row whose cost range begins at or before `cost`.
  int64_t row_at_cost(int64_t cost) const {
    int64_t low = 0, high = rows;
    while (high - low > 1) {
      const int64_t mid = (low + high) / 2;
      (indptr[mid] + mid <= cost ? low : high) = mid;
    }
    return low;
  }
  int64_t items_;
};

template <typename T, int S, int... I>
SACCADE_FORCE Vec<T> exchange(Vec<T> v, Seq<I...>) {
  return __builtin_shufflevector(v, v, (I ^ S)...);
}
template <typename T, int S = kLanes<T> / 2>
SACCADE_FORCE T lanes_max(Vec<T> v) {
  if constexpr (S == 0)
    return v[0];
  else
    return lanes_max<T, S / 2>(vmax<T>(v, exchange<T, S>(v, typename MakeSeq<kLanes<T>>::type{})));
}
template <typename T, int S = kLanes<T> / 2>
SACCADE_FORCE T lanes_sum(Vec<T> v) {
  if constexpr (S == 0)
    return v[0];
  else
    return lanes_sum<T, S / 2>(v + exchange<T, S>(v, typename MakeSeq<kLanes<T>>::type{}));
}

constexpr int64_t kEdgeLanes = 16;  // edges handled together; at least a vector of every set

// The edges of one step: their keys, their numbers, and which of them the rest of the mask keeps.
struct EdgeGroup {
  int64_t n;
  int64_t key[kEdgeLanes], id[kEdgeLanes];
  bool kept[kEdgeLanes];
};

static EdgeGroup edge_group(const GatherParams& p, int64_t b, int64_t h, int64_t row, int64_t begin,
                            int64_t end) {
  EdgeGroup g;
  g.n = min64(kEdgeLanes, end - begin);
  const Interval keys = row_interval(p.mask, b, h, row, p.seqlen_q, p.seqlen_k);
  for (int64_t e = 0; e < g.n; ++e) {
    const int64_t j = p.indices[begin + e];
    g.key[e] = j;
    g.id[e] = p.edge_ids ? p.edge_ids[begin + e] : begin + e;
    g.kept[e] = keys.begin <= j && j < keys.end && keeps_pair(p.mask, b, row, j);
  }
  return g;
}

// s[e] = x . rows[e] for n rows; lanes run along d.
template <typename T, typename S>
SACCADE_FORCE void edge_dots(const T* x, const S* const* rows, int64_t n, int64_t d, T* s) {
  constexpr int L = kLanes<T>;
  const int64_t tail = d % L;
  for (int64_t e0 = 0; e0 < n; e0 += L) {
    Vec<T> sums[L];
    for (int l = 0; l < L; ++l) {
      Vec<T> sum{};
      if (e0 + l < n) {
        const S* row = rows[e0 + l];
        int64_t c = 0;
        for (; c + L <= d; c += L) sum += load(x + c) * load_as<T>(row + c);
        if (tail) sum += load(x + c) * load_part<T>(row + c, tail);
      }
      sums[l] = sum;
    }
    butterfly<T, 1>(sums);
    Vec<T> total = sums[0];
#pragma GCC unroll 16
    for (int l = 1; l < L; ++l) total += sums[l];
    store(s + e0, total);
  }
}

// y += sum_e w[e] rows[e]; y is padded to whole vectors.
template <typename T, typename S>
SACCADE_FORCE void edge_sum(T* y, const S* const* rows, const T* w, int64_t n, int64_t d) {
  constexpr int L = kLanes<T>;
  int64_t c = 0;
  for (; c + 2 * L <= d; c += 2 * L) {
    Vec<T> a = load(y + c), b = load(y + c + L);
    for (int64_t e = 0; e < n; ++e) {
      a += w[e] * load_as<T>(rows[e] + c);
      b += w[e] * load_as<T>(rows[e] + c + L);
    }
    store(y + c, a);
    store(y + c + L, b);
  }
  for (; c < d; c += L) {
    const int64_t width = min64(L, d - c);
    Vec<T> a = load(y + c);
    for (int64_t e = 0; e < n; ++e)
      a += w[e] * (width == L ? load_as<T>(rows[e] + c) : load_part<T>(rows[e] + c, width));
    store(y + c, a);
  }
}

template <typename S>
SACCADE_FORCE const S* typed_row(const Rows& x, int64_t b, int64_t h, int64_t i) {
  return static_cast<const S*>(x.data) + b * x.batch + h * x.head + i * x.row;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
