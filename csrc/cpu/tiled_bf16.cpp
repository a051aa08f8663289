// The tiled body with bf16 products and fp32 sums: AMX tiles, AVX512-BF16 dot products, or (portable) their
// emulation.
#include "operands_bf16.h"
#include "tiled_bias.h"
#include "tiled_forward_weights.h"

#define SACCADE_TEXT_(x) #x
#define SACCADE_TEXT(x) SACCADE_TEXT_(x)

namespace saccade {
namespace SACCADE_ISA {

// decode reads each key once per call: its fp32 body, which widens as it reads, loses nothing.
extern const KernelTable bf16_kernels;
const KernelTable bf16_kernels{SACCADE_TEXT(SACCADE_ISA), &forward_plan<Bf16>,         &backward_plan<Bf16>,
                               &weights_plan<Bf16>,       &forward_weights_plan<Bf16>, nullptr};

}  // namespace SACCADE_ISA
}  // namespace saccade
