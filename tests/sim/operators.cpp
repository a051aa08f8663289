// csrc/cuda_ops.cpp on a machine without a GPU: its entries as operators `saccade_sim` for CPU tensors, over
// the simulated kernels. Guards and streams are nothing here.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(saccade_sim, CPU, m, C10_UID)

#include "cuda_ops.cpp"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
