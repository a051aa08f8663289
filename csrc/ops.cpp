// The operators, on torch's stable ABI: tensors become Params here and nowhere else. Schemas are fixed in this file; fakes, autograd and
// every check of user input stand in Python (ops.py, autograd.py, problem.py), because C++ errors cross the stable ABI as RuntimeError only.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "mask.h"
#include "params.h"
#include "philox.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace saccade {
namespace {

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

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "saccade: float64, float32, bfloat16 or float16 expected");
  }
}

ScalarType accumulator(const Tensor& t) { return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

template <typename T>
const T* pointer(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// [B, H, S, D], or [total, H, D] of packed sequences.
Rows rows_of(const Tensor& t) {
  const bool packed = t.dim() == 3;
  const int64_t row = packed ? 0 : 2;
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(t), packed ? 0 : t.stride(0), t.stride(1), t.stride(row), t.stride(row + (packed ? 2 : 1))};
}

// Everything a call consists of; keeps its tensors alive.
struct Call {
  Tensor q, k;
  OptionalTensor v, bias, rel_bias, weight, sink, extra_k, extra_v, seed;
  OptionalTensor head_bounds, lengths, keep, q_ids, k_ids, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table, beam, tile_ptr, tile_col, tile_bits;
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
    chunks = s.next<std::vector<int64_t>>();
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
      p.rel_size = rel_bias->size(1);
      p.rel_center = p.seqlen_k - 1;
    }
    p.weight = pointer<void>(weight);
    p.sink = pointer<void>(sink);
    p.extra_k = pointer<void>(extra_k);
    p.extra_v = pointer<void>(extra_v);
    if (seed) p.seed = uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr()));
    fill_mask(p);
  }

  void set_lse(Params& p, const Tensor& lse) const {
    p.lse = const_cast<void*>(lse.const_data_ptr());
    p.lse_batch = lse.dim() == 3 ? lse.stride(0) : 0;
    p.lse_head = lse.dim() >= 2 ? lse.stride(lse.dim() - 2) : 0;
  }
};

// ---- running a plan ----

// Memory that outlives the call: fresh pages cost more to touch than to use. One block per calling or working thread.
class Reused {
 public:
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_.reset(static_cast<char*>(std::aligned_alloc(4096, size_)));
      STD_TORCH_CHECK(memory_, "saccade: out of memory: ", bytes, " bytes of workspace");
    }
    return memory_.get();
  }
  void trim(size_t limit) {
    if (size_ > limit) {
      memory_.reset();
      size_ = 0;
    }
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

constexpr size_t kKeptBytes = size_t(64) << 20;

template <typename P>
void run(const Plan<P>& plan, const P& p) {
  thread_local Reused shared;
  char* workspace = plan.workspace_bytes ? shared.at_least(plan.workspace_bytes) : nullptr;
  for (int i = 0; i < plan.phases; ++i) {
    const Phase<P>& phase = plan.phase[i];
    if (phase.items == 0) continue;
    std::atomic<int64_t> next{0};
    const auto worker = [&](int64_t, int64_t) {
      thread_local Reused own;
      char* scratch = own.at_least(plan.scratch_bytes);
      for (int64_t item = next++; item < phase.items; item = next++) phase.run(p, item, scratch, workspace);
      own.trim(kKeptBytes);
    };
    const int64_t threads = phase.items > 1 ? int64_t(torch::stable::get_num_threads()) : 1;
    if (threads > 1)
      torch::stable::parallel_for(0, threads < phase.items ? threads : phase.items, 1, worker);
    else
      worker(0, 1);
  }
  shared.trim(kKeptBytes);
}

// ---- outputs ----

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type, const Tensor& like) {
  AtenTensorHandle handle;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty_strided(sizes, strides, type, like);
}

// Dense, with the dimensions in memory from outermost to innermost as `order` lists them.
Tensor empty_ordered(const std::vector<int64_t>& sizes, const std::vector<int64_t>& order, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[size_t(order[i])] = step;
    step *= sizes[size_t(order[i])] > 1 ? sizes[size_t(order[i])] : 1;
  }
  return empty_strided(sizes, strides, type, like);
}

// A dense tensor of t's sizes whose dimensions lie in memory in the order of t's strides.
Tensor empty_as(const Tensor& t) {
  std::vector<int64_t> sizes, order;
  for (int64_t i = 0; i < t.dim(); ++i) {
    sizes.push_back(t.size(i));
    size_t at = order.size();
    while (at > 0 && t.stride(order[at - 1]) < t.stride(i)) --at;
    order.insert(order.begin() + int64_t(at), i);
  }
  return empty_ordered(sizes, order, t.scalar_type(), t);
}

void give(StableIValue* stack, int at, const Tensor& t) { stack[at] = torch::stable::detail::from(t); }

