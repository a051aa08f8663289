#include "dispatch.h"

#include <stdlib.h>
#include <string.h>

#include <stdexcept>
#include <string>

#if SACCADE_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace saccade {

#define SACCADE_DECLARE(isa)               \
  namespace isa {                          \
  extern const KernelTable float_kernels;  \
  extern const KernelTable double_kernels; \
  extern const GatherTable gather_kernels; \
  }
#define SACCADE_DECLARE_BF16(isa)        \
  namespace isa {                        \
  extern const KernelTable bf16_kernels; \
  }
SACCADE_DECLARE(portable)
#if SACCADE_HAS_AVX2
SACCADE_DECLARE(avx2)
#endif
#if SACCADE_HAS_AVX512
SACCADE_DECLARE(avx512)
#endif
SACCADE_DECLARE_BF16(portable)
#if SACCADE_HAS_AVX512BF16
SACCADE_DECLARE_BF16(avx512bf16)
#endif
#if SACCADE_HAS_AMX
SACCADE_DECLARE_BF16(amx)
#endif

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  const KernelTable *float_kernels, *double_kernels,
      *bf16_kernels;  // bf16_kernels null: bf16 is widened to float
  const GatherTable* gather;
};

bool always() { return true; }
#if SACCADE_HAS_AVX2
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#if SACCADE_HAS_AVX512
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
#if SACCADE_HAS_AVX512BF16
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#if SACCADE_HAS_AMX
// Linux hands out the tile registers' state only on request (arch_prctl ARCH_REQ_XCOMP_PERM, component 18).
bool has_amx() {
  return has_avx512bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif

const Isa kIsas[] = {
#if SACCADE_HAS_AMX
    {"amx", has_amx, &avx512::float_kernels, &avx512::double_kernels, &amx::bf16_kernels,
     &avx512::gather_kernels},
#endif
#if SACCADE_HAS_AVX512BF16
    {"avx512bf16", has_avx512bf16, &avx512::float_kernels, &avx512::double_kernels, &avx512bf16::bf16_kernels,
     &avx512::gather_kernels},
#endif
#if SACCADE_HAS_AVX512
    {"avx512", has_avx512, &avx512::float_kernels, &avx512::double_kernels, nullptr, &avx512::gather_kernels},
#endif
#if SACCADE_HAS_AVX2
    {"avx2", has_avx2, &avx2::float_kernels, &avx2::double_kernels, nullptr, &avx2::gather_kernels},
#endif
    {"portable", always, &portable::float_kernels, &portable::double_kernels, nullptr,
     &portable::gather_kernels},
    // Never chosen: the bf16 tile code on plain C++ tiles, so that its logic is tested on any processor.
    {"emulated_bf16", always, &portable::float_kernels, &portable::double_kernels, &portable::bf16_kernels,
     &portable::gather_kernels},
};

const Isa* find(const char* name) {
  const size_t length = strlen(name);
  const bool unchecked = length && name[length - 1] == '!';
  for (const Isa& isa : kIsas) {
    if (length && (strncmp(isa.name, name, length - unchecked) != 0 || isa.name[length - unchecked]))
      continue;
    if (unchecked || isa.supported()) return &isa;
  }
  return nullptr;
}

const Isa* first() {
  const char* name = getenv("SACCADE_CPU_ISA");
  const Isa* chosen = find(name ? name : "");
  if (chosen) return chosen;
  std::string sets;
  for (int i = 0; supported_isa(i); ++i) sets += std::string(i ? ", " : "") + supported_isa(i);
  throw std::runtime_error(std::string("saccade: SACCADE_CPU_ISA=") + name +
                           " cannot run here; this processor can run " + sets);
}

const Isa*& current() {
  static const Isa* isa = first();
  return isa;
}

}  // namespace

KernelTable kernels_for(DType t, Score score) {
  const Isa& isa = *current();
  if (t == DType::kFloat64) return *isa.double_kernels;
  KernelTable table = *isa.float_kernels;
  if (t == DType::kBFloat16 && score == Score::kDot && isa.bf16_kernels) {
    table.forward = isa.bf16_kernels->forward;
    table.backward = isa.bf16_kernels->backward;
    table.weights = isa.bf16_kernels->weights;
    table.forward_weights = isa.bf16_kernels->forward_weights;
  }
  return table;
}

const GatherTable& gather_kernels() { return *current()->gather; }

bool force_isa(const char* name) {
  const Isa* isa = find(name);
  if (!isa) return false;
  current() = *name ? isa : first();
  return true;
}

const char* current_isa() { return current()->name; }

const char* supported_isa(int i) {
  for (const Isa& isa : kIsas)
    if (isa.supported() && i-- == 0) return isa.name;
  return nullptr;
}

}  // namespace saccade
