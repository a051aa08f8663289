// A driver that does nothing but remember what a launch was given: enough of libcuda for Triton's launcher.
#include <cuda.h>
#include <stdint.h>
#include <string.h>

extern "C" {
int64_t stub_parameters[512];  // 8 bytes from where each parameter lies
int stub_wanted, stub_launches;
unsigned stub_grid[3];
}

CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return (void)context, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return (void)limit, *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute what, CUdevice device) {
  return (void)what, (void)device, *value = 232448, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return (void)device, *context = (CUcontext)1, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute what, CUfunction function) {
  (void)function;
  *value = what == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute what, int value) {
  return (void)function, (void)what, (void)value, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return (void)function, (void)config, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  return (void)error, *text = "stub", CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return (void)module, (void)name, *function = (CUfunction)2, CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return (void)image, *module = (CUmodule)3, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute what, CUdeviceptr pointer) {
  return (void)what, memcpy(value, &pointer, sizeof pointer), CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** more) {
  (void)function, (void)more;
  ++stub_launches;
  stub_grid[0] = config->gridDimX, stub_grid[1] = config->gridDimY, stub_grid[2] = config->gridDimZ;
  for (int i = 0; i < stub_wanted; ++i) memcpy(&stub_parameters[i], parameters[i], 8);
  return CUDA_SUCCESS;
}
