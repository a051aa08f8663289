#include "backward_keys_sm80.h"
#include "backward_launch.h"

namespace saccade {
namespace {

template <typename T, typename Shape>
std::string launch_keys(BackwardArgs& args, Stream stream) {
  args.blocks = int(ceil_div(args.p.seqlen_k, Shape::kBlockN));
  const int64_t blocks = args.blocks * args.p.batch * args.p.heads_k;
  if (std::string error = check_blocks("backward_keys_sm80", blocks); !error.empty() || !blocks) return error;
  return launch("backward_keys_sm80", &backward_keys_sm80<T, Shape>, blocks, Shape::kThreads,
                Shape::kSharedBytes, stream, args);
}

}  // namespace
}  // namespace saccade

std::string saccade::launch_backward_keys(BackwardArgs args, Stream stream) {
  return with_shape(args.p, [&](auto size, auto type) {
    constexpr int kHeadDim = decltype(size)::value;
    using T = decltype(type);
    return is_general(args.terms) ? launch_keys<T, KeysShape80<kHeadDim, true>>(args, stream)
                                  : launch_keys<T, KeysShape80<kHeadDim, false>>(args, stream);
  });
}
