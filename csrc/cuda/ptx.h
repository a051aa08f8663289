// The device layer under nvcc: what every device from sm_80 on has, and how the host launches.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <atomic>
#include <string>

#define SACCADE_DEVICE __device__ __forceinline__
#define SACCADE_DEVICE_MEMBER __device__ __forceinline__
#define SACCADE_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SACCADE_PARAM const __grid_constant__
#define SACCADE_UNROLL _Pragma("unroll")
#define SACCADE_PRAGMA(text) _Pragma(#text)
#define SACCADE_UNROLL_BY(n) SACCADE_PRAGMA(unroll(n))
#define SACCADE_ROLLED _Pragma("unroll 1")

namespace saccade {

using bf16 = __nv_bfloat16;
using fp16 = __half;
using Stream = cudaStream_t;

SACCADE_DEVICE int thread_index() { return int(threadIdx.x); }
SACCADE_DEVICE int64_t block_index() { return int64_t(blockIdx.x); }
SACCADE_DEVICE int64_t block_count() { return int64_t(gridDim.x); }

// ---- memory; shared addresses are 32-bit numbers ----

SACCADE_DEVICE uint32_t shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return uint32_t(__cvta_generic_to_shared(memory));
}
template <typename T>
SACCADE_DEVICE T load_shared(uint32_t address) {
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}
template <typename T>
SACCADE_DEVICE void store_shared(uint32_t address, T x) {
  *static_cast<T*>(__cvta_shared_to_generic(address)) = x;
}
template <typename T>
SACCADE_DEVICE T load_global(const T* p) {
  return __ldg(p);
}
template <>
SACCADE_DEVICE bool load_global<bool>(const bool* p) {
  return __ldg(reinterpret_cast<const unsigned char*>(p)) != 0;
}
template <>
SACCADE_DEVICE int64_t load_global<int64_t>(const int64_t* p) {
  return __ldg(reinterpret_cast<const long long*>(p));
}
template <typename T>
SACCADE_DEVICE void store_global(T* p, T x) {
  *p = x;
}

SACCADE_DEVICE int fetch_add(int* p, int x) { return atomicAdd(p, x); }

// ---- arithmetic ----

SACCADE_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
SACCADE_DEVICE float to_float(fp16 x) { return __half2float(x); }
SACCADE_DEVICE float to_float(float x) { return x; }
template <typename T>
SACCADE_DEVICE float bits_to_float(uint16_t bits);
template <>
SACCADE_DEVICE float bits_to_float<bf16>(uint16_t bits) {
  return __uint_as_float(uint32_t(bits) << 16);
}
template <>
SACCADE_DEVICE float bits_to_float<fp16>(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
template <typename T>
SACCADE_DEVICE T from_float(float x);
template <>
SACCADE_DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
SACCADE_DEVICE fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}
template <>
SACCADE_DEVICE float from_float<float>(float x) {
  return x;
}
template <typename T>
SACCADE_DEVICE uint32_t pack(float low, float high);
template <>
SACCADE_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
SACCADE_DEVICE uint32_t pack<fp16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
SACCADE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SACCADE_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- threads ----

SACCADE_DEVICE void sync_threads() { __syncthreads(); }
SACCADE_DEVICE void sync_warp() { __syncwarp(); }
SACCADE_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
SACCADE_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <typename T>
SACCADE_DEVICE T shuffle(T mine, int source) {
  return __shfl_sync(0xFFFFFFFF, mine, source);
}
template <typename T>
SACCADE_DEVICE T shuffle_xor(T mine, int mask) {
  return __shfl_xor_sync(0xFFFFFFFF, mine, mask);
}

// A number that the compiler takes for a new one: what follows from it is computed where it is needed, not
// kept in registers through a loop.
SACCADE_DEVICE int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- cp.async: 16 bytes, of which `bytes` come from global memory and the rest is zero ----

SACCADE_DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
SACCADE_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
SACCADE_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// ---- ldmatrix: lane l names row l % 8 of 8 x 8 matrix l / 8 ----

template <bool kTransposed>
SACCADE_DEVICE void load_matrix_x4(uint32_t address, uint32_t (&r)[4]) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// ---- mma.sync m16n8k16, fp32 sums ----

#define SACCADE_MMA(type)                                                    \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <typename T>
SACCADE_DEVICE void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
SACCADE_DEVICE void mma_16x8x16<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  SACCADE_MMA("bf16");
}
template <>
SACCADE_DEVICE void mma_16x8x16<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  SACCADE_MMA("f16");
}
#undef SACCADE_MMA

// ---- the host's side; an empty string is success ----

inline std::string cuda_error(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return "";
  (void)cudaGetLastError();  // else the runtime hands the same error to the next launch
  return std::string(name) + ": " + cudaGetErrorString(error);
}

// The static runtime shares the device's primary context with torch's.
inline std::string select_device(int device) { return cuda_error("cudaSetDevice", cudaSetDevice(device)); }

// 80 for compute capability 8.0; each device is asked once.
inline int capability(int device) {
  constexpr int kKept = 64;
  static std::atomic<int> kept[kKept];  // 0: not asked yet
  std::atomic<int>* known = device >= 0 && device < kKept ? &kept[device] : nullptr;
  if (const int found = known ? known->load(std::memory_order_relaxed) : 0) return found;
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (known) known->store(10 * major + minor, std::memory_order_relaxed);
  return 10 * major + minor;
}

inline int multiprocessors(int device) {
  int count = 1;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <typename... P, typename... A>
std::string launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes,
                   Stream stream, const A&... args) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > (48 << 10))
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared_bytes), stream>>>(args...);
    error = cudaGetLastError();
  }
  return cuda_error(name, error);
}

inline std::string fill_zero(void* p, size_t bytes, Stream stream) {
  return cuda_error("cudaMemsetAsync", cudaMemsetAsync(p, 0, bytes, stream));
}

}  // namespace saccade
