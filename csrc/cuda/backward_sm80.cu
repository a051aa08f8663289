// The backward pass for every GPU from sm_80 on: what each query needs to know of its row, then one pass for
// each gradient.
#include "backward_launch.h"

namespace saccade {
namespace {

constexpr int kRowThreads = 128, kRowsOfBlock = 32;

// lse in two parts and rowsum(dO * O) - dlse, a warp for each row.
template <typename T>
SACCADE_KERNEL(kRowThreads, 1)
backward_rows_sm80(SACCADE_PARAM BackwardArgs args) {
  const GradParams& p = args.p;
  const int64_t heads = block_index() / args.blocks;
  const Head x = head_of(p, args.terms, int(heads / p.heads), int(heads % p.heads));
  const int l = thread_index() % 32,
            first = int(block_index() % args.blocks) * kRowsOfBlock + thread_index() / 32;
  const T* dout = rows_at<const T>(p.dout, x.b, x.h, x.q_begin);
  const T* out = rows_at<const T>(p.out, x.b, x.h, x.q_begin);
  const int rows = (x.seqlen_q + kRowPad - 1) / kRowPad * kRowPad;
  for (int i = first; i < least(first + kRowsOfBlock, rows); i += kRowThreads / 32) {
    float delta = 0, high = kInfinity, low = 0;  // no query, or none with a key: weights of 0
    for (int d = l; i < x.seqlen_q && d < p.head_dim_v; d += 32)
      delta += to_float(load_global(dout + i * p.dout.row + d * p.dout.col)) *
               to_float(load_global(out + i * p.out.row + d * p.out.col));
    for (int mask = 16; mask; mask /= 2) delta += shuffle_xor(delta, mask);
    if (l) continue;
    if (i < x.seqlen_q) {
      const int64_t at = lse_at(p, x) + i;
      const double lse = load_global(p.lse + at);
      const double exponent = args.terms.bare ? lse / kLn2 : lse;
      if (p.dlse) delta -= float(load_global(p.dlse + at));
      if (lse != -double(kInfinity)) high = float(exponent);
      if (exponent - exponent == 0) low = float(exponent - double(high));
    }
    float* to = args.rows + row_of(args, x) + i;
    store_global(to, high);
    store_global(to + args.row_count, low);
    store_global(to + 2 * args.row_count, delta);
  }
}

}  // namespace

std::string launch_backward_rows(BackwardArgs args, Stream stream) {
  const Params& p = args.p;
  args.blocks = int(ceil_div(p.seqlen_q, kRowPad) * (kRowPad / kRowsOfBlock));
  const int64_t blocks = args.blocks * p.batch * p.heads;
  if (std::string error = check_blocks("backward_rows_sm80", blocks); !error.empty() || !blocks) return error;
  return with_dtype(p.q.dtype, [&](auto type) {
    return launch("backward_rows_sm80", &backward_rows_sm80<decltype(type)>, blocks, kRowThreads, 0, stream,
                  args);
  });
}

int64_t backward_rows(const Params& p, int64_t lse_count) {
  if (p.cu_seqlens_q) return p.heads ? (lse_count / p.heads + p.batch * kRowPad) / kRowPad * kRowPad : 0;
  return ceil_div(p.seqlen_q, kRowPad) * kRowPad;
}

std::string prepare_backward(BackwardArgs& args, const GradParams& p, const int64_t* seed, void* workspace,
                             int64_t lse_count, int64_t total_k, int device) {
  if (const char* reason = saccade_cuda_refuses(&p, 80))
    return std::string("backward_sm80 does not serve ") + reason;
  if (p.needs & ~(kNeedQ | kNeedK | kNeedV | kNeedBias))
    return "backward_sm80 does not serve the gradient of a relative bias";
  args.p = p;
  args.terms = terms_of(p, p.heads ? lse_count / p.heads : 0, total_k);
  args.seed = seed;
  args.rows = static_cast<float*>(workspace);
  args.head_rows = backward_rows(p, lse_count);
  args.row_count = args.head_rows * p.heads * (p.cu_seqlens_q ? 1 : p.batch);
  args.aligned_q = rows_aligned(p.q);
  args.aligned_k = rows_aligned(p.k);
  args.aligned_v = rows_aligned(p.v);
  args.aligned_dout = rows_aligned(p.dout);
  args.aligned_dq = rows_aligned(p.dq);
  args.aligned_dk = rows_aligned(p.dk);
  args.aligned_dv = rows_aligned(p.dv);
  return select_device(device);
}

std::string run_backward_sm80(const BackwardArgs& args, Stream stream) {
  std::string error = launch_backward_rows(args, stream);
  if (error.empty() && args.p.needs & (kNeedK | kNeedV)) error = launch_backward_keys(args, stream);
  if (error.empty() && args.p.needs & kNeedQ) error = launch_backward_queries(args, stream);
  if (error.empty() && args.p.needs & kNeedBias) error = launch_backward_bias(args, stream);
  return error;
}

}  // namespace saccade

extern "C" int64_t saccade_cuda_backward_workspace(const saccade::GradParams* p, int64_t lse_count,
                                                   int deterministic, int device) {
  const int64_t rows = saccade::backward_rows(*p, lse_count) * p->heads * (p->cu_seqlens_q ? 1 : p->batch);
  const int64_t wider = p->head_dim > p->head_dim_v ? p->head_dim : p->head_dim_v;
  const bool sums = !deterministic && p->needs & saccade::kNeedQ && saccade::capability(device) == 90 &&
                    !saccade_cuda_refuses(p, 90);  // those of dQ, in Hopper's fast mode
  return 4 * rows * (3 + (!sums ? 0 : wider <= 64 ? 64 : wider <= 128 ? 128 : 256));
}

extern "C" const char* saccade_cuda_backward_sm80(const saccade::GradParams* p, const int64_t* seed,
                                                  void* workspace, int64_t lse_count, int64_t total_k,
                                                  int device, void* stream) {
  saccade::BackwardArgs args{};
  std::string error = saccade::prepare_backward(args, *p, seed, workspace, lse_count, total_k, device);
  if (error.empty()) error = saccade::run_backward_sm80(args, static_cast<saccade::Stream>(stream));
  return saccade::answer(error);
}
