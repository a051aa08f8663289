#include "forward_sm80.h"
#include "host.h"

namespace saccade {
namespace {

template <typename T, int kHeadDim>
std::string launch_forward(TiledArgs& args, int64_t blocks, Stream stream) {
  using Shape = ForwardShape80<kHeadDim>;
  const bool general = is_general(args.terms);
  return launch("forward_sm80",
                general ? &forward_sm80<T, kHeadDim, true> : &forward_sm80<T, kHeadDim, false>, blocks,
                Shape::kThreads, Shape::kSharedBytes, stream, args);
}

std::string forward(const Params& p, const int64_t* seed, int64_t total_q, int64_t total_k, int device,
                    Stream stream) {
  if (const char* reason = saccade_cuda_refuses(&p, 80))
    return std::string("forward_sm80 does not serve ") + reason;
  if (p.batch == 0 || p.heads == 0 || p.seqlen_q == 0) return "";
  if (std::string error = select_device(device); !error.empty()) return error;
  TiledArgs args{p,
                 terms_of(p, total_q, total_k),
                 seed,
                 0,
                 rows_aligned(p.q),
                 rows_aligned(p.k),
                 rows_aligned(p.v),
                 rows_aligned(p.out)};
  return with_head_dim<32, 64, 128, 256>(
      p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v, [&](auto size) {
        constexpr int kHeadDim = decltype(size)::value;
        args.blocks = int(ceil_div(p.seqlen_q, ForwardShape80<kHeadDim>::kBlockM));
        const int64_t blocks = args.blocks * p.batch * p.heads;
        if (std::string error = check_blocks("forward_sm80", blocks); !error.empty()) return error;
        return with_dtype(p.q.dtype, [&](auto type) {
          return launch_forward<decltype(type), kHeadDim>(args, blocks, stream);
        });
      });
}

}  // namespace
}  // namespace saccade

extern "C" const char* saccade_cuda_forward_sm80(const saccade::Params* p, const int64_t* seed,
                                                 int64_t total_q, int64_t total_k, int device, void* stream) {
  return saccade::answer(
      saccade::forward(*p, seed, total_q, total_k, device, static_cast<saccade::Stream>(stream)));
}
