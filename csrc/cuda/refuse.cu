// What the CUDA kernels do not do.
#include "host.h"

namespace saccade {
namespace {

bool is_16_bit(DType t) { return t == DType::kBFloat16 || t == DType::kFloat16; }

// On any GPU, by whatever body.
const char* refuses_any(const Params& p) {
  if (p.head_dim > 256 || p.head_dim_v > 256) return "head_dim above 256";
  if (p.score != Score::kDot) return "scores other than the dot product";
  if (p.activation != Activation::kSoftmax && p.activation != Activation::kSoftmax1)
    return "activations other than softmax";
  if (p.rel_row) return "a relative bias of each query";
  if (p.mask.num_chunks > 1) return "several masks of chunks";
  if (p.extra_k) return "extra_k and extra_v";
  if (p.bias && p.bias_dtype == DType::kFloat64) return "a float64 bias";
  if (p.seqlen_q >= 1 << 30 || p.seqlen_k >= 1 << 30) return "sequences of 2^30 rows and more";
  return nullptr;
}

bool is_alike(const Params& p) { return p.k.dtype == p.q.dtype && p.v.dtype == p.q.dtype; }
bool is_known(const Params& p) {
  return is_alike(p) && (is_16_bit(p.q.dtype) || p.q.dtype == DType::kFloat32);
}

const char* refuses(const Params& p) {
  if (!is_alike(p) || !is_16_bit(p.q.dtype)) return "tensors other than bf16 or fp16";
  if (p.mask.tile_ptr) return "graphs as tiles";
  if (const char* reason = refuses_any(p)) return reason;
  return p.seqused_k || p.page_table || p.beam ? "decoding from a cache" : nullptr;
}

const char* refuses_sm90(const Params& p) {
  if (p.bias || p.rel_bias) return "a bias";
  if (p.dropout_p > 0) return "dropout";
  if (p.mask.keep || p.mask.q_ids) return "boolean padding and segments";
  if (chunks_leave_gaps(p.mask)) return "chunks beside a band that leaves a query's own position out";
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

extern "C" const char* saccade_cuda_decode_refuses(const saccade::Params* p) {
  if (!saccade::is_known(*p)) return "tensors other than fp32, bf16 or fp16";
  if (p->mask.tile_ptr) return "graphs as tiles";
  if (const char* reason = saccade::refuses_any(*p)) return reason;
  return p->cu_seqlens_q || p->cu_seqlens_k ? "packed sequences" : nullptr;
}

extern "C" const char* saccade_cuda_gather_refuses(const saccade::GatherParams* p) {
  if (!saccade::is_known(*p)) return "tensors other than fp32, bf16 or fp16";
  if (p->edge_dim || p->joint_dim) return "edge features";
  if (p->bias || p->rel_bias) return "a bias beside a graph";
  return saccade::refuses_any(*p);
}
