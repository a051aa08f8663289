// The operators, on torch's stable ABI. Schemas are fixed in this file; fakes, autograd and every check of
// user input stand in Python (ops.py, autograd.py, problem.py), because C++ errors cross the stable ABI as
// RuntimeError only. The CUDA entries stand in cuda_ops.cpp.
#include "attention_call.h"
#include "cpu/dispatch.h"
#include "cpu_run.h"
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
  const bool rows_dense =
      p.k.col == 1 && p.v.col == 1;  // what decode reads; the tiled body takes any strides
  run(body == 1 && rows_dense ? kernels.decode(p) : kernels.forward(p), p);
  give(stack, 0, out);
  give(stack, 1, lse);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  BackwardCall call;
  call.read_backward(stack);
  call.make_gradients();
  // The decode body's few queries leave matrix tiles empty: the fp32 kernels turn their lanes along head_dim
  // instead. The tiled body serves every backward pass, and repeats bitwise whether asked to or not.
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

// The graph and what belongs to its edges, after a Call. Rows must be contiguous along head_dim: copies are
// made where they are not.
struct GraphCall : Call {
  Tensor indptr, indices;
  OptionalTensor edge_ids, edge_bias, edge_q, edge_x;
  int64_t num_edges = 0;

  void read_graph(Stack& s) {
    s.next<int64_t>();  // body: the gather operators have one
    indptr = s.next<Tensor>();
    indices = s.next<Tensor>();
    edge_ids = s.next<OptionalTensor>();
    edge_bias = s.next<OptionalTensor>();
    edge_q = s.next<OptionalTensor>();
    edge_x = s.next<OptionalTensor>();
    num_edges = s.next<int64_t>();
    for (Tensor* t : {&q, &k, &*v}) *t = dense_rows(*t);
  }
  static Tensor dense_rows(const Tensor& t) {
    return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
  }
  void fill_graph(GatherParams& p) const {
    fill(p);
    p.indptr = static_cast<const int64_t*>(indptr.const_data_ptr());
    p.indices = static_cast<const int32_t*>(indices.const_data_ptr());
    p.edge_ids = pointer<int64_t>(edge_ids);
    p.edges = indices.size(0);
    p.num_edges = num_edges;
    p.edge_bias = pointer<void>(edge_bias);
    p.edge_bias_head = edge_bias && edge_bias->size(0) > 1 ? edge_bias->stride(0) : 0;
    if (edge_q) {
      p.edge_q = rows_of(*edge_q);
      p.edge_x = {const_cast<void*>(edge_x->const_data_ptr()),
                  dtype_of(*edge_x),
                  0,
                  0,
                  edge_x->stride(0),
                  edge_x->stride(1)};
      p.edge_dim = edge_x->size(1);
    }
  }
  std::vector<int64_t> shape(int64_t columns) const { return {q.size(0), q.size(1), q.size(2), columns}; }
};

void gather_forward(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  GatherParams p;
  GraphCall call;
  call.read(s, true, p);
  call.read_graph(s);
  const std::vector<int64_t> order = s.next<std::vector<int64_t>>();
  call.fill_graph(p);
  const bool softmax = p.activation == Activation::kSoftmax || p.activation == Activation::kSoftmax1;
  const Tensor out = empty_ordered(call.shape(p.head_dim_v), order, call.q.scalar_type(), call.q);
  const Tensor lse =
      empty(softmax ? std::vector<int64_t>{p.batch, p.heads, p.seqlen_q} : std::vector<int64_t>{0},
            ScalarType::Double, call.q);
  const Tensor out_edge =
      empty(p.edge_dim ? call.shape(p.edge_dim) : std::vector<int64_t>{0}, call.q.scalar_type(), call.q);
  p.out = rows_of(out);
  if (p.edge_dim) p.out_edge = rows_of(out_edge);
  call.set_lse(p, lse);
  run(gather_kernels().forward(p), p);
  int at = 0;
  for (const Tensor& t : {out, lse, out_edge}) give(stack, at++, t);
}

