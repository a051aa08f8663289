// A CUDA runtime that runs nothing: it hands every launch, with the bytes of its parameters, to a function of
// the tests (tests/ptx_cuda.py). The launchers of csrc/cuda are those that nvcc made.
#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include <map>
#include <string>

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared = 0;
  void* stream = nullptr;
};
Configuration next;
// The launcher's handle of a kernel, and its name in the PTX.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> found;
  return found;
}
std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> found;
  return found;
}
using Run = int (*)(const char* name, const unsigned* grid, unsigned threads, uint64_t shared,
                    void** parameters);
Run run_kernel;

cudaError_t run(const void* kernel, dim3 grid, dim3 block, void** parameters, size_t shared) {
  const int limit = shared_limits().count(kernel) ? shared_limits()[kernel] : 48 << 10;
  if (!names().count(kernel) || !run_kernel || block.y != 1 || block.z != 1 || int(shared) > limit)
    return cudaErrorInvalidValue;
  const unsigned sizes[3] = {grid.x, grid.y, grid.z};
  return run_kernel(names()[kernel].c_str(), sizes, block.x, shared, parameters) ? cudaErrorLaunchFailure
                                                                                 : cudaSuccess;
}

// What TMA asks of a tensor; else it is kept as it is, in words of the test's own.
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool half = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const int widths[] = {16, 32, 64, 128};
  if (!half || rank < 3 || rank > 4 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || swizzle < 0 || swizzle > CU_TENSOR_MAP_SWIZZLE_128B ||
      reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(data) % 16)
    return CUDA_ERROR_INVALID_VALUE;
  const int width = widths[swizzle];
  uint64_t words[16] = {0x5ACCADE, 2 | rank << 8 | uint64_t(width) << 16,
                        uint64_t(reinterpret_cast<uintptr_t>(data))};
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t(1) << 32 || box[i] == 0 || box[i] > 256 || steps[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    if (i && (strides[i - 1] % 16 || strides[i - 1] >= uint64_t(1) << 40)) return CUDA_ERROR_INVALID_VALUE;
    words[3 + i] = sizes[i];
    if (i) words[7 + i] = strides[i - 1];
    words[11 + i / 2] |= uint64_t(box[i]) << 32 * (i % 2);
  }
  if (box[0] * 2 % 16 || (width > 16 && box[0] * 2 > cuuint32_t(width))) return CUDA_ERROR_INVALID_VALUE;
  memcpy(map, words, sizeof words);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

void saccade_ptx_run(Run function) { run_kernel = function; }

// ---- what nvcc's host code calls ----

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  names()[host] = device;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  next = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = next.grid, *block = next.block, *shared = next.shared;
  *static_cast<void**>(stream) = next.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** parameters, size_t shared,
                               cudaStream_t) {
  return run(kernel, grid, block, parameters, shared);
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** parameters, size_t shared,
                             cudaStream_t) {
  return run(host, grid, block, parameters, shared);
}

// ---- what the launchers call; devices are numbered by what they can do ----

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute what, int value) {
  if (what != cudaFuncAttributeMaxDynamicSharedMemorySize || value > 227 << 10) return cudaErrorInvalidValue;
  shared_limits()[host] = value;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "the emulator found a fault" : "refused";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int device) {
  *value = what == cudaDevAttrComputeCapabilityMajor   ? device / 10
           : what == cudaDevAttrComputeCapabilityMinor ? device % 10
                                                       : 3;  // multiprocessors
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  if (strcmp(name, "cuTensorMapEncodeTiled")) return cudaErrorInvalidValue;
  *function = reinterpret_cast<void*>(&encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}
