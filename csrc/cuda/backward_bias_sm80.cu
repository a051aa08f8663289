#include "backward_bias_sm80.h"
#include "backward_launch.h"

std::string saccade::launch_backward_bias(BackwardArgs args, Stream stream) {
  const GradParams& p = args.p;
  return with_shape(p, [&](auto size, auto type) {
    using Shape = BiasShape80<decltype(size)::value>;
    const int64_t m = p.dbias_size[2] > 1 ? ceil_div(p.seqlen_q, Shape::kBlockM) : 1;
    const int64_t n = p.dbias_size[3] > 1 ? ceil_div(p.seqlen_k, Shape::kBlockN) : 1;
    const int64_t blocks = p.dbias_size[0] * p.dbias_size[1] * m * n;
    if (std::string error = check_blocks("backward_bias_sm80", blocks); !error.empty() || !blocks)
      return error;
    return launch("backward_bias_sm80", &backward_bias_sm80<decltype(type), Shape>, blocks, Shape::kThreads,
                  Shape::kSharedBytes, stream, args);
  });
}
