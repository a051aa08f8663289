// saccade._C: what was compiled and what this processor can do. A probe, no way to a kernel: no torch header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

std::vector<std::string> compiled_sets() {
  return {
      "portable",
#if SACCADE_HAS_AVX2
      "avx2",
#endif
#if SACCADE_HAS_AVX512
      "avx512",
#endif
#if SACCADE_HAS_AVX512BF16
      "avx512bf16",
#endif
#if SACCADE_HAS_AMX
      "amx",
#endif
  };
}

#if defined(__x86_64__)

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(unsigned leaf, unsigned subleaf) {
  Leaf r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros where the leaf is unknown
  return r;
}

// The register states the operating system saves (XCR0); an instruction set without its state cannot be used.
unsigned saved_states() {
  constexpr unsigned kOsxsave = 1u << 27;
  if (!(cpuid(1, 0).ecx & kOsxsave)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

std::vector<std::string> cpu_features() {
  constexpr unsigned kYmm = 0x6, kZmm = 0xe6, kTile = 0x60000;
  const Leaf basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
  const struct {
    const char* name;
    unsigned word, bit, states;
  } table[] = {
      {"avx2", extended.ebx, 5, kYmm},       {"fma", basic.ecx, 12, kYmm},
      {"f16c", basic.ecx, 29, kYmm},         {"avx512f", extended.ebx, 16, kZmm},
      {"avx512bw", extended.ebx, 30, kZmm},  {"avx512vl", extended.ebx, 31, kZmm},
      {"avx512dq", extended.ebx, 17, kZmm},  {"avx512_bf16", more.eax, 5, kZmm},
      {"amx_tile", extended.edx, 24, kTile}, {"amx_bf16", extended.edx, 22, kTile},
  };
  const unsigned states = saved_states();
  std::vector<std::string> found;
  for (const auto& row : table)
    if ((row.word >> row.bit & 1) && (states & row.states) == row.states) found.push_back(row.name);
  return found;
}

#else

std::vector<std::string> cpu_features() { return {}; }

#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  constexpr unsigned long long kTarget = TORCH_TARGET_VERSION;
  m.doc() = "Build facts and processor features.";
  m.attr("with_cuda") = bool(SACCADE_WITH_CUDA);
  m.attr("cuda_archs") = SACCADE_CUDA_ARCHS;
  m.attr("instruction_sets") = pybind11::tuple(pybind11::cast(compiled_sets()));
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
  m.attr("torch_target") = pybind11::make_tuple(int(kTarget >> 56), int(kTarget >> 48 & 0xff));
  m.def("cpu_features", &cpu_features, "Names of the features this processor and operating system support.");
}
