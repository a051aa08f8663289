// What the CUDA kernels do not do.
#include "host.h"

namespace saccade {
namespace {

bool is_16_bit(DType t) { return t == DType::kBFloat16 || t == DType::kFloat16; }

const char* refuses(const Params& p) {
  if (!is_16_bit(p.q.dtype) || p.k.dtype != p.q.dtype || p.v.dtype != p.q.dtype)
    return "tensors other than bf16 or fp16";
  if (p.head_dim > 256 || p.head_dim_v > 256) return "head_dim above 256";
  if (p.score != Score::kDot) return "scores other than the dot product";
  if (p.activation != Activation::kSoftmax && p.activation != Activation::kSoftmax1)
    return "activations other than softmax";
  if (p.mask.num_chunks) return "masks of chunks";
  if (p.mask.tile_ptr) return "graphs";
  if (p.extra_k) return "extra_k and extra_v";
  if (p.seqused_k || p.page_table || p.beam) return "decoding from a cache";
  if (p.bias && p.bias_dtype == DType::kFloat64) return "a float64 bias";
  if (p.seqlen_q >= 1 << 30 || p.seqlen_k >= 1 << 30) return "sequences of 2^30 rows and more";
  return nullptr;
}

const char* refuses_sm90(const Params& p) {
  if (p.bias || p.rel_bias) return "a bias";
  if (p.dropout_p > 0) return "dropout";
  if (p.mask.keep || p.mask.q_ids) return "boolean padding and segments";
  if (p.scale <= 0) return "a scale that is not positive";
  const int64_t batch = p.cu_seqlens_q ? 1 : p.batch;
  if (!tma_reads(p.q, p.seqlen_q, p.heads, batch) || !tma_reads(p.k, p.seqlen_k, p.heads_k, batch) ||
      !tma_reads(p.v, p.seqlen_k, p.heads_k, batch))
    return "tensors that are expanded or whose rows are not aligned to 16 bytes";
  return nullptr;
}

}  // namespace
}  // namespace saccade

extern "C" const char* saccade_cuda_refuses(const saccade::Params* p, int sm) {
  const char* reason = saccade::refuses(*p);
  return reason || sm != 90 ? reason : saccade::refuses_sm90(*p);
}
