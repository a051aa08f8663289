#include "gather_forward.h"
#include "gather_launch.h"

namespace saccade {
namespace {

std::string forward(const GatherParams& p, const int64_t* seed, void* workspace, int device, Stream stream) {
  if (const char* reason = saccade_cuda_gather_refuses(&p))
    return std::string("gather_forward does not serve ") + reason;
  if (p.batch == 0 || p.heads == 0 || p.seqlen_q == 0) return "";
  if (std::string error = select_device(device); !error.empty()) return error;
  GatherArgs args = gather_args(p, seed);
  args.pieces = static_cast<float*>(workspace);
  return with_gather_shape(args, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int kDim = decltype(size)::value;
    const int64_t heads = p.batch * p.heads;
    std::string error =
        launch_items("gather_forward", &gather_forward<T, kDim>, args.queries, heads, stream, args);
    if (!error.empty() || args.queries.items == 1) return error;
    return launch_items("gather_merge", &gather_merge<T, kDim>, args.queries, heads, stream, args);
  });
}

}  // namespace
}  // namespace saccade

extern "C" int64_t saccade_cuda_gather_forward_workspace(const saccade::GatherParams* p) {
  const saccade::GatherArgs args = saccade::gather_args(*p, nullptr);
  return 4 * saccade::piece_numbers(args.queries, p->batch * p->heads, saccade::gather_width(*p) + 4);
}

extern "C" const char* saccade_cuda_gather_forward(const saccade::GatherParams* p, const int64_t* seed,
                                                   void* workspace, int device, void* stream) {
  return saccade::answer(saccade::forward(*p, seed, workspace, device, static_cast<saccade::Stream>(stream)));
}
