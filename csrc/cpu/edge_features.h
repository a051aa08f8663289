// Features of edges as rows of T: the tensor's own where it holds them so, else copies, padded with zeros to
// whole vectors.
#pragma once
#include "edge_sums.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

template <typename T>
class FeatureReader {
 public:
  EdgeRows<T> rows;

  FeatureReader(const GatherParams& p, Arena& a, int64_t dim)
      : x_(p.edge_x),
        dim_(dim),
        ld_(round_up(dim, kLanes<T>)),
        in_place_(x_.dtype == AccumulatorOf<T>::value && x_.col == 1 && ld_ == dim) {
    const int64_t copied = in_place_ ? 0 : kEdgeLanes * ld_;
    copies_ = a.take<T>(copied);
    zeros_ = a.take<T>(ld_);
    if (!a.base) return;
    memset(copies_, 0, size_t(copied) * sizeof(T));
    memset(zeros_, 0, size_t(ld_) * sizeof(T));
  }
  // Those of n edges, the e-th of which the user numbers id(e). That order is any: for the first `ahead` of
  // them, those of the edges kEdgeLanes behind are asked for.
  template <typename Id>
  void read(int64_t n, int64_t ahead, Id id) {
    for (int64_t e = 0; e < n; ++e) {
      const char* from = row_at(x_, 0, 0, id(e));
      rows.at[e] = in_place_ ? reinterpret_cast<const T*>(from) : copies_ + e * ld_;
      if (!in_place_) read_row(copies_ + e * ld_, from, x_.dtype, x_.col, dim_);
    }
    const RowLines lines(x_, 0, 1, dim_);
    for (int64_t e = 0; e < ahead; ++e) lines.ask(id(e + kEdgeLanes));
  }
  // Edge e counts for nothing, whatever its features are.
  void drop(int64_t e) { rows.at[e] = zeros_; }

 private:
  Rows x_;
  int64_t dim_, ld_;
  bool in_place_;
  T *copies_, *zeros_;
};

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
