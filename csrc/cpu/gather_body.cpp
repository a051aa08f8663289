// The gather body: graphs in CSR form. Compiled once per instruction set.
#include "gather_backward.h"

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

}  // namespace

extern const GatherTable gather_kernels;
const GatherTable gather_kernels{&forward, &backward};

}  // namespace SACCADE_ISA
}  // namespace saccade
