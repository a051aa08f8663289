// The gather body: graphs in CSR form. Compiled once per instruction set.
#include "gather_backward.h"
#include "row_maps.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// f(storage type) for the dtype of the tensors.
template <template <typename, typename> class Maker>
Plan<GatherParams> by_dtype(const GatherParams& p) {
  switch (p.q.dtype) {
    case DType::kFloat64:
      return Maker<double, double>::make(p);
    case DType::kBFloat16:
      return Maker<float, bf16>::make(p);
    case DType::kFloat16:
      return Maker<float, half_bits>::make(p);
    default:
      return Maker<float, float>::make(p);
  }
}
template <typename T, typename S>
struct Forward {
  static Plan<GatherParams> make(const GatherParams& p) { return gather_forward_plan<T, S>(p); }
};
template <typename T, typename S>
struct Backward {
  static Plan<GatherParams> make(const GatherParams& p) { return gather_backward_plan<T, S>(p); }
};
Plan<GatherParams> forward(const GatherParams& p) { return by_dtype<Forward>(p); }
Plan<GatherParams> backward(const GatherParams& p) { return by_dtype<Backward>(p); }
Plan<RowMapParams> row_map(const RowMapParams& p) {
  return p.x.dtype == DType::kFloat64 ? row_map_plan<double>(p) : row_map_plan<float>(p);
}
Plan<RowMapParams> row_outer(const RowMapParams& p) {
  return p.x.dtype == DType::kFloat64 ? row_outer_plan<double>(p) : row_outer_plan<float>(p);
}

}  // namespace

extern const GatherTable gather_kernels;
const GatherTable gather_kernels{&forward, &backward, &row_map, &row_outer};

}  // namespace SACCADE_ISA
}  // namespace saccade
