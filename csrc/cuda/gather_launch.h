// What the launchers of the gather body share.
#pragma once
#include "gather.h"
#include "host.h"

namespace saccade {

constexpr int64_t kGatherWarps =
    16384;  // enough for a large GPU; a constant, so that results do not depend on it

// Items are long enough to pay for the pieces they cut, short enough for a hub to be shared.
inline Split split_of(const int64_t* indptr, int64_t rows, int64_t edges, int64_t heads) {
  const int64_t cost = rows + edges;
  const int64_t step = most_of(64, least_of(1024, ceil_div(cost * heads, kGatherWarps)));
  return {indptr, rows, step, ceil_div(cost, step)};
}

inline GatherArgs gather_args(const GatherParams& p, const int64_t* seed) {
  GatherArgs args{};
  args.p = p;
  args.terms = terms_of(p);
  // Logits are natural ones: terms of edges are added to them.
  args.terms.bare = false;
  args.terms.unit = 1;
  args.terms.factor = float(1 / kLn2);
  args.seed = seed;
  args.queries = split_of(p.indptr, p.seqlen_q, p.edges, p.batch * p.heads);
  args.keys = split_of(p.t_indptr, p.seqlen_k, p.edges, p.batch * p.heads_k);
  return args;
}

template <typename T>
void set_aligned(GatherArgs& args) {
  const GatherParams& p = args.p;
  args.aligned_q = vectors_aligned<T>(p.q);
  args.aligned_k = vectors_aligned<T>(p.k);
  args.aligned_v = vectors_aligned<T>(p.v);
  args.aligned_out = vectors_aligned<T>(p.out);
  args.aligned_dout = vectors_aligned<T>(p.dout);
  args.aligned_dq = vectors_aligned<T>(p.dq);
  args.aligned_dk = vectors_aligned<T>(p.dk);
  args.aligned_dv = vectors_aligned<T>(p.dv);
}

inline int64_t gather_width(const Params& p) {
  const int64_t wider = most_of(p.head_dim, p.head_dim_v);
  return wider <= 32 ? 32 : wider <= 64 ? 64 : wider <= 128 ? 128 : 256;
}
// Numbers of the pieces of a split, in fp32; nothing is cut where there is one item.
inline int64_t piece_numbers(const Split& s, int64_t heads, int64_t size) {
  return s.items > 1 ? heads * s.items * 2 * size : 0;
}

// launch(type, width) for the call's dtype and width.
template <typename Launch>
std::string with_gather_shape(GatherArgs& args, Launch launch) {
  return with_head_dim<32, 64, 128, 256>(gather_width(args.p), [&](auto size) {
    const auto run = [&](auto type) {
      set_aligned<decltype(type)>(args);
      return launch(type, size);
    };
    return args.p.q.dtype == DType::kFloat32 ? run(float()) : with_dtype(args.p.q.dtype, run);
  });
}

// A warp for each item.
template <typename Kernel>
std::string launch_items(const char* name, Kernel kernel, const Split& s, int64_t heads, Stream stream,
                         const GatherArgs& args) {
  const int64_t blocks = ceil_div(s.items * heads, kGatherThreads / 32);
  if (std::string error = check_blocks(name, blocks); !error.empty() || !blocks) return error;
  return launch(name, kernel, blocks, kGatherThreads, 0, stream, args);
}

}  // namespace saccade
