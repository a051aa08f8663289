// Numbers of (edge, head) pairs, and the sums over rows of edges. The pairs of a step lie edge by edge, the
// heads of an edge side by side: what belongs to one head stands in the same lanes of every vector, so that a
// softmax over edges needs no sum within a vector until its end, and few edges of many heads fill vectors as
// well as many edges of one.
#pragma once
#include "gather.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// The key head of head h, without a division where that is its own.
SACCADE_FORCE int64_t key_head(int64_t h, int64_t group) { return group == 1 ? h : h / group; }

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

// The sums of the lanes of r[l] for l < n, by the smallest tree; the vector repeats them.
template <typename T, int N = kLanes<T>>
SACCADE_FORCE Vec<T> sum_first(Vec<T>* r, int64_t n) {
  if constexpr (N > 1)
    if (n <= N / 2) return sum_first<T, N / 2>(r, n);
  return sum_each<T, N>(r);
}
template <typename T>
static void store_sums(const Vec<T>* parts, int64_t n, T* to) {
  Vec<T> r[kLanes<T>];
#pragma GCC unroll 16
  for (int l = 0; l < kLanes<T>; ++l) r[l] = l < n ? parts[l] : Vec<T>{};
  store(to, sum_first<T>(r, n));
}

// to[e * pitch + h] = the sum of the lanes of what part(e, into) puts into into[h], for n edges; what follows
// up to the end of the vector repeats those. parts: lanes() vectors, those of no head always 0.
template <typename T, typename Part>
SACCADE_FORCE void pair_sums(const HeadLanes<T>& x, int64_t n, Vec<T>* parts, T* to, Part part) {
  constexpr int64_t L = kLanes<T>;
  const int64_t together = x.pitch < L ? L / x.pitch : 1;
  for (int64_t e0 = 0; e0 < n; e0 += together) {
    const int64_t count = min64(together, n - e0);
    for (int64_t e = 0; e < count; ++e) part(e0 + e, parts + e * x.pitch);
    for (int64_t c = 0; c < count * x.pitch; c += L)
      store_sums<T>(parts + c, min64(L, count * x.pitch - c), to + e0 * x.pitch + c);
  }
}

// Rows of one query, a head each, padded with zeros to whole vectors.
template <typename T>
struct HeadRows {
  const T* at;
  int64_t head;
  SACCADE_MEMBER const T* operator[](int64_t h) const { return at + h * head; }
};

// to[h] = the products of x[h] and the row of h's key head, added up along d; V whole vectors, 0: any d.
template <typename T, typename S, int V>
static void edge_products(const HeadLanes<T>& lanes, HeadRows<T> x, const S* row, int64_t head, int64_t d,
                          Vec<T>* to) {
  for (int64_t k = 0; k < lanes.heads_k; ++k, row += head)
    for (int64_t g = 0; g < lanes.group; ++g, x.at += x.head, ++to) {
      if constexpr (V == 0) {
        *to = dot_part<T, S>(x.at, row, d);
      } else {
        Vec<T> sum = load(x.at) * load_as<T>(row);
#pragma GCC unroll 4
        for (int v = 1; v < V; ++v) sum += load(x.at + v * kLanes<T>) * load_as<T>(row + v * kLanes<T>);
        *to = sum;
      }
    }
}
template <typename T, typename S>
using EdgeProducts = void (*)(const HeadLanes<T>&, HeadRows<T>, const S*, int64_t, int64_t, Vec<T>*);
template <typename T, typename S>
SACCADE_FORCE EdgeProducts<T, S> edge_products_for(int64_t d) {
  return d == kLanes<T>       ? &edge_products<T, S, 1>
         : d == 2 * kLanes<T> ? &edge_products<T, S, 2>
         : d == 4 * kLanes<T> ? &edge_products<T, S, 4>
                              : &edge_products<T, S, 0>;
}

// to[e * pitch + h] = x[h] . row e of h's key head; also(e) runs with each edge.
template <typename T, typename S, typename Also>
SACCADE_FORCE void pair_dots(const HeadLanes<T>& lanes, HeadRows<T> x, const EdgeRows<S>& rows, int64_t n,
                             int64_t d, Vec<T>* parts, T* to, Also also) {
  const EdgeProducts<T, S> products = edge_products_for<T, S>(d);
  pair_sums(lanes, n, parts, to,
            [&](int64_t e, Vec<T>* into) { also(e), products(lanes, x, rows.at[e], rows.head, d, into); });
}
SACCADE_FORCE void nothing_else(int64_t) {}