// ---- the operators ----

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  Params p;
  Call call;
  call.read(s, true, p);
  const int64_t body = s.next<int64_t>();
  const std::vector<int64_t> order = s.next<std::vector<int64_t>>();
  call.fill(p);
  std::vector<int64_t> sizes, lse_sizes;
  for (int64_t i = 0; i < call.q.dim(); ++i) sizes.push_back(call.q.size(i));
  sizes.back() = p.head_dim_v;
  if (call.q.dim() == 3)
    lse_sizes = {sizes[1], sizes[0]};
  else
    lse_sizes = {sizes[0], sizes[1], sizes[2]};
  if (p.activation == Activation::kReLU || p.activation == Activation::kSigmoid) lse_sizes = {0};
  const Tensor out = empty_ordered(sizes, order, call.q.scalar_type(), call.q);
  const Tensor lse = empty(lse_sizes, accumulator(call.q), call.q);
  p.out = rows_of(out);
  call.set_lse(p, lse);
  const KernelTable kernels = kernels_for(p.q.dtype, p.score);
  run(body == 1 ? kernels.decode(p) : kernels.forward(p), p);
  give(stack, 0, out);
  give(stack, 1, lse);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  GradParams p;
  Call call;
  const Tensor dout = s.next<Tensor>();
  const OptionalTensor dlse = s.next<OptionalTensor>();
  const Tensor out = s.next<Tensor>(), lse = s.next<Tensor>();
  call.read(s, true, p);
  s.next<int64_t>();  // the body that ran forward; the tiled one serves every backward pass
  p.needs = s.next<int64_t>();
  call.fill(p);
  p.dout = rows_of(dout);
  p.out = rows_of(out);
  call.set_lse(p, lse);
  OptionalTensor dense_dlse;
  if (dlse) {
    dense_dlse = torch::stable::contiguous(*dlse);
    p.dlse = dense_dlse->const_data_ptr();
  }
  const ScalarType acc = accumulator(call.q);
  const Tensor none = empty({0}, acc, call.q);
  Tensor dq = none, dk = none, dv = none, dbias = none, drel = none, dweight = none, dextra_k = none, dextra_v = none;
  if (p.needs & kNeedQ) {
    dq = empty_as(call.q);
    p.dq = rows_of(dq);
  }
  if (p.needs & kNeedK) {
    dk = empty_as(call.k);
    p.dk = rows_of(dk);
  }
  if (p.needs & kNeedV) {
    dv = empty_as(*call.v);
    p.dv = rows_of(dv);
  }
  if (p.needs & kNeedBias) {
    std::vector<int64_t> sizes;
    for (int i = 0; i < 4; ++i) sizes.push_back(p.dbias_size[i] = p.bias_stride[i] ? call.bias->size(i) : 1);
    dbias = empty(sizes, acc, call.q);
    p.dbias = dbias.mutable_data_ptr();
  }
  const auto sized = [&](int64_t need, Tensor& grad, int64_t columns) -> void* {
    if (!(p.needs & need)) return nullptr;
    grad = empty({p.heads, columns}, acc, call.q);
    return grad.mutable_data_ptr();
  };
  p.drel_bias = sized(kNeedRelBias, drel, p.rel_size);
  p.dweight = sized(kNeedWeight, dweight, p.head_dim);
  p.dextra_k = sized(kNeedExtraK, dextra_k, p.head_dim);
  p.dextra_v = sized(kNeedExtraV, dextra_v, p.head_dim_v);
  run(kernels_for(p.q.dtype, p.score).backward(p), p);
  int at = 0;
  for (const Tensor& t : {dq, dk, dv, dbias, drel, dweight, dextra_k, dextra_v}) give(stack, at++, t);
}

void weights(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  WeightParams p;
  Call call;
  const Tensor lse = s.next<Tensor>();
  call.read(s, false, p);
  p.average = s.next<bool>();
  call.fill(p);
  call.set_lse(p, lse);
  p.columns = p.seqlen_k + (p.extra_k ? 1 : 0) + (p.activation == Activation::kSoftmax1 ? 1 : 0);
  const int64_t B = p.batch, H = p.heads, S = p.seqlen_q, C = p.columns;
  const Tensor out = p.average ? empty({B, S, C}, call.q.scalar_type(), call.q) : empty({B, H, S, C}, call.q.scalar_type(), call.q);
  p.weights = {out.mutable_data_ptr(), dtype_of(out), p.average ? S * C : H * S * C, p.average ? 0 : S * C, C, 1};
  run(kernels_for(p.q.dtype, p.score).weights(p), p);
  give(stack, 0, out);
}

