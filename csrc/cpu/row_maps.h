// Linear maps of rows by head and their gradient, work cut by shapes alone: a library's matrix products would
// depend on the number of threads.
#pragma once
#include "gather_columns.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

constexpr int64_t kMapRows = 512;  // of an item
constexpr int kMapTogether = 4;    // rows that share what is read of w
constexpr int64_t kGroup = 64;     // rows whose products are summed in T, and then in doubles

SACCADE_FORCE int64_t map_chunks(int64_t rows) { return (rows + kMapRows - 1) / kMapRows; }

template <typename T>
struct MapBuffers {
  int64_t ld;    // of y, in whole vectors
  T *w, *x, *y;  // [Dx][ld]; rows [kMapTogether][Dx], [kMapTogether][ld]

  MapBuffers(const RowMapParams& p, Arena& a) : ld(round_up(p.dim_y, kLanes<T>)) {
    w = a.take<T>(p.dim_x * ld);
    x = a.take<T>(max64(p.dim_x * kMapTogether, p.dim_y));  // and a row of base
    y = a.take<T>(ld * kMapTogether);
  }
  void read_weights(const RowMapParams& p, int64_t h) {
    memset(w, 0, size_t(p.dim_x * ld) * sizeof(T));
    for (int64_t c = 0; c < p.dim_y; ++c) {
      read_row(x, row_at(p.w, 0, h, c), p.w.dtype, p.w.col, p.dim_x);
      for (int64_t d = 0; d < p.dim_x; ++d) w[d * ld + c] = x[d];
    }
  }
  // V vectors of y of the rows.
  template <int V>
  void multiply(int64_t dim_x, int64_t c) {
    constexpr int L = kLanes<T>;
    Vec<T> sum[kMapTogether][V] = {};
    for (int64_t d = 0; d < dim_x; ++d)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Vec<T> weight = load(w + d * ld + c + v * L);
#pragma GCC unroll 4
        for (int i = 0; i < kMapTogether; ++i) sum[i][v] += x[i * dim_x + d] * weight;
      }
#pragma GCC unroll 4
    for (int i = 0; i < kMapTogether; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(y + i * ld + c + v * L, sum[i][v]);
  }
};

template <typename T>
static void row_map_item(const RowMapParams& p, int64_t item, char* scratch, char*) {
  const int64_t chunk = item % map_chunks(p.rows), head = item / map_chunks(p.rows);
  const int64_t b = head / p.heads, h = head % p.heads, end = min64(p.rows, (chunk + 1) * kMapRows);
  Arena arena{scratch};
  MapBuffers<T> m(p, arena);
  m.read_weights(p, h);
  for (int64_t at = chunk * kMapRows, n; at < end; at += n) {
    n = min64(kMapTogether, end - at);
    for (int64_t i = 0; i < n; ++i)
      read_row(m.x + i * p.dim_x, row_at(p.x, b, h, at + i), p.x.dtype, p.x.col, p.dim_x);
    for (int64_t c = 0; c < m.ld; c += 2 * kLanes<T>)
      c + kLanes<T> < m.ld ? m.template multiply<2>(p.dim_x, c) : m.template multiply<1>(p.dim_x, c);
    for (int64_t i = 0; i < n; ++i) {
      T* const y = m.y + i * m.ld;
      if (p.base.data) {
        read_row(m.x, row_at(p.base, b, h, at + i), p.base.dtype, p.base.col, p.dim_y);
        for (int64_t c = 0; c < p.dim_y; ++c) y[c] += m.x[c];
      }
      write_row(row_at(p.y, b, h, at + i), p.y.dtype, p.y.col, y, p.dim_y);
    }
  }
}

// sums[r * ld ..] += sum_e x[e * dim + r] y[e * ld ..], a vector of each, for R r.
template <int R, typename T>
static void add_products(const T* x, int64_t dim, const T* y, int64_t ld, int64_t n, double* sums) {
  Vec<T> sum[R] = {};
  for (int64_t e = 0; e < n; ++e) {
    const Vec<T> row = load(y + e * ld);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r] += x[e * dim + r] * row;
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) add_wide<T>(sums + r * ld, sum[r], kLanes<T>);
}

