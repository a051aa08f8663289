// The passes of the backward kernels, each compiled in a file of its own.
#pragma once
#include "backward.h"
#include "host.h"

namespace saccade {

// Everything of the arguments but `blocks`; refuses what the kernels do not serve.
std::string prepare_backward(BackwardArgs& args, const GradParams& p, const int64_t* seed, void* workspace,
                             int64_t lse_count, int64_t total_k, int device);
std::string run_backward_sm80(const BackwardArgs& args, Stream stream);
std::string launch_backward_rows(BackwardArgs args, Stream stream);
std::string launch_backward_keys(BackwardArgs args, Stream stream);
std::string launch_backward_queries(BackwardArgs args, Stream stream);
std::string launch_backward_bias(BackwardArgs args, Stream stream);

template <typename Launch>
std::string with_shape(const Params& p, Launch launch_one) {
  return with_head_dim<64, 128, 256>(p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v, [&](auto size) {
    return with_dtype(p.q.dtype, [&](auto type) { return launch_one(size, type); });
  });
}

}  // namespace saccade
