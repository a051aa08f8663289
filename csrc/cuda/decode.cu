#include "decode.h"
#include "host.h"

namespace saccade {
namespace {

// A split is worth a block from so many keys on; so many blocks fill a large GPU. Both are constants, so that
// results do not depend on the GPU.
constexpr int64_t kSplitKeys = 256, kBlocks = 264;

struct DecodeGrid {
  int64_t row_tiles, tiles, splits, head_dim;
  explicit DecodeGrid(const Params& p) {
    row_tiles = ceil_div(p.seqlen_q * (p.heads_k ? p.heads / p.heads_k : 0), kDecodeRows);
    tiles = p.batch * p.heads_k * row_tiles;
    splits = tiles ? most_of(1, least_of(ceil_div(kBlocks, tiles), ceil_div(p.seqlen_k, kSplitKeys))) : 1;
    const int64_t wider = most_of(p.head_dim, p.head_dim_v);
    head_dim = wider <= 64 ? 64 : wider <= 128 ? 128 : 256;
  }
  int64_t sums() const { return splits > 1 ? tiles * splits * kDecodeRows * head_dim : 0; }
  int64_t peaks() const { return splits > 1 ? tiles * splits * kDecodeRows * 2 : 0; }
};

template <typename T, int kHeadDim>
std::string launch_decode(DecodeArgs args, int64_t tiles, Stream stream) {
  using Shape = DecodeShape<T, kHeadDim>;
  const Params& p = args.p;
  args.aligned_q = vectors_aligned<T>(p.q);
  args.aligned_k = vectors_aligned<T>(p.k);
  args.aligned_v = vectors_aligned<T>(p.v);
  args.aligned_out = vectors_aligned<T>(p.out);
  const bool general = is_general(args.terms) || p.mask.head_bounds;
  std::string error = launch("decode", general ? &decode<T, kHeadDim, true> : &decode<T, kHeadDim, false>,
                             tiles * args.splits, Shape::kThreads, Shape::kSharedBytes, stream, args);
  if (!error.empty() || args.splits == 1) return error;
  return launch("decode_merge", &decode_merge<T, kHeadDim>, ceil_div(tiles * kDecodeRows, kMergeThreads / 32),
                kMergeThreads, 0, stream, args);
}

std::string run_decode(const Params& p, const int64_t* seed, void* workspace, int device, Stream stream) {
  if (const char* reason = saccade_cuda_decode_refuses(&p))
    return std::string("decode does not serve ") + reason;
  const DecodeGrid grid(p);
  if (grid.tiles == 0) return "";
  if (std::string error = select_device(device); !error.empty()) return error;
  if (std::string error = check_blocks("decode", grid.tiles * most_of(grid.splits, kDecodeRows));
      !error.empty())
    return error;
  DecodeArgs args{};
  args.p = p;
  args.terms = terms_of(p);
  args.seed = seed;
  args.group = int(p.heads / p.heads_k);
  args.row_tiles = int(grid.row_tiles);
  args.splits = int(grid.splits);
  args.sums = static_cast<float*>(workspace);
  args.peaks = args.sums + grid.sums();
  return with_head_dim<64, 128, 256>(grid.head_dim, [&](auto size) {
    const auto run = [&](auto type) {
      return launch_decode<decltype(type), decltype(size)::value>(args, grid.tiles, stream);
    };
    return p.q.dtype == DType::kFloat32 ? run(float()) : with_dtype(p.q.dtype, run);
  });
}

}  // namespace
}  // namespace saccade

extern "C" int64_t saccade_cuda_decode_workspace(const saccade::Params* p) {
  const saccade::DecodeGrid grid(*p);
  return 4 * (grid.sums() + grid.peaks());
}

extern "C" const char* saccade_cuda_decode(const saccade::Params* p, const int64_t* seed, void* workspace,
                                           int device, void* stream) {
  return saccade::answer(
      saccade::run_decode(*p, seed, workspace, device, static_cast<saccade::Stream>(stream)));
}
