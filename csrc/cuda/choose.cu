// Which kernels a device and a call get.
#include "host.h"

#if SACCADE_HAS_SM90
static bool takes_sm90(const saccade::Params& p, int device) {
  return saccade::capability(device) == 90 && !saccade_cuda_refuses(&p, 90);
}
#endif

extern "C" const char* saccade_cuda_forward(const saccade::Params* p, const int64_t* seed, int64_t total_q,
                                            int64_t total_k, void* counter, int device, void* stream) {
  (void)counter;
#if SACCADE_HAS_SM90
  if (takes_sm90(*p, device))
    return saccade_cuda_forward_sm90_counted(p, seed, total_q, total_k, counter, device, stream);
#endif
  return saccade_cuda_forward_sm80(p, seed, total_q, total_k, device, stream);
}

extern "C" const char* saccade_cuda_backward(const saccade::GradParams* p, const int64_t* seed,
                                             void* workspace, int64_t lse_count, int64_t total_k,
                                             int deterministic, int device, void* stream) {
  (void)deterministic;
#if SACCADE_HAS_SM90
  if (takes_sm90(*p, device))
    return saccade_cuda_backward_sm90(p, seed, workspace, lse_count, total_k, deterministic, device, stream);
#endif
  return saccade_cuda_backward_sm80(p, seed, workspace, lse_count, total_k, device, stream);
}
