// saccade::gather_forward and saccade::gather_backward up to their kernels.
#pragma once
#include "torch_call.h"

namespace saccade {

// The graph and what belongs to its edges, after a Call.
struct GraphCall : Call {
  GatherParams p;
  Tensor indptr, indices;
  OptionalTensor edge_ids, edge_bias, edge_q, edge_x;

  // Rows must be contiguous along head_dim: copies are made where they are not.
  static Tensor dense_rows(const Tensor& t) {
    return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
  }
  void read_graph(Stack& s) {
    read(s, true, p);
    s.next<int64_t>();  // body: the gather operators have one
    indptr = s.next<Tensor>();
    indices = s.next<Tensor>();
    edge_ids = s.next<OptionalTensor>();
    edge_bias = s.next<OptionalTensor>();
    edge_q = s.next<OptionalTensor>();
    edge_x = s.next<OptionalTensor>();
    for (Tensor* t : {&q, &k, &*v}) *t = dense_rows(*t);
    if (edge_q) edge_q = dense_rows(*edge_q);
    fill(p);
    p.indptr = static_cast<const int64_t*>(indptr.const_data_ptr());
    p.indices = static_cast<const int32_t*>(indices.const_data_ptr());
    p.edge_ids = pointer<int64_t>(edge_ids);
    p.edges = indices.size(0);
    // An intersection of graphs keeps the numbers of edges that it leaves out.
    p.num_edges = edge_bias ? edge_bias->size(1) : edge_x ? edge_x->size(0) : p.edges;
    p.edge_bias = pointer<void>(edge_bias);
    p.edge_bias_head = edge_bias && edge_bias->size(0) > 1 ? edge_bias->stride(0) : 0;
    if (!edge_q) return;
    p.edge_q = rows_of(*edge_q);
    p.edge_x = {const_cast<void*>(edge_x->const_data_ptr()),
                dtype_of(*edge_x),
                0,
                0,
                edge_x->stride(0),
                edge_x->stride(1)};
    (p.score == Score::kDot ? p.edge_dim : p.joint_dim) = edge_x->size(1);
  }
};

struct GraphForward : GraphCall {
  Tensor out, lse, out_edge;

  void read_forward(StableIValue* stack) {
    Stack s(stack);
    read_graph(s);
    order_ = s.next<std::vector<int64_t>>();
  }
  void make_results() {
    const bool softmax = p.activation == Activation::kSoftmax || p.activation == Activation::kSoftmax1;
    const auto shape = [&](int64_t columns) {
      return std::vector<int64_t>{p.batch, p.heads, p.seqlen_q, columns};
    };
    out = empty_ordered(shape(p.head_dim_v), order_, q.scalar_type(), q);
    lse = empty(softmax ? std::vector<int64_t>{p.batch, p.heads, p.seqlen_q} : std::vector<int64_t>{0},
                ScalarType::Double, q);
    out_edge = empty(p.edge_dim ? shape(p.edge_dim) : std::vector<int64_t>{0}, q.scalar_type(), q);
    p.out = rows_of(out);
    if (p.edge_dim) p.out_edge = rows_of(out_edge);
    set_lse(p, lse);
  }
  void give_results(StableIValue* stack) const {
    give(stack, 0, out);
    give(stack, 1, lse);
    give(stack, 2, out_edge);
  }

 private:
  std::vector<int64_t> order_;
};

struct GraphBackward : GraphCall {
  Tensor dout, out, lse, out_edge, t_indptr, t_rows, t_edges;
  OptionalTensor dlse, dout_edge;
  std::vector<Tensor> gradients;

  void read_backward(StableIValue* stack) {
    Stack s(stack);
    dout = dense_rows(s.next<Tensor>());
    dlse = s.next<OptionalTensor>();
    dout_edge = s.next<OptionalTensor>();
    if (dout_edge) dout_edge = dense_rows(*dout_edge);
    out = dense_rows(s.next<Tensor>());
    lse = torch::stable::contiguous(s.next<Tensor>());
    out_edge = dense_rows(s.next<Tensor>());
    read_graph(s);
    t_indptr = s.next<Tensor>();
    t_rows = s.next<Tensor>();
    t_edges = s.next<Tensor>();
    p.needs = s.next<int64_t>();
    p.dout = rows_of(dout);
    p.out = rows_of(out);
    set_lse(p, lse);
    if (dlse) {
      STD_TORCH_CHECK(dlse->scalar_type() == ScalarType::Double, "saccade: dlse is float64, as lse is");
      dlse = torch::stable::contiguous(*dlse);
      p.dlse = static_cast<const double*>(dlse->const_data_ptr());
    }
    if (p.edge_dim) {
      p.out_edge = rows_of(out_edge);
      p.dout_edge = rows_of(*dout_edge);
    }
    p.t_indptr = static_cast<const int64_t*>(t_indptr.const_data_ptr());
    p.t_rows = static_cast<const int32_t*>(t_rows.const_data_ptr());
    p.t_edges = static_cast<const int64_t*>(t_edges.const_data_ptr());
  }

  // Every output that is not wanted is an empty tensor of its own: outputs may not alias.
  void make_gradients() {
    const ScalarType acc = accumulator(q);
    const auto like = [&](int64_t need, const Tensor& of, Rows& rows) {
      gradients.push_back(p.needs & need ? empty_as(of) : empty({0}, acc, q));
      if (p.needs & need) rows = rows_of(gradients.back());
    };
    const auto sized = [&](int64_t need, const std::vector<int64_t>& sizes, void*& data) {
      gradients.push_back(empty(p.needs & need ? sizes : std::vector<int64_t>{0}, acc, q));
      // Edges that an intersection left out have numbers too, and there may be no batch or head: no gradient.
      if (!(p.needs & need)) return;
      if (p.edges < p.num_edges || !p.batch || !p.heads) torch::stable::zero_(gradients.back());
      data = gradients.back().mutable_data_ptr();
    };
    like(kNeedQ, q, p.dq);
    like(kNeedK, k, p.dk);
    like(kNeedV, *v, p.dv);
    sized(kNeedWeight, {p.heads, p.head_dim}, p.dweight);
    sized(kNeedEdgeBias, {edge_bias ? edge_bias->size(0) : 0, p.num_edges}, p.dedge_bias);
    like(kNeedEdgeQ, edge_q ? *edge_q : q, p.dedge_q);
    sized(kNeedEdgeX, {p.num_edges, edge_x ? edge_x->size(1) : 0}, p.dedge_x);
  }
  void give_gradients(StableIValue* stack) const {
    for (size_t i = 0; i < gradients.size(); ++i) give(stack, int(i), gradients[i]);
  }
};

}  // namespace saccade
