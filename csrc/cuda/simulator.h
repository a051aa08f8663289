// The device layer on the host, under any C++17 compiler: what ptx.h is under nvcc. It proves logic,
// masking, indexing and synchronisation as we understand the hardware; not the truth of descriptors,
// the memory model or speed (docs/cuda.md).
#pragma once
#include <string>
#include <utility>

#include "simulator/hopper.h"
#include "simulator/warp.h"

#define SACCADE_DEVICE static inline
#define SACCADE_DEVICE_MEMBER inline
#define SACCADE_KERNEL(threads, blocks) static void
#define SACCADE_PARAM const
#define SACCADE_UNROLL
#define SACCADE_UNROLL_BY(n)
#define SACCADE_ROLLED

namespace saccade {

using Stream = void*;

static inline std::string select_device(int) { return ""; }
static inline int capability(int device) { return device; }  // devices are numbered by what they can do
static inline int multiprocessors(int) { return 3; }  // few, so that persistent blocks take several items

template <typename... P, typename... A>
std::string launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes,
                   Stream, const A&... args) {
  try {
    sim::run_grid(blocks, threads, uint32_t(shared_bytes), [&] { kernel(args...); });
  } catch (const sim::Fault& fault) {
    return std::string(name) + ": " + fault.what();
  }
  return "";
}

static inline std::string fill_zero(void* p, size_t bytes, Stream) {
  memset(p, 0, bytes);
  return "";
}

// A tensor of 16-bit numbers [B, H, S, D]: sizes and strides from D outwards, strides in elements.
template <typename T>
std::string encode_map(TensorMap& map, const void* data, const int64_t (&size)[4], const int64_t (&stride)[4],
                       int rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16) return "TMA: the address is not a multiple of 16 bytes";
  if (stride[0] != 1 || rows > 256) return "TMA: unit columns and at most 256 rows in a box";
  map.data = static_cast<char*>(const_cast<void*>(data));
  map.rows = rows;
  for (int i = 0; i < 4; ++i) {
    if (i && stride[i] * 2 % 16) return "TMA: strides are not multiples of 16 bytes";
    if (size[i] < 1) return "TMA: an empty tensor";
    map.size[i] = size[i];
    map.stride[i] = stride[i] * 2;
  }
  return "";
}

}  // namespace saccade
