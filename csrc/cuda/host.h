// The host's side of every launcher: errors as text, and the choice of an instantiation.
#pragma once
#include <string>
#include <utility>

#include "launch.h"
#include "tile.h"

namespace saccade {

inline const char* answer(std::string error) {
  static thread_local std::string last;
  last = std::move(error);
  return last.empty() ? nullptr : last.c_str();
}

// The first of these that holds head_dim, as a type; at most 256 (saccade_cuda_refuses).
template <int... kSizes, typename Launch>
std::string with_head_dim(int64_t head_dim, Launch launch) {
  std::string error = "head_dim above 256";
  bool done = false;
  const auto attempt = [&](auto size) {
    if (done || head_dim > decltype(size)::value) return;
    done = true;
    error = launch(size);
  };
  (attempt(std::integral_constant<int, kSizes>()), ...);
  return error;
}
template <typename Launch>
std::string with_dtype(DType dtype, Launch launch) {
  return dtype == DType::kBFloat16 ? launch(bf16()) : launch(fp16());
}

// Whether a call needs more than bands, chunks, lengths and a positive scale.
inline bool is_general(const Terms& t) { return !t.bare || t.dropout || t.may_be_dead; }

// The grid's one dimension ends at 2^31 - 1.
inline std::string check_blocks(const char* name, int64_t blocks) {
  return blocks > INT32_MAX ? std::string(name) + ": more blocks than a grid has" : "";
}

inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether TMA can read a tensor: aligned, and expanded nowhere.
inline bool tma_reads(const Rows& x, int64_t rows, int64_t heads, int64_t batch) {
  return rows_aligned(x) && (x.row || rows <= 1) && (x.head || heads <= 1) && (x.batch || batch <= 1);
}

// A tensor as TMA sees it; a dimension of size 1 may have any stride, and TMA wants a multiple of 16 bytes.
template <typename T>
std::string encode_rows(TensorMap& map, const Rows& x, int64_t dim, int64_t rows, int64_t heads,
                        int64_t batch, int box) {
  return encode_map<T>(map, x.data, {dim, rows, heads, batch},
                       {1, rows == 1 ? 8 : x.row, heads == 1 ? 8 : x.head, batch == 1 ? 8 : x.batch}, box);
}

}  // namespace saccade
