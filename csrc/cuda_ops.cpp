// The operators' entries for CUDA tensors; compiled where nvcc is. Nothing here reads what a tensor holds or
// waits for the device, so calls can be captured in a CUDA graph.
#include <torch/csrc/stable/accelerator.h>

#include "attention_call.h"
#include "cuda/launch.h"
#include "graph_call.h"

// In libtorch_cuda alone: absent, and null, in torch's builds without CUDA, where this library loads too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace saccade {
namespace {

// The device of a tensor, current while this lives, and torch's stream there.
class Gpu {
 public:
  explicit Gpu(const Tensor& t) : index(t.get_device_index()), guard_(index) {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream, "saccade: this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  }
  int32_t index;
  void* stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

constexpr int64_t kDecode = 1;  // of the operators' argument `body`; the tiled kernels serve the rest

void check(const char* error) { STD_TORCH_CHECK(!error, "saccade: ", error); }

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  Params p;
  Call call;
  call.read(s, true, p);
  call.body = s.next<int64_t>();
  const std::vector<int64_t> order = s.next<std::vector<int64_t>>();
  call.fill(p);
  const Gpu gpu(call.q);
  const auto [out, lse] = forward_outputs(call, order, p);
  const int64_t* seed = pointer<int64_t>(call.seed);
  if (call.body == kDecode) {
    const Tensor workspace = empty({saccade_cuda_decode_workspace(&p)}, ScalarType::Byte, call.q);
    check(saccade_cuda_decode(&p, seed, workspace.mutable_data_ptr(), gpu.index, gpu.stream));
  } else {
    const Tensor counter = empty({4}, ScalarType::Byte, call.q);
    check(saccade_cuda_forward(&p, seed, call.q.size(0), call.k.size(0), counter.mutable_data_ptr(),
                               gpu.index, gpu.stream));
  }
  give(stack, 0, out);
  give(stack, 1, lse);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  BackwardCall call;
  call.read_backward(stack);
  const Gpu gpu(call.q);
  call.make_gradients();
  const int64_t rows = call.lse.numel();
  const int64_t bytes = saccade_cuda_backward_workspace(&call.p, rows, call.deterministic, gpu.index);
  const Tensor workspace = empty({bytes}, ScalarType::Byte, call.q);
  check(saccade_cuda_backward(&call.p, pointer<int64_t>(call.seed), workspace.mutable_data_ptr(), rows,
                              call.k.size(0), call.deterministic, gpu.index, gpu.stream));
  call.give_gradients(stack);
}

void gather_forward(StableIValue* stack, uint64_t, uint64_t) {
  GraphForward call;
  call.read_forward(stack);
  const Gpu gpu(call.q);
  call.make_results();
  const Tensor workspace = empty({saccade_cuda_gather_forward_workspace(&call.p)}, ScalarType::Byte, call.q);
  check(saccade_cuda_gather_forward(&call.p, pointer<int64_t>(call.seed), workspace.mutable_data_ptr(),
                                    gpu.index, gpu.stream));
  call.give_results(stack);
}

void gather_backward(StableIValue* stack, uint64_t, uint64_t) {
  GraphBackward call;
  call.read_backward(stack);
  const Gpu gpu(call.q);
  call.make_gradients();
  const Tensor workspace = empty({saccade_cuda_gather_backward_workspace(&call.p)}, ScalarType::Byte, call.q);
  check(saccade_cuda_gather_backward(&call.p, pointer<int64_t>(call.seed), workspace.mutable_data_ptr(),
                                     gpu.index, gpu.stream));
  call.give_gradients(stack);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) {
  m.impl("forward", &forward);
  m.impl("backward", &backward);
  m.impl("gather_forward", &gather_forward);
  m.impl("gather_backward", &gather_backward);
}

}  // namespace saccade
