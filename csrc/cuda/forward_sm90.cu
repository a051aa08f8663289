#include "forward_sm90.h"
#include "host.h"

namespace saccade {
namespace {

// Whether some blocks of queries meet more keys than others.
bool items_differ(const Params& p) {
  bool bounded = p.cu_seqlens_q || p.mask.lengths || p.mask.head_bounds || p.mask.num_chunks;
  for (const int64_t bound : p.mask.band) bounded |= bound < most_of(p.seqlen_q, p.seqlen_k);
  return bounded;
}

template <typename T, typename Shape>
std::string launch_forward(Forward90Args& args, int64_t total_q, int64_t total_k, int device, Stream stream) {
  const Params& p = args.tiled.p;
  const bool packed = p.cu_seqlens_q;
  const int64_t batch = packed ? 1 : p.batch, rows_q = packed ? total_q : p.seqlen_q,
                rows_k = packed ? total_k : p.seqlen_k;
  std::string error = encode_rows<T>(args.q, p.q, p.head_dim, rows_q, p.heads, batch, Shape::kBlockM);
  args.store_by_tma = !packed && args.tiled.aligned_out;
  if (error.empty() && rows_k)
    error = encode_rows<T>(args.k, p.k, p.head_dim, rows_k, p.heads_k, batch, Shape::kBlockN);
  if (error.empty() && rows_k)
    error = encode_rows<T>(args.v, p.v, p.head_dim_v, rows_k, p.heads_k, batch, Shape::kBlockN);
  if (error.empty() && args.store_by_tma)
    error = encode_rows<T>(args.out, p.out, p.head_dim_v, rows_q, p.heads, batch, 64);
  if (!error.empty()) return "forward_sm90: " + error;
  args.tiled.blocks = int(ceil_div(p.seqlen_q, Shape::kBlockM));
  const int64_t items = args.tiled.blocks * p.batch * p.heads;
  error = check_blocks("forward_sm90", 2 * items);  // counted in 32 bits, also those beyond the last
  if (!error.empty()) return error;
  args.items = int(items);
  constexpr int64_t kCacheBytes = 32 << 20;  // of the L2 cache, for the keys and values of a section
  const int64_t head_bytes = p.seqlen_k * (p.head_dim + p.head_dim_v) * 2 / (p.heads / p.heads_k) + 1;
  args.section = int(most_of(1, least_of(kCacheBytes / head_bytes, p.batch * p.heads)));
  const int64_t blocks = least_of(items, multiprocessors(device));
  if (items == blocks || !items_differ(p)) args.counter = nullptr;  // turns do, and need no zero first
  if (args.counter) error = fill_zero(args.counter, sizeof(int), stream);
  if (!error.empty()) return error;
  return launch("forward_sm90", &forward_sm90<T, Shape>, blocks, Shape::kThreads, Shape::kSharedBytes, stream,
                args);
}

std::string forward(const Params& p, const int64_t* seed, int64_t total_q, int64_t total_k, void* counter,
                    int device, Stream stream) {
  if (const char* reason = saccade_cuda_refuses(&p, 90))
    return std::string("forward_sm90 does not serve ") + reason;
  if (p.batch == 0 || p.heads == 0 || p.seqlen_q == 0 || (p.cu_seqlens_q && total_q == 0)) return "";
  if (std::string error = select_device(device); !error.empty()) return error;
  Forward90Args args{};
  args.counter = static_cast<int*>(counter);
  args.tiled = {p, terms_of(p, total_q, total_k), seed, 0, true, true, true, rows_aligned(p.out)};
  if (p.cu_seqlens_k && total_k == 0) args.tiled.p.seqlen_k = 0;  // whatever max_seqlen_k promises
  return with_head_dim<64, 128, 256>(p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v, [&](auto size) {
    using Shape = ForwardShape90<decltype(size)::value>;
    return with_dtype(p.q.dtype, [&](auto type) {
      return launch_forward<decltype(type), Shape>(args, total_q, total_k, device, stream);
    });
  });
}

}  // namespace
}  // namespace saccade

extern "C" const char* saccade_cuda_forward_sm90_counted(const saccade::Params* p, const int64_t* seed,
                                                         int64_t total_q, int64_t total_k, void* counter,
                                                         int device, void* stream) {
  return saccade::answer(
      saccade::forward(*p, seed, total_q, total_k, counter, device, static_cast<saccade::Stream>(stream)));
}
extern "C" const char* saccade_cuda_forward_sm90(const saccade::Params* p, const int64_t* seed,
                                                 int64_t total_q, int64_t total_k, int device, void* stream) {
  return saccade_cuda_forward_sm90_counted(p, seed, total_q, total_k, nullptr, device, stream);
}
