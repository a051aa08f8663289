#include "backward_launch.h"
#include "backward_sm90.h"

namespace saccade {
namespace {

template <typename T, typename Shape>
std::string launch_hopper(Backward90Args& args, int64_t total_q, int64_t total_k, Stream stream) {
  const GradParams& p = args.all.p;
  const bool packed = p.cu_seqlens_q;
  const int64_t batch = packed ? 1 : p.batch, rows_q = packed ? total_q : p.seqlen_q,
                rows_k = packed ? total_k : p.seqlen_k;
  std::string error = launch_backward_rows(args.all, stream);
  if (error.empty()) error = encode_rows<T>(args.q, p.q, p.head_dim, rows_q, p.heads, batch, Shape::kBlockM);
  if (error.empty())
    error = encode_rows<T>(args.dout, p.dout, p.head_dim_v, rows_q, p.heads, batch, Shape::kBlockM);
  if (error.empty())
    error = encode_rows<T>(args.k, p.k, p.head_dim, rows_k, p.heads_k, batch, Shape::kBlockN);
  if (error.empty())
    error = encode_rows<T>(args.v, p.v, p.head_dim_v, rows_k, p.heads_k, batch, Shape::kBlockN);
  if (error.empty() && Shape::kWithQueries)
    error = fill_zero(args.dq, size_t(args.all.row_count * Shape::kHeadDim) * sizeof(float), stream);
  const int64_t blocks = ceil_div(p.seqlen_k, Shape::kBlockN) * p.batch * p.heads_k;
  if (error.empty()) error = check_blocks("backward_sm90", blocks);
  if (error.empty())
    error = launch("backward_sm90", &backward_sm90<T, Shape>, blocks, Shape::kThreads, Shape::kSharedBytes,
                   stream, args);
  if (!error.empty() || !Shape::kWithQueries) return error;
  args.all.blocks = int(ceil_div(p.seqlen_q, Shape::kBlockM));
  return launch("backward_round_sm90", &backward_round_sm90<T, Shape>, args.all.blocks * p.batch * p.heads,
                256, 0, stream, args);
}

// What the kernel of this file does; everything else goes to those of sm_80.
bool serves(const GradParams& p, int64_t total_k) {
  return !saccade_cuda_refuses(&p, 90) &&
         tma_reads(p.dout, p.seqlen_q, p.heads, p.cu_seqlens_q ? 1 : p.batch) &&
         p.needs & (kNeedK | kNeedV) && (p.cu_seqlens_k ? total_k : p.seqlen_k) > 0;
}

std::string backward(const GradParams& p, const int64_t* seed, void* workspace, int64_t lse_count,
                     int64_t total_k, bool deterministic, int device, Stream stream) {
  Backward90Args args{};
  if (std::string error = prepare_backward(args.all, p, seed, workspace, lse_count, total_k, device);
      !error.empty())
    return error;
  if (lse_count == 0 || !serves(p, total_k)) return run_backward_sm80(args.all, stream);
  args.dq = args.all.rows + 3 * args.all.row_count;
  const bool add_queries = p.needs & kNeedQ && !deterministic;
  const int64_t total_q = lse_count / p.heads;
  const std::string error =
      with_head_dim<64, 128, 256>(p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v, [&](auto size) {
        constexpr int kHeadDim = decltype(size)::value;
        return with_dtype(p.q.dtype, [&](auto type) {
          using T = decltype(type);
          return add_queries
                     ? launch_hopper<T, BackwardShape90<kHeadDim, true>>(args, total_q, total_k, stream)
                     : launch_hopper<T, BackwardShape90<kHeadDim, false>>(args, total_q, total_k, stream);
        });
      });
  const bool queries_left = p.needs & kNeedQ && !add_queries;
  return error.empty() && queries_left ? launch_backward_queries(args.all, stream) : error;
}

}  // namespace
}  // namespace saccade

extern "C" const char* saccade_cuda_backward_sm90(const saccade::GradParams* p, const int64_t* seed,
                                                  void* workspace, int64_t lse_count, int64_t total_k,
                                                  int deterministic, int device, void* stream) {
  return saccade::answer(saccade::backward(*p, seed, workspace, lse_count, total_k, deterministic, device,
                                           static_cast<saccade::Stream>(stream)));
}