// Of one chunk of the rows of all batch entries, the sum of y x^T as [Dx][ld] doubles. A row y of zeros adds
// 0, though x be NaN.
template <typename T>
static void row_outer_item(const RowMapParams& p, int64_t item, char* scratch, char* workspace) {
  constexpr int64_t L = kLanes<T>;
  const int64_t all = p.batch * p.rows, chunk = item % map_chunks(all), h = item / map_chunks(all);
  const int64_t ld = round_up(p.dim_y, L), end = min64(all, (chunk + 1) * kMapRows);
  Arena arena{scratch};
  T *x = arena.take<T>(kGroup * p.dim_x), *y = arena.take<T>(kGroup * ld);
  memset(y, 0, size_t(kGroup * ld) * sizeof(T));
  double* sums = reinterpret_cast<double*>(workspace) + item * p.dim_x * ld;
  memset(sums, 0, size_t(p.dim_x * ld) * sizeof(double));
  for (int64_t at = chunk * kMapRows; at < end; at += kGroup) {
    int64_t n = 0;
    for (int64_t f = at; f < min64(end, at + kGroup); ++f) {
      read_row(y + n * ld, row_at(p.y, f / p.rows, h, f % p.rows), p.y.dtype, p.y.col, p.dim_y);
      bool zero = true;
      for (int64_t c = 0; c < p.dim_y; ++c) zero &= y[n * ld + c] == T(0);
      if (zero) continue;
      read_row(x + n * p.dim_x, row_at(p.x, f / p.rows, h, f % p.rows), p.x.dtype, p.x.col, p.dim_x);
      ++n;
    }
    for (int64_t d = 0; d < p.dim_x; d += p.dim_x - d >= 4 ? 4 : 1)
      for (int64_t c = 0; c < ld; c += L)
        (p.dim_x - d >= 4 ? &add_products<4, T> : &add_products<1, T>)(x + d, p.dim_x, y + c, ld, n,
                                                                       sums + d * ld + c);
  }
}

// dw of one head, the chunks' sums in their order.
template <typename T>
static void row_outer_sum(const RowMapParams& p, int64_t h, char*, char* workspace) {
  const int64_t ld = round_up(p.dim_y, kLanes<T>), chunks = map_chunks(p.batch * p.rows);
  const double* sums = reinterpret_cast<const double*>(workspace) + h * chunks * p.dim_x * ld;
  T* dw = static_cast<T*>(p.dw) + h * p.dim_y * p.dim_x;
  for (int64_t c = 0; c < p.dim_y; ++c)
    for (int64_t d = 0; d < p.dim_x; ++d) {
      double sum = 0;
      for (int64_t t = 0; t < chunks; ++t) sum += sums[(t * p.dim_x + d) * ld + c];
      dw[c * p.dim_x + d] = T(sum);
    }
}

template <typename T>
static Plan<RowMapParams> row_map_plan(const RowMapParams& p) {
  Plan<RowMapParams> plan;
  Arena a{nullptr};
  const MapBuffers<T> sizes(p, a);
  plan.scratch_bytes = a.used;
  plan.add(p.batch * p.heads * map_chunks(p.rows), &row_map_item<T>);
  return plan;
}
template <typename T>
static Plan<RowMapParams> row_outer_plan(const RowMapParams& p) {
  Plan<RowMapParams> plan;
  Arena a{nullptr};
  const int64_t ld = round_up(p.dim_y, kLanes<T>), items = p.heads * map_chunks(p.batch * p.rows);
  a.take<T>(kGroup * p.dim_x), a.take<T>(kGroup * ld);
  plan.scratch_bytes = a.used;
  plan.workspace_bytes = size_t(items * p.dim_x * ld) * sizeof(double);
  plan.add(items, &row_outer_item<T>);
  plan.add(p.heads, &row_outer_sum<T>);
  return plan;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
