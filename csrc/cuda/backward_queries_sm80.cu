#include "backward_launch.h"
#include "backward_queries_sm80.h"

std::string saccade::launch_backward_queries(BackwardArgs args, Stream stream) {
  const Params& p = args.p;
  const bool general = is_general(args.terms);
  return with_shape(p, [&](auto size, auto type) {
    using Shape = QueriesShape80<decltype(size)::value>;
    using T = decltype(type);
    args.blocks = int(ceil_div(p.seqlen_q, Shape::kBlockM));
    const int64_t blocks = args.blocks * p.batch * p.heads;
    if (std::string error = check_blocks("backward_queries_sm80", blocks); !error.empty() || !blocks)
      return error;
    return launch("backward_queries_sm80",
                  general ? &backward_queries_sm80<T, Shape, true> : &backward_queries_sm80<T, Shape, false>,
                  blocks, Shape::kThreads, Shape::kSharedBytes, stream, args);
  });
}
