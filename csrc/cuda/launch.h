// What the CUDA kernels offer to the operators. No torch header, no CUDA header: streams are opaque, tensors
// lie on `device`, and every pointer in Params but mask.chunks is one of that device.
#pragma once
#include "../params.h"

#ifdef __cplusplus
extern "C" {
#endif

// Each returns null, or what went wrong, with the kernel's name; the text lives until the thread's next call.
// `seed` (may be null: then Params::seed) is one number on the device, read when the kernel runs, so that a
// captured graph draws anew. bf16 and fp16, head_dim and head_dim_v up to 256.

// Why the kernels cannot serve a call, or null; looks at no data. `sm` is 80 or 90.
const char* saccade_cuda_refuses(const saccade::Params* p, int sm);

// total_q and total_k: rows of packed q and of packed k and v, beyond which nothing is read or written; not
// looked at where nothing is packed.
const char* saccade_cuda_forward_sm80(const saccade::Params* p, const int64_t* seed, int64_t total_q,
                                      int64_t total_k, int device, void* stream);

// Hopper's.
const char* saccade_cuda_forward_sm90(const saccade::Params* p, const int64_t* seed, int64_t total_q,
                                      int64_t total_k, int device, void* stream);
// The same; blocks whose work differs in length take more of it as they come free. `counter`: four bytes on
// the device, free again when the stream has passed.
const char* saccade_cuda_forward_sm90_counted(const saccade::Params* p, const int64_t* seed, int64_t total_q,
                                              int64_t total_k, void* counter, int device, void* stream);

// lse is contiguous, of lse_count elements; dlse lies as it does. `workspace`: so many bytes on the device,
// 16-byte aligned, free again when the stream has passed. Every element of every gradient wanted is written.
// On sm_80 results repeat bitwise; on Hopper those of dq do where `deterministic` is asked for, and a call
// whose dout TMA cannot read goes to the kernels of sm_80.
int64_t saccade_cuda_backward_workspace(const saccade::GradParams* p, int64_t lse_count, int deterministic,
                                        int device);
const char* saccade_cuda_backward_sm80(const saccade::GradParams* p, const int64_t* seed, void* workspace,
                                       int64_t lse_count, int64_t total_k, int device, void* stream);
const char* saccade_cuda_backward_sm90(const saccade::GradParams* p, const int64_t* seed, void* workspace,
                                       int64_t lse_count, int64_t total_k, int deterministic, int device,
                                       void* stream);

// The decode body, for every GPU: forward alone, from a cache or not; also fp32. `workspace` as above.
const char* saccade_cuda_decode_refuses(const saccade::Params* p);
int64_t saccade_cuda_decode_workspace(const saccade::Params* p);
const char* saccade_cuda_decode(const saccade::Params* p, const int64_t* seed, void* workspace, int device,
                                void* stream);

// The gather body, for every GPU: graphs in CSR form; also fp32. Gradients repeat bitwise.
const char* saccade_cuda_gather_refuses(const saccade::GatherParams* p);
int64_t saccade_cuda_gather_forward_workspace(const saccade::GatherParams* p);
int64_t saccade_cuda_gather_backward_workspace(const saccade::GatherParams* p);
const char* saccade_cuda_gather_forward(const saccade::GatherParams* p, const int64_t* seed, void* workspace,
                                        int device, void* stream);
const char* saccade_cuda_gather_backward(const saccade::GatherParams* p, const int64_t* seed, void* workspace,
                                         int device, void* stream);

// Those of the device: Hopper's where it is one, they were compiled (SACCADE_HAS_SM90) and they serve the
// call, else those of sm_80.
const char* saccade_cuda_forward(const saccade::Params* p, const int64_t* seed, int64_t total_q,
                                 int64_t total_k, void* counter, int device, void* stream);
const char* saccade_cuda_backward(const saccade::GradParams* p, const int64_t* seed, void* workspace,
                                  int64_t lse_count, int64_t total_k, int deterministic, int device,
                                  void* stream);

#ifdef __cplusplus
}
#endif
