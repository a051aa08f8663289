// The thin layer every kernel is written against: PTX under nvcc, a simulator on the host elsewhere. Kernels
// name no intrinsic, no inline assembly and no launch of their own, so that the same source runs in the tests
// on a machine without a GPU.
#pragma once
#ifdef __CUDACC__
#include "ptx.h"
#include "ptx_sm90.h"
#else
#include "simulator.h"
#endif