// y[v] += sum_e w[e] row_e[v], or y = where it is fresh, for V vectors: those of one head, or, H of them to a
// head, those of V / H heads, whose weights lie side by side.
template <int V, int H, typename T, typename S>
SACCADE_FORCE void edge_sum_part(T* y, bool fresh, const EdgeRows<S>& rows, int64_t at, int64_t n,
                                 const T* weight, int64_t pitch) {
  constexpr int L = kLanes<T>;
  Vec<T> a[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) a[v] = fresh ? Vec<T>{} : load(y + v * L);
  for (int64_t e = 0; e < n; ++e) {
    const S* row = rows.at[e] + at;
    const T* w = weight + e * pitch;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) a[v] += w[v / H] * load_as<T>(row + v * L);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(y + v * L, a[v]);
}

// y += sum_e weight[e * pitch] row e of key head k, or y = where it is fresh; y is padded to whole vectors.
template <typename T, typename S>
static void edge_sum(T* y, bool fresh, const EdgeRows<S>& rows, int64_t k, int64_t n, int64_t d,
                     const T* weight, int64_t pitch) {
  constexpr int L = kLanes<T>;
  const int64_t at = k * rows.head;
  int64_t c = 0;
  for (; c + 4 * L <= d; c += 4 * L) edge_sum_part<4, 4>(y + c, fresh, rows, at + c, n, weight, pitch);
  if (c + 2 * L <= d) {
    edge_sum_part<2, 2>(y + c, fresh, rows, at + c, n, weight, pitch);
    c += 2 * L;
  }
  if (c + L <= d) {
    edge_sum_part<1, 1>(y + c, fresh, rows, at + c, n, weight, pitch);
    c += L;
  }
  if (c == d) return;
  Vec<T> a = fresh ? Vec<T>{} : load(y + c);
  for (int64_t e = 0; e < n; ++e) a += weight[e * pitch] * load_part<T>(rows.at[e] + at + c, d - c);
  store(y + c, a);
}

// Key head k's rows, those of edges of weight 0 replaced by zeros: what stands there, NaN perhaps, must not
// be touched.
template <typename T, typename S>
SACCADE_FORCE EdgeRows<S> live_rows(const EdgeRows<S>& rows, int64_t k, int64_t n, const T* weight,
                                    int64_t pitch, const S* zeros) {
  EdgeRows<S> live;
  for (int64_t e = 0; e < n; ++e) live.at[e] = weight[e * pitch] != T(0) ? rows.at[e] + k * rows.head : zeros;
  return live;
}

// How many heads edge_sums takes in one walk over the edges: those of rows of one or two vectors that lie
// side by side, where all edges are live.
template <typename T>
SACCADE_FORCE int64_t heads_together(bool all, const HeadLanes<T>& x, int64_t head, int64_t d) {
  constexpr int L = kLanes<T>;
  const bool fit = all && x.group == 1 && head == d && (d == L || d == 2 * L) && x.heads % (4 * L / d) == 0;
  return fit ? 4 * L / d : 1;
}

// edge_sum of `together` heads from k on, weights and sums side by side, over all edges or over those whose
// weight is not 0.
template <typename T, typename S>
SACCADE_FORCE void edge_sums(int64_t together, bool all, T* y, bool fresh, const EdgeRows<S>& rows, int64_t k,
                             int64_t n, int64_t d, const T* weight, int64_t pitch, const S* zeros) {
  if (together == 4)
    edge_sum_part<4, 1>(y, fresh, rows, k * rows.head, n, weight, pitch);
  else if (together == 2)
    edge_sum_part<4, 2>(y, fresh, rows, k * rows.head, n, weight, pitch);
  else if (all)
    edge_sum<T, S>(y, fresh, rows, k, n, d, weight, pitch);
  else
    edge_sum<T, S>(y, fresh, live_rows(rows, k, n, weight, pitch, zeros), 0, n, d, weight, pitch);
}

// Padded rows of all heads, in T: the tensor's own where it holds them so.
template <typename T, typename S>
static HeadRows<T> read_heads(const Rows& x, int64_t b, int64_t row, int64_t heads, int64_t d, T* buffer) {
  constexpr int L = kLanes<T>;
  if constexpr (sizeof(S) == sizeof(T))
    if (d % L == 0) return {typed_row<S>(x, b, 0, row), x.head};
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

// Row `row` of x where sums for all of its heads can be made in place, as T holds them in whole vectors; or
// null.
template <typename T, typename S>
SACCADE_FORCE T* sums_in_place(const Rows& x, int64_t b, int64_t row, int64_t heads, int64_t d) {
  if constexpr (sizeof(S) == sizeof(T))
    if (x.data && x.col == 1 && d % kLanes<T> == 0 && (heads == 1 || x.head == d))
      return reinterpret_cast<T*>(row_at(x, b, 0, row));
  return nullptr;
}

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
