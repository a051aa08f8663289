// Between torch's stable ABI and the kernels: boxed arguments in, Params out, outputs made. What every
// device's entries share.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <utility>
#include <vector>

#include "large_blocks.h"
#include "params.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace saccade {

// ---- reading the boxed arguments ----

class Stack {
 public:
  explicit Stack(StableIValue* values) : at_(values) {}
  template <typename T>
  T next() {
    return torch::stable::detail::to<T>(*at_++);
  }

 private:
  StableIValue* at_;
};

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "saccade: float64, float32, bfloat16 or float16 expected");
  }
}

inline ScalarType accumulator(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
const T* pointer(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// [B, H, S, D], or [total, H, D] of packed sequences.
inline Rows rows_of(const Tensor& t) {
  const bool packed = t.dim() == 3;
  const int64_t row = packed ? 0 : 2;
  return {const_cast<void*>(t.const_data_ptr()),
          dtype_of(t),
          packed ? 0 : t.stride(0),
          t.stride(1),
          t.stride(row),
          t.stride(row + (packed ? 2 : 1))};
}

// Everything a call consists of; keeps its tensors alive.
struct Call {
  Tensor q, k;
  OptionalTensor v, bias, rel_bias, weight, sink, extra_k, extra_v, seed;
  OptionalTensor head_bounds, lengths, keep, q_ids, k_ids, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table,
      beam, tile_ptr, tile_col, tile_bits;
  std::vector<int64_t> band, chunks;
  int64_t max_seqlen_q = 0, max_seqlen_k = 0, body = 0;

  void read_mask(Stack& s) {
    head_bounds = s.next<OptionalTensor>();
    lengths = s.next<OptionalTensor>();
    keep = s.next<OptionalTensor>();
    q_ids = s.next<OptionalTensor>();
    k_ids = s.next<OptionalTensor>();
    cu_seqlens_q = s.next<OptionalTensor>();
    cu_seqlens_k = s.next<OptionalTensor>();
    seqused_k = s.next<OptionalTensor>();
    page_table = s.next<OptionalTensor>();
    beam = s.next<OptionalTensor>();
    tile_ptr = s.next<OptionalTensor>();
    tile_col = s.next<OptionalTensor>();
    tile_bits = s.next<OptionalTensor>();
    band = s.next<std::vector<int64_t>>();
    chunks = s.next<std::optional<std::vector<int64_t>>>().value_or(std::vector<int64_t>());
    max_seqlen_q = s.next<int64_t>();
    max_seqlen_k = s.next<int64_t>();
  }

  void fill_mask(Params& p) const {
    for (int i = 0; i < 4; ++i) p.mask.band[i] = band[size_t(i)];
    p.mask.head_bounds = pointer<int64_t>(head_bounds);
    p.mask.chunks = chunks.data();
    p.mask.num_chunks = int64_t(chunks.size() / 2);
    p.mask.lengths = pointer<int64_t>(lengths);
    p.mask.keep = pointer<bool>(keep);
    p.mask.keep_batch = keep ? keep->stride(0) : 0;
    p.mask.q_ids = pointer<int32_t>(q_ids);
    p.mask.k_ids = pointer<int32_t>(k_ids);
    p.mask.q_ids_batch = q_ids ? q_ids->stride(0) : 0;
    p.mask.k_ids_batch = k_ids ? k_ids->stride(0) : 0;
    p.mask.tile_ptr = pointer<int64_t>(tile_ptr);
    p.mask.tile_col = pointer<int32_t>(tile_col);
    p.mask.tile_bits = pointer<uint64_t>(tile_bits);
    p.cu_seqlens_q = pointer<int64_t>(cu_seqlens_q);
    p.cu_seqlens_k = pointer<int64_t>(cu_seqlens_k);
    p.seqused_k = pointer<int64_t>(seqused_k);
    p.page_table = pointer<int32_t>(page_table);
    p.page_table_batch = page_table ? page_table->stride(0) : 0;
    p.beam = pointer<int32_t>(beam);
    p.beam_batch = beam ? beam->stride(0) : 0;
  }

  // q, k, (v,) terms, mask, options, in the order of the schemas.
  void read(Stack& s, bool with_values, Params& p) {
    q = s.next<Tensor>();
    k = s.next<Tensor>();
    if (with_values) v = s.next<Tensor>();
    bias = s.next<OptionalTensor>();
    rel_bias = s.next<OptionalTensor>();
    weight = s.next<OptionalTensor>();
    if (with_values) sink = s.next<OptionalTensor>();
    extra_k = s.next<OptionalTensor>();
    if (with_values) extra_v = s.next<OptionalTensor>();
    seed = s.next<OptionalTensor>();
    read_mask(s);
    p.score = Score(s.next<int64_t>());
    p.activation = Activation(s.next<int64_t>());
    p.scale = s.next<double>();
    p.softcap = s.next<double>();
    p.slope = s.next<double>();
    p.dropout_p = s.next<double>();
  }

  void fill(Params& p) const {
    const bool packed = cu_seqlens_q.has_value();
    p.q = rows_of(q);
    p.k = rows_of(k);
    p.heads = q.size(1);
    p.heads_k = k.size(1);
    p.head_dim = q.size(q.dim() - 1);
    p.batch = packed ? cu_seqlens_q->size(0) - 1 : q.size(0);
    p.seqlen_q = packed ? max_seqlen_q : q.size(2);
    p.seqlen_k = packed || max_seqlen_k ? max_seqlen_k : k.size(2);
    if (v) {
      p.v = rows_of(*v);
      p.head_dim_v = v->size(v->dim() - 1);
    }
    if (page_table) p.page_size = k.size(2);
    if (bias) {
      p.bias = bias->const_data_ptr();
      p.bias_dtype = dtype_of(*bias);
      for (int i = 0; i < 4; ++i) p.bias_stride[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
    }
    if (rel_bias) {
      p.rel_bias = rel_bias->const_data_ptr();
      const int64_t dims = rel_bias->dim();
      p.rel_size = rel_bias->size(dims - 1);
      p.rel_center = p.seqlen_k - 1;
      if (dims > 2) {
        p.rel_center = p.rel_size / 2;
        p.rel_row = p.rel_size;
        p.rel_head = rel_bias->size(dims - 2) * p.rel_row;
        p.rel_batch = dims == 4 ? p.heads * p.rel_head : 0;
      }
    }
    p.weight = pointer<void>(weight);
    p.sink = pointer<void>(sink);
    p.extra_k = pointer<void>(extra_k);
    p.extra_v = pointer<void>(extra_v);
    if (seed && !seed->is_cuda())  // a GPU's kernels read it there
      p.seed = uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr()));
    fill_mask(p);
  }

  void set_lse(Params& p, const Tensor& lse) const {
    p.lse = static_cast<double*>(const_cast<void*>(lse.const_data_ptr()));
    p.lse_batch = lse.dim() == 3 ? lse.stride(0) : 0;
    p.lse_head = lse.dim() >= 2 ? lse.stride(lse.dim() - 2) : 0;
  }
};

// ---- outputs ----

// How many elements lie between the first of a tensor and its end.
inline size_t extent(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return size_t(last + 1);
}

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            ScalarType type, const Tensor& like) {
  AtenTensorHandle handle;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const bool on_cpu = device_type == aoti_torch_device_type_cpu();
  const size_t bytes = aoti_torch_dtype_element_size(dtype) * extent(sizes, strides);
  if (size_t size = bytes; on_cpu && LargeBlocks::all().serves(bytes))
    if (void* const memory = LargeBlocks::all().take(size)) {
      const auto free = [](void* at, void* all) {
        LargeBlocks::all().give_back(at, reinterpret_cast<size_t>(all));
      };
      TORCH_ERROR_CODE_CHECK(torch_from_blob(memory, int64_t(sizes.size()), sizes.data(), strides.data(), 0,
                                             dtype, device_type, like.get_device_index(), &handle,
                                             aoti_torch_layout_strided(), nullptr, 0, free,
                                             reinterpret_cast<void*>(size)));
      return Tensor(handle);
    }
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  device_type, like.get_device_index(), &handle));
  const Tensor made(handle);
  if (on_cpu && bytes > 0) prefer_large_pages(made.mutable_data_ptr(), bytes);
  return made;
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty_strided(sizes, strides, type, like);
}

// Dense, with the dimensions in memory from outermost to innermost as `order` lists them.
inline Tensor empty_ordered(const std::vector<int64_t>& sizes, const std::vector<int64_t>& order,
                            ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[size_t(order[i])] = step;
    step *= sizes[size_t(order[i])] > 1 ? sizes[size_t(order[i])] : 1;
  }
  return empty_strided(sizes, strides, type, like);
}

// A dense tensor of t's sizes whose dimensions lie in memory in the order of t's strides.
inline Tensor empty_as(const Tensor& t) {
  std::vector<int64_t> sizes, order;
  for (int64_t i = 0; i < t.dim(); ++i) {
    sizes.push_back(t.size(i));
    size_t at = order.size();
    while (at > 0 && t.stride(order[at - 1]) < t.stride(i)) --at;
    order.insert(order.begin() + int64_t(at), i);
  }
  return empty_ordered(sizes, order, t.scalar_type(), t);
}

inline void give(StableIValue* stack, int at, const Tensor& t) { stack[at] = torch::stable::detail::from(t); }

}  // namespace saccade
