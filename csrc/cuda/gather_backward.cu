#include "gather_backward.h"
#include "gather_launch.h"

namespace saccade {
namespace {

// The workspace: rows first, then the gradients of logits, then the pieces of either pass.
struct Workspace {
  int64_t stats, edges, pieces;
  explicit Workspace(const GatherArgs& args) {
    const GatherParams& p = args.p;
    const int64_t width = gather_width(p), align = 4;
    stats = ceil_div(3 * p.batch * p.heads * p.seqlen_q, align) * align;
    edges = p.needs & kNeedEdgeBias ? ceil_div(p.batch * p.heads * p.edges, align) * align : 0;
    pieces =
        most_of(p.needs & kNeedQ ? piece_numbers(args.queries, p.batch * p.heads, width) : 0,
                p.needs & (kNeedK | kNeedV) ? piece_numbers(args.keys, p.batch * p.heads_k, 2 * width) : 0);
  }
};

template <typename T, int kDim>
std::string launch_backward(const GatherArgs& args, Stream stream) {
  const GatherParams& p = args.p;
  const int64_t heads = p.batch * p.heads, heads_k = p.batch * p.heads_k;
  const int64_t rows = kGatherThreads / 32 * Team<T, kDim>::kTeams, count = heads * p.seqlen_q;
  std::string error = check_blocks("gather_rows", ceil_div(count, rows));
  const auto then = [&](bool wanted, auto run) {
    if (error.empty() && wanted) error = run();
  };
  then(count, [&] {
    return launch("gather_rows", &gather_rows<T, kDim>, ceil_div(count, rows), kGatherThreads, 0, stream,
                  args);
  });
  then(p.needs & (kNeedQ | kNeedEdgeBias), [&] {
    return launch_items("gather_backward_queries", &gather_backward_queries<T, kDim>, args.queries, heads,
                        stream, args);
  });
  then(p.needs & kNeedQ && args.queries.items > 1, [&] {
    return launch_items("gather_sum", &gather_sum<T, kDim, false>, args.queries, heads, stream, args);
  });
  then(p.needs & kNeedEdgeBias && p.edges, [&] {
    const int64_t blocks = ceil_div(p.edges * (p.edge_bias_head ? p.heads : 1), kGatherThreads);
    std::string too_many = check_blocks("gather_edge_bias", blocks);
    return too_many.empty()
               ? launch("gather_edge_bias", &gather_edge_bias, blocks, kGatherThreads, 0, stream, args)
               : too_many;
  });
  // The pieces of the queries have been summed; those of the keys take their place.
  then(p.needs & (kNeedK | kNeedV), [&] {
    return launch_items("gather_backward_keys", &gather_backward_keys<T, kDim>, args.keys, heads_k, stream,
                        args);
  });
  then(p.needs & (kNeedK | kNeedV) && args.keys.items > 1, [&] {
    return launch_items("gather_sum", &gather_sum<T, kDim, true>, args.keys, heads_k, stream, args);
  });
  return error;
}

std::string backward(const GatherParams& p, const int64_t* seed, void* workspace, int device, Stream stream) {
  if (const char* reason = saccade_cuda_gather_refuses(&p))
    return std::string("gather_backward does not serve ") + reason;
  if (p.needs & ~(kNeedQ | kNeedK | kNeedV | kNeedEdgeBias))
    return "gather_backward does not serve the gradients of edge features or of a score's weight";
  if (p.batch == 0 || p.heads == 0) return "";
  if (std::string error = select_device(device); !error.empty()) return error;
  GatherArgs args = gather_args(p, seed);
  const Workspace sizes(args);
  args.stats = static_cast<float*>(workspace);
  args.edges = sizes.edges ? args.stats + sizes.stats : nullptr;
  args.pieces = args.stats + sizes.stats + sizes.edges;
  return with_gather_shape(args, [&](auto type, auto size) {
    return launch_backward<decltype(type), decltype(size)::value>(args, stream);
  });
}

}  // namespace
}  // namespace saccade

extern "C" int64_t saccade_cuda_gather_backward_workspace(const saccade::GatherParams* p) {
  const saccade::Workspace sizes(saccade::gather_args(*p, nullptr));
  return 4 * (sizes.stats + sizes.edges + sizes.pieces);
}

extern "C" const char* saccade_cuda_gather_backward(const saccade::GatherParams* p, const int64_t* seed,
                                                    void* workspace, int device, void* stream) {
  return saccade::answer(
      saccade::backward(*p, seed, workspace, device, static_cast<saccade::Stream>(stream)));
}
