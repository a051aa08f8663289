// Tensors that operators return.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "large_blocks.h"

namespace saccade {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
  size_t bytes = aoti_torch_dtype_element_size(dtype) * extent(sizes, strides);
  if (on_cpu && LargeBlocks::all().serves(bytes))
    if (void* const memory = LargeBlocks::all().take(bytes)) {
      const auto free = [](void* at, void* size) {
        LargeBlocks::all().give_back(at, reinterpret_cast<size_t>(size));
      };
      TORCH_ERROR_CODE_CHECK(torch_from_blob(memory, int64_t(sizes.size()), sizes.data(), strides.data(), 0,
                                             dtype, device_type, like.get_device_index(), &handle,
                                             aoti_torch_layout_strided(), nullptr, 0, free,
                                             reinterpret_cast<void*>(bytes)));
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

}  // namespace saccade