void gather_backward(StableIValue* stack, uint64_t, uint64_t) {
  Stack s(stack);
  GatherParams p;
  GraphCall call;
  const Tensor dout = GraphCall::dense_rows(s.next<Tensor>());
  const OptionalTensor dlse = s.next<OptionalTensor>(), dout_edge = s.next<OptionalTensor>();
  const Tensor out = s.next<Tensor>(), lse = s.next<Tensor>(), out_edge = s.next<Tensor>();
  call.read(s, true, p);
  call.read_graph(s);
  const Tensor t_indptr = s.next<Tensor>(), t_rows = s.next<Tensor>(), t_edges = s.next<Tensor>();
  p.needs = s.next<int64_t>();
  call.fill_graph(p);
  p.dout = rows_of(dout);
  p.out = rows_of(out);
  call.set_lse(p, lse);
  OptionalTensor dense_dlse;
  if (dlse) {
    STD_TORCH_CHECK(dlse->scalar_type() == ScalarType::Double, "saccade: dlse is float64, as lse is");
    dense_dlse = torch::stable::contiguous(*dlse);
    p.dlse = static_cast<const double*>(dense_dlse->const_data_ptr());
  }
  if (p.edge_dim) {
    p.out_edge = rows_of(out_edge);
    p.dout_edge = rows_of(*dout_edge);
  }
  p.t_indptr = static_cast<const int64_t*>(t_indptr.const_data_ptr());
  p.t_rows = static_cast<const int32_t*>(t_rows.const_data_ptr());
  p.t_edges = static_cast<const int64_t*>(t_edges.const_data_ptr());

  const ScalarType acc = accumulator(call.q);
  const auto none = [&] { return empty({0}, acc, call.q); };
  const auto like = [&](int64_t need, const Tensor& of, Rows& rows) {
    if (!(p.needs & need)) return none();
    const Tensor grad = empty_as(of);
    rows = rows_of(grad);
    return grad;
  };
  const auto sized = [&](int64_t need, const std::vector<int64_t>& sizes, void*& data) {
    if (!(p.needs & need)) return none();
    const Tensor grad = empty(sizes, acc, call.q);
    data = grad.mutable_data_ptr();
    return grad;
  };
  const Tensor dq = like(kNeedQ, call.q, p.dq), dk = like(kNeedK, call.k, p.dk),
               dv = like(kNeedV, *call.v, p.dv);
  const Tensor dweight = sized(kNeedWeight, {p.heads, p.head_dim}, p.dweight);
  const Tensor dedge_bias =
      sized(kNeedEdgeBias, {call.edge_bias ? call.edge_bias->size(0) : 0, p.num_edges}, p.dedge_bias);
  const Tensor dedge_q = like(kNeedEdgeQ, call.edge_q ? *call.edge_q : call.q, p.dedge_q);
  const Tensor dedge_x = sized(kNeedEdgeX, {p.num_edges, p.edge_dim}, p.dedge_x);
  // Edges that an intersection left out have numbers too: their gradients are zero.
  if (p.edges < p.num_edges)
    for (Tensor t : {dedge_bias, dedge_x})
      if (t.numel()) torch::stable::zero_(t);
  run(gather_kernels().backward(p), p);
  int at = 0;
  for (const Tensor& t : {dq, dk, dv, dweight, dedge_bias, dedge_q, dedge_x}) give(stack, at++, t);
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
  "tile_bits, int[] band, "                                                                                  \
  "int[] chunks, int max_seqlen_q, int max_seqlen_k"
#define SACCADE_CALL_ARGS                                                                                \
  "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? rel_bias, Tensor? weight, Tensor? sink, Tensor? " \
  "extra_k, Tensor? extra_v, "                                                                           \
  "Tensor? seed, " SACCADE_MASK_ARGS                                                                     \
  ", int score, int activation, float scale, float softcap, float slope, float dropout_p, int body"

#define SACCADE_GRAPH_ARGS                                                                                   \
  "Tensor indptr, Tensor indices, Tensor? edge_ids, Tensor? edge_bias, Tensor? edge_q, Tensor? edge_x, int " \
  "num_edges"

STABLE_TORCH_LIBRARY(saccade, m) {
  m.def("gather_forward(" SACCADE_CALL_ARGS ", " SACCADE_GRAPH_ARGS
        ", int[] out_order) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gather_backward(Tensor dout, Tensor? dlse, Tensor? dout_edge, Tensor out, Tensor lse, Tensor "
      "out_edge, " SACCADE_CALL_ARGS ", " SACCADE_GRAPH_ARGS
      ", Tensor t_indptr, Tensor t_rows, Tensor t_edges, int needs) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
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
  m.impl("keep", &keep);
  m.impl("dropout_mask", &dropout_mask);
}
STABLE_TORCH_LIBRARY_IMPL(saccade, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", &cpu_isa);
  m.impl("cuda_archs", &cuda_archs);
}

}  // namespace
}  // namespace saccade
