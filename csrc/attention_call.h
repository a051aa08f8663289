// saccade::forward and saccade::backward up to their kernels: what their entries for CPU and CUDA share.
#pragma once
#include "torch_call.h"

namespace saccade {

// out and lse of a call, allocated.
inline std::pair<Tensor, Tensor> forward_outputs(const Call& call, const std::vector<int64_t>& order,
                                                 Params& p) {
  std::vector<int64_t> sizes, lse_sizes;
  for (int64_t i = 0; i < call.q.dim(); ++i) sizes.push_back(call.q.size(i));
  sizes.back() = p.head_dim_v;
  if (call.q.dim() == 3)
    lse_sizes = {sizes[1], sizes[0]};
  else
    lse_sizes = {sizes[0], sizes[1], sizes[2]};
  if (p.activation == Activation::kReLU || p.activation == Activation::kSigmoid) lse_sizes = {0};
  const Tensor out = empty_ordered(sizes, order, call.q.scalar_type(), call.q);
  const Tensor lse = empty(lse_sizes, ScalarType::Double, call.q);
  p.out = rows_of(out);
  call.set_lse(p, lse);
  return {out, lse};
}

// saccade::backward's arguments and, once made, its gradients.
struct BackwardCall : Call {
  GradParams p;
  Tensor dout, out, lse;
  OptionalTensor dlse;
  bool deterministic = false;
  std::vector<Tensor> gradients;

  void read_backward(StableIValue* stack) {
    Stack s(stack);
    dout = s.next<Tensor>();
    dlse = s.next<OptionalTensor>();
    out = s.next<Tensor>();
    lse = torch::stable::contiguous(s.next<Tensor>());
    read(s, true, p);
    body = s.next<int64_t>();
    p.needs = s.next<int64_t>();
    deterministic = s.next<bool>();
    STD_TORCH_CHECK((bias || !(p.needs & kNeedBias)) && (rel_bias || !(p.needs & kNeedRelBias)) &&
                        (weight || !(p.needs & kNeedWeight)) &&
                        (extra_k || !(p.needs & (kNeedExtraK | kNeedExtraV))),
                    "saccade::backward: needs names the gradient of a tensor that is not there");
    fill(p);
    p.dout = rows_of(dout);
    p.out = rows_of(out);
    set_lse(p, lse);
    if (dlse) {
      STD_TORCH_CHECK(dlse->scalar_type() == ScalarType::Double, "saccade: dlse is float64, as lse is");
      dlse = torch::stable::contiguous(*dlse);
      p.dlse = static_cast<const double*>(dlse->const_data_ptr());
    }
  }

  // Every output that is not wanted is an empty tensor of its own: outputs may not alias.
  void make_gradients() {
    const ScalarType acc = accumulator(q);
    const auto like = [&](int64_t need, const Tensor& of, Rows& rows) {
      gradients.push_back(p.needs & need ? empty_as(of) : empty({0}, of.scalar_type(), q));
      if (p.needs & need) rows = rows_of(gradients.back());
    };
    const auto sized = [&](int64_t need, const std::vector<int64_t>& sizes, void*& data) {
      gradients.push_back(empty(p.needs & need ? sizes : std::vector<int64_t>{0}, acc, q));
      if (p.needs & need) data = gradients.back().mutable_data_ptr();
    };
    like(kNeedQ, q, p.dq);
    like(kNeedK, k, p.dk);
    like(kNeedV, *v, p.dv);
    std::vector<int64_t> bias_sizes, rel_sizes;
    for (int i = 0; i < 4 && bias; ++i)
      bias_sizes.push_back(p.dbias_size[i] = p.bias_stride[i] ? bias->size(i) : 1);
    for (int64_t i = 0; rel_bias && i < rel_bias->dim(); ++i) rel_sizes.push_back(rel_bias->size(i));
    sized(kNeedBias, bias_sizes, p.dbias);
    sized(kNeedRelBias, rel_sizes, p.drel_bias);
    sized(kNeedWeight, {p.heads, p.head_dim}, p.dweight);
    sized(kNeedExtraK, {p.heads, p.head_dim}, p.dextra_k);
    sized(kNeedExtraV, {p.heads, p.head_dim_v}, p.dextra_v);
  }

  void give_gradients(StableIValue* stack) const {
    for (size_t i = 0; i < gradients.size(); ++i) give(stack, int(i), gradients[i]);
  }
};

}  // namespace saccade
