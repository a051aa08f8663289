// The tiled body in fp32 and fp64 arithmetic; bf16 and fp16 tensors are widened as they are read. Compiled
// once per instruction set.
#include "decode.h"
#include "tiled_bias.h"
#include "tiled_forward_weights.h"

#define SACCADE_TEXT_(x) #x
#define SACCADE_TEXT(x) SACCADE_TEXT_(x)

namespace saccade {
namespace SACCADE_ISA {

extern const KernelTable float_kernels;
extern const KernelTable double_kernels;
const KernelTable float_kernels{SACCADE_TEXT(SACCADE_ISA),           &forward_plan<Plain<float>>,
                                &backward_plan<Plain<float>>,        &weights_plan<Plain<float>>,
                                &forward_weights_plan<Plain<float>>, &decode_plan<float>};
const KernelTable double_kernels{
    SACCADE_TEXT(SACCADE_ISA),    &forward_plan<Plain<double>>,         &backward_plan<Plain<double>>,
    &weights_plan<Plain<double>>, &forward_weights_plan<Plain<double>>, &decode_plan<double>};

}  // namespace SACCADE_ISA
}  // namespace saccade