// The C++ transcriptions of the mask and of dropout, laid out densely: tests compare them with Mask.keep and saccade.dropout_mask.
void keep(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  Params p;
  Call call;
  call.read_mask(s);
  p.batch = s.next<int64_t>();
  p.heads = s.next<int64_t>();
  p.seqlen_q = s.next<int64_t>();
  p.seqlen_k = s.next<int64_t>();
  const Tensor like = s.next<Tensor>();
  call.fill_mask(p);
  const Tensor out = empty({p.batch, p.heads, p.seqlen_q, p.seqlen_k}, ScalarType::Bool, like);
  bool* at = static_cast<bool*>(out.mutable_data_ptr());
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t i = 0; i < p.seqlen_q; ++i) {
        const Interval row = row_interval(p.mask, b, h, i, p.seqlen_q, p.seqlen_k);
        for (int64_t j = 0; j < p.seqlen_k; ++j) {
          bool kept = row.begin <= j && j < row.end && keeps_pair(p.mask, b, i, j);
          if (p.mask.tile_ptr) {
            bool edge = false;
            for (int64_t t = p.mask.tile_ptr[i / kGraphTile]; t < p.mask.tile_ptr[i / kGraphTile + 1]; ++t)
              edge |= p.mask.tile_col[t] == j / kGraphTile && (p.mask.tile_bits[t * kGraphTile + i % kGraphTile] >> (j % kGraphTile) & 1);
            kept &= edge;
          }
          *at++ = kept;
        }
      }
  give(stack, 0, out);
}

void dropout_mask(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  const Tensor seed = s.next<Tensor>();
  const uint32_t threshold = dropout_threshold(s.next<double>());
  int64_t size[4];
  for (int64_t& n : size) n = s.next<int64_t>();
  const uint64_t key = uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const Tensor out = empty({size[0], size[1], size[2], size[3]}, ScalarType::Bool, seed);
  bool* at = static_cast<bool*>(out.mutable_data_ptr());
  for (int64_t b = 0; b < size[0]; ++b)
    for (int64_t h = 0; h < size[1]; ++h)
      for (int64_t i = 0; i < size[2]; ++i)
        for (int64_t j = 0; j < size[3]; ++j) *at++ = dropout_keeps(key, threshold, b, h, i, j);
  give(stack, 0, out);
}

// "" asks, a name forces that instruction set, "best" undoes it; returns the one in use, then every supported one, best first.
void cpu_isa(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  const std::string name = s.next<std::string>();
  STD_TORCH_CHECK(name.empty() || force_isa(name == "best" ? "" : name.c_str()), "saccade: no instruction set '", name, "' here");
  std::string answer = current_isa();
  for (int i = 0; supported_isa(i); ++i) answer += std::string(" ") + supported_isa(i);
  stack[0] = torch::stable::detail::from(answer);
}

#define SACCADE_MASK_ARGS                                                                                                            \
  "Tensor? head_bounds, Tensor? lengths, Tensor? keep, Tensor? q_ids, Tensor? k_ids, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "    \
  "Tensor? seqused_k, Tensor? page_table, Tensor? beam, Tensor? tile_ptr, Tensor? tile_col, Tensor? tile_bits, int[] band, "          \
  "int[] chunks, int max_seqlen_q, int max_seqlen_k"
#define SACCADE_CALL_ARGS                                                                                                            \
  "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? rel_bias, Tensor? weight, Tensor? sink, Tensor? extra_k, Tensor? extra_v, "    \
  "Tensor? seed, " SACCADE_MASK_ARGS ", int score, int activation, float scale, float softcap, float slope, float dropout_p, int body"

STABLE_TORCH_LIBRARY(saccade, m) {
  m.def("forward(" SACCADE_CALL_ARGS ", int[] out_order) -> (Tensor, Tensor)");
  m.def("backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " SACCADE_CALL_ARGS
        ", int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "weights(Tensor lse, Tensor q, Tensor k, Tensor? bias, Tensor? rel_bias, Tensor? weight, Tensor? extra_k, Tensor? seed, " SACCADE_MASK_ARGS
      ", int score, int activation, float scale, float softcap, float slope, float dropout_p, bool average) -> Tensor");
  m.def("keep(" SACCADE_MASK_ARGS ", int batch, int heads, int seqlen_q, int seqlen_k, Tensor like) -> Tensor");
  m.def("dropout_mask(Tensor seed, float p, int batch, int heads, int seqlen_q, int seqlen_k) -> Tensor");
  m.def("cpu_isa(str name) -> str");
}
STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("forward", &forward);
  m.impl("backward", &backward);
  m.impl("weights", &weights);
  m.impl("keep", &keep);
  m.impl("dropout_mask", &dropout_mask);
}
STABLE_TORCH_LIBRARY_IMPL(saccade, CompositeExplicitAutograd, m) { m.impl("cpu_isa", &cpu_isa); }

}  // namespace
}  // namespace saccade
