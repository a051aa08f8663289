// The operators, on torch's stable ABI. Schemas are fixed in this file; fakes, autograd and every check of
// user input stand in Python (ops.py, autograd.py, problem.py), because C++ errors cross the stable ABI as
// RuntimeError only. The CUDA entries stand in cuda_ops.cpp.
#include "attention_call.h"
#include "cpu/dispatch.h"
#include "cpu_run.h"
#include "graph_call.h"
#include "mask.h"
#include "philox.h"

namespace saccade {
namespace {

// ---- the operators ----

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  Params p;
  Call call;
  call.read(s, true, p);
  const int64_t body = s.next<int64_t>();
  const std::vector<int64_t> order = s.next<std::vector<int64_t>>();
  call.fill(p);
  const auto [out, lse] = forward_outputs(call, order, p);
  const KernelTable kernels = kernels_for(p.q.dtype, p.score);
  // What decode reads and holds; the tiled body takes anything.
  const bool decodes = body == 1 && p.k.col == 1 && p.v.col == 1 && p.seqlen_q <= kDecodeQueries;
  run(decodes ? kernels.decode(p) : kernels.forward(p), p);
  give(stack, 0, out);
  give(stack, 1, lse);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  BackwardCall call;
  call.read_backward(stack);
  call.make_gradients();
  // The decode body's few queries leave matrix tiles empty: the fp32 kernels turn their lanes along head_dim
  // instead, and form its logits again. The tiled body serves every backward pass, and repeats bitwise
  // whether asked to or not.
  const GradParams& p = call.p;
  const DType arithmetic = call.body == 1 && p.q.dtype == DType::kBFloat16 ? DType::kFloat32 : p.q.dtype;
  run(kernels_for(arithmetic, p.score).backward(p), p);
  call.give_gradients(stack);
}

constexpr int64_t kFewItems = 16;

// The tensor of weights [B, H, Sq, columns], or [B, Sq, columns], allocated.
Tensor weights_output(const Call& call, WeightParams& p) {
  p.columns = p.seqlen_k + (p.extra_k ? 1 : 0) + (p.activation == Activation::kSoftmax1 ? 1 : 0);
  const int64_t B = p.batch, H = p.heads, S = p.seqlen_q, C = p.columns;
  const Tensor out = p.average ? empty({B, S, C}, call.q.scalar_type(), call.q)
                               : empty({B, H, S, C}, call.q.scalar_type(), call.q);
  p.weights = {
      out.mutable_data_ptr(), dtype_of(out), p.average ? S * C : H * S * C, p.average ? 0 : S * C, C, 1};
  return out;
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
  const Tensor out = weights_output(call, p);
  run(kernels_for(p.q.dtype, p.score).weights(p), p);
  give(stack, 0, out);
}

void forward_weights(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  WeightParams p;
  Call call;
  call.read(s, true, p);
  s.next<int64_t>();  // body: weights are the tiled body's
  const std::vector<int64_t> order = s.next<std::vector<int64_t>>();
  p.average = s.next<bool>();
  call.fill(p);
  const auto [out, lse] = forward_outputs(call, order, p);
  const Tensor found = weights_output(call, p);
  const KernelTable kernels = kernels_for(p.q.dtype, p.score);
  const Plan<WeightParams> both = kernels.forward_weights(p);
  if (both.phase[0].items >= kFewItems) {
    run(both, p);
  } else {  // the mean over heads leaves too few items for many cores, where forward alone has one per head
    run<Params>(kernels.forward(p), p);
    run(kernels.weights(p), p);
  }
  int at = 0;
  for (const Tensor& t : {out, lse, found}) give(stack, at++, t);
}

void gather_forward(StableIValue* stack, uint64_t, uint64_t) {
  GraphForward call;
  call.read_forward(stack);
  call.make_results();
  run(gather_kernels().forward(call.p), call.p);
  call.give_results(stack);
}

void gather_backward(StableIValue* stack, uint64_t, uint64_t) {
  GraphBackward call;
  call.read_backward(stack);
  call.make_gradients();
  run(gather_kernels().backward(call.p), call.p);
  call.give_gradients(stack);
}

// w[h] as Rows: [H, Dy, Dx] of any strides.
Rows weight_rows(const Tensor& w) {
  return {const_cast<void*>(w.const_data_ptr()), dtype_of(w), 0, w.stride(0), w.stride(1), w.stride(2)};
}

void row_map(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  const Tensor x = s.next<Tensor>(), w = s.next<Tensor>();
  const OptionalTensor base = s.next<OptionalTensor>();
  const std::vector<int64_t> order = s.next<std::vector<int64_t>>();
  RowMapParams p;
  p.batch = x.size(0), p.heads = x.size(1), p.rows = x.size(2), p.dim_x = x.size(3), p.dim_y = w.size(1);
  const Tensor y = empty_ordered({p.batch, p.heads, p.rows, p.dim_y}, order, x.scalar_type(), x);
  p.x = rows_of(x), p.w = weight_rows(w), p.y = rows_of(y);
  if (base) p.base = rows_of(*base);
  run(gather_kernels().row_map(p), p);
  give(stack, 0, y);
}

void row_outer(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  const Tensor y = s.next<Tensor>(), x = s.next<Tensor>();
  RowMapParams p;
  p.batch = x.size(0), p.heads = x.size(1), p.rows = x.size(2), p.dim_x = x.size(3), p.dim_y = y.size(3);
  const Tensor dw = empty({p.heads, p.dim_y, p.dim_x}, accumulator(x), x);
  p.x = rows_of(x), p.y = rows_of(y), p.dw = dw.mutable_data_ptr();
  run(gather_kernels().row_outer(p), p);
  give(stack, 0, dw);
}

// The C++ transcriptions of the mask and of dropout, laid out densely: tests compare them with Mask.keep and
// saccade.dropout_mask.
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
              edge |= p.mask.tile_col[t] == j / kGraphTile &&
                      (p.mask.tile_bits[t * kGraphTile + i % kGraphTile] >> (j % kGraphTile) & 1);
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

// "" asks, a name forces that instruction set, "best" undoes it; returns the one in use, then every supported
// one, best first.
void cpu_isa(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  const std::string name = s.next<std::string>();
  STD_TORCH_CHECK(name.empty() || force_isa(name == "best" ? "" : name.c_str()),
                  "saccade: no instruction set '", name, "' here");
  std::string answer = current_isa();
  for (int i = 0; supported_isa(i); ++i) answer += std::string(" ") + supported_isa(i);
  stack[0] = torch::stable::detail::from(answer);
}

// The architectures the CUDA kernels were compiled for; nothing where there are none.
void cuda_archs(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(std::string(SACCADE_CUDA_ARCHS));
}

#define SACCADE_MASK_ARGS                                                                                    \
  "Tensor? head_bounds, Tensor? lengths, Tensor? keep, Tensor? q_ids, Tensor? k_ids, Tensor? cu_seqlens_q, " \
  "Tensor? cu_seqlens_k, "                                                                                   \
  "Tensor? seqused_k, Tensor? page_table, Tensor? beam, Tensor? tile_ptr, Tensor? tile_col, Tensor? "        \
  "tile_bits, SymInt[] band, "                                                                               \
  "SymInt[]? chunks, SymInt max_seqlen_q, SymInt max_seqlen_k"
#define SACCADE_CALL_ARGS                                                                                \
  "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? rel_bias, Tensor? weight, Tensor? sink, Tensor? " \
  "extra_k, Tensor? extra_v, "                                                                           \
  "Tensor? seed, " SACCADE_MASK_ARGS                                                                     \
  ", int score, int activation, float scale, float softcap, float slope, float dropout_p, int body"

#define SACCADE_GRAPH_ARGS \
  "Tensor indptr, Tensor indices, Tensor? edge_ids, Tensor? edge_bias, Tensor? edge_q, Tensor? edge_x"

STABLE_TORCH_LIBRARY(saccade, m) {
  m.def("gather_forward(" SACCADE_CALL_ARGS ", " SACCADE_GRAPH_ARGS
        ", int[] out_order) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gather_backward(Tensor dout, Tensor? dlse, Tensor? dout_edge, Tensor out, Tensor lse, Tensor "
      "out_edge, " SACCADE_CALL_ARGS ", " SACCADE_GRAPH_ARGS
      ", Tensor t_indptr, Tensor t_rows, Tensor t_edges, int needs) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def("row_map(Tensor x, Tensor w, Tensor? base, int[] out_order) -> Tensor");
  m.def("row_outer(Tensor y, Tensor x) -> Tensor");
  m.def("forward(" SACCADE_CALL_ARGS ", int[] out_order) -> (Tensor, Tensor)");
  m.def("forward_weights(" SACCADE_CALL_ARGS ", int[] out_order, bool average) -> (Tensor, Tensor, Tensor)");
  m.def("backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " SACCADE_CALL_ARGS
        ", int needs, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
        "Tensor)");
  m.def(
      "weights(Tensor lse, Tensor q, Tensor k, Tensor? bias, Tensor? rel_bias, Tensor? weight, Tensor? "
      "extra_k, Tensor? seed, " SACCADE_MASK_ARGS
      ", int score, int activation, float scale, float softcap, float slope, float dropout_p, bool average) "
      "-> Tensor");
  m.def("keep(" SACCADE_MASK_ARGS
        ", int batch, int heads, int seqlen_q, int seqlen_k, Tensor like) -> Tensor");
  m.def("dropout_mask(Tensor seed, float p, int batch, int heads, int seqlen_q, int seqlen_k) -> Tensor");
  m.def("cpu_isa(str name) -> str");
  m.def("cuda_archs() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("forward", &forward);
  m.impl("backward", &backward);
  m.impl("weights", &weights);
  m.impl("forward_weights", &forward_weights);
  m.impl("gather_forward", &gather_forward);
  m.impl("gather_backward", &gather_backward);
  m.impl("row_map", &row_map);
  m.impl("row_outer", &row_outer);
  m.impl("keep", &keep);
  m.impl("dropout_mask", &dropout_mask);
}
STABLE_TORCH_LIBRARY_IMPL(saccade, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", &cpu_isa);
  m.impl("cuda_archs", &cuda_archs);
}

}  // namespace
}  // namespace saccade
