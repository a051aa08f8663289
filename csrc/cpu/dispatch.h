// Which compiled kernels run on this processor.
#pragma once
#include "kernels.h"

namespace saccade {

// The kernels for tensors of dtype `t` with this score, in the best instruction set this processor has or the
// one forced. Throws std::runtime_error where SACCADE_CPU_ISA names none of its sets.
KernelTable kernels_for(DType t, Score score);
const GatherTable& gather_kernels();

// Forces an instruction set by name ("" returns to the best); returns false, changing nothing, when the name
// is unknown or unsupported here. A name with
// '!' behind it is taken at its word, for processors that are emulated.
bool force_isa(const char* name);
// The set in use, and the i-th supported one (null past the end), best first.
const char* current_isa();
const char* supported_isa(int i);

}  // namespace saccade
