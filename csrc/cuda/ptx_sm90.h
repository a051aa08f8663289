// The device layer under nvcc: what sm_90 adds. mbarriers, the bulk copy engine (TMA), wgmma, setmaxnreg.
#pragma once
#include "ptx.h"

namespace saccade {

// ---- mbarriers ----

SACCADE_DEVICE void barrier_init(uint32_t address, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
}
// Makes the barriers known to the copy engine; before the sync_threads() after which they are used.
SACCADE_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}
SACCADE_DEVICE void barrier_expect(uint32_t address, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
}
SACCADE_DEVICE void barrier_arrive(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
}
// Until the phase of this parity has ended.
SACCADE_DEVICE void barrier_wait(uint32_t address, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(address),
      "r"(parity)
      : "memory");
}

// ---- TMA: tensors of 16-bit numbers in four dimensions, boxes 64 columns (128 bytes) wide, 128-byte swizzle

using TensorMap = CUtensorMap;

SACCADE_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
SACCADE_DEVICE void tma_load(uint32_t tile, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2,
                             int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2];" ::"r"(tile),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// A run of numbers; addresses and size are multiples of 16 bytes.
SACCADE_DEVICE void bulk_load(uint32_t to, const float* from, uint32_t barrier, int bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
SACCADE_DEVICE void tma_store(const TensorMap* map, uint32_t tile, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(tile), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
SACCADE_DEVICE void bulk_reduce_add(float* to, uint32_t from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(from), "r"(bytes)
               : "memory");
}
SACCADE_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but kLeft groups have read their shared memory; until they have written, too.
template <int kLeft>
SACCADE_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}
template <int kLeft>
SACCADE_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kLeft) : "memory");
}
// What this thread wrote to shared memory becomes visible to the copy engine and to wgmma.
SACCADE_DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- wgmma: 64 x N x 16 by a warpgroup, fp32 sums ----

// Of a tile of 128-byte rows under the 128-byte swizzle. `leading`: from one 64-column panel to the next,
// which only transposed operands need; groups of eight rows are 1024 bytes apart.
SACCADE_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}
SACCADE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SACCADE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
SACCADE_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Nothing that reads or writes these sums moves past this line: the compiler does not know that a product
// under way writes them.
template <int N>
SACCADE_DEVICE void wgmma_hold(float (&d)[N]) {
  SACCADE_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// What x depends on is computed before any wait behind this line: ptxas would move the wait ahead of
// arithmetic that needs no product, and the two would not overlap. Of x >= 0 nothing is stored; `at`: any
// shared word.
SACCADE_DEVICE void settle(uint32_t at, float x) {
  asm volatile(
      "{\n.reg .pred never;\nsetp.lt.f32 never, %1, 0f00000000;\n"
      "@never st.shared.f32 [%0], %1;\n}" ::"r"(at),
      "f"(x)
      : "memory");
}

template <typename T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;

// A wgmma names each of its registers. The sums come first, so what follows them has other numbers for every
// width: a width is the names of its sums, the sums, and the seven numbers after them.
#define SACCADE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SACCADE_D16(i) SACCADE_D4(i), SACCADE_D4(i + 4), SACCADE_D4(i + 8), SACCADE_D4(i + 12)
#define SACCADE_D64(i) SACCADE_D16(i), SACCADE_D16(i + 16), SACCADE_D16(i + 32), SACCADE_D16(i + 48)
#define SACCADE_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define SACCADE_SIXTY SACCADE_TEN() SACCADE_TEN(1) SACCADE_TEN(2) SACCADE_TEN(3) SACCADE_TEN(4) SACCADE_TEN(5)
#define SACCADE_NAMES16 SACCADE_TEN() "%10, %11, %12, %13, %14, %15"
#define SACCADE_NAMES32 SACCADE_TEN() SACCADE_TEN(1) SACCADE_TEN(2) "%30, %31"
#define SACCADE_NAMES64 SACCADE_SIXTY "%60, %61, %62, %63"
#define SACCADE_NAMES128                                                                    \
  SACCADE_SIXTY SACCADE_TEN(6) SACCADE_TEN(7) SACCADE_TEN(8) SACCADE_TEN(9) SACCADE_TEN(10) \
      SACCADE_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define SACCADE_WIDTHS(form)                                                                \
  form(32, SACCADE_NAMES16, (SACCADE_D16(0)), 16, 17, 18, 19, 20, 21, 22);                  \
  form(64, SACCADE_NAMES32, (SACCADE_D16(0), SACCADE_D16(16)), 32, 33, 34, 35, 36, 37, 38); \
  form(128, SACCADE_NAMES64, (SACCADE_D64(0)), 64, 65, 66, 67, 68, 69, 70);                 \
  form(256, SACCADE_NAMES128, (SACCADE_D64(0), SACCADE_D64(64)), 128, 129, 130, 131, 132, 133, 134)
#define SACCADE_EXPAND(...) __VA_ARGS__
#define SACCADE_WGMMA_OF(type, n, names, sums, a_at, b_at, on_at, modes, ...)                             \
  asm volatile("{\n.reg .pred on;\nsetp.ne.b32 on, %" #on_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n \
               "k16.f32." type "." type " {" names "}, " a_at ", %" #b_at ", on, 1, 1, " modes ";\n}"     \
               : SACCADE_EXPAND sums                                                                      \
               : __VA_ARGS__, "l"(b), "r"(int(accumulate)), "n"(int(kTransposed)))
#define SACCADE_WGMMA(n, ...)                                                   \
  if constexpr (N == n && is_bf16<T>) SACCADE_WGMMA_OF("bf16", n, __VA_ARGS__); \
  if constexpr (N == n && !is_bf16<T>) SACCADE_WGMMA_OF("f16", n, __VA_ARGS__)
#define SACCADE_FROM_SHARED(n, names, sums, p0, p1, p2, p3, p4, p5, p6) \
  SACCADE_WGMMA(n, names, sums, "%" #p0, p2, p3, "%" #p1 ", %" #p4, "l"(a), "n"(int(kTransposedA)))
#define SACCADE_FROM_REGISTERS(n, names, sums, p0, p1, p2, p3, p4, p5, p6)                              \
  SACCADE_WGMMA(n, names, sums, "{%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}", p4, p5, "%" #p6, "r"(a[0]), \
                "r"(a[1]), "r"(a[2]), "r"(a[3]))

template <int N>
constexpr bool is_width = N == 32 || N == 64 || N == 128 || N == 256;

// d (+)= A B, A from shared memory.
template <typename T, int N, bool kTransposed, bool kTransposedA = false>
SACCADE_DEVICE void wgmma_shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(is_width<N>, "a width that the kernels use");
  SACCADE_WIDTHS(SACCADE_FROM_SHARED);
}
// d (+)= A B, A from registers, as mma_16x8x16 holds it: warp w of the warpgroup has rows 16 w to 16 w + 15.
template <typename T, int N, bool kTransposed>
SACCADE_DEVICE void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(is_width<N>, "a width that the kernels use");
  SACCADE_WIDTHS(SACCADE_FROM_REGISTERS);
}
#undef SACCADE_FROM_SHARED
#undef SACCADE_FROM_REGISTERS
#undef SACCADE_WIDTHS

template <int kRegisters>
SACCADE_DEVICE void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
SACCADE_DEVICE void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- the host's side ----

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
// From the driver that is loaded, so that the library needs no libcuda to link or to load.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* p = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault, &result);
    const bool failed = !cuda_error("cudaGetDriverEntryPointByVersion", error).empty();
    if (failed || result != cudaDriverEntryPointSuccess) p = nullptr;
    return reinterpret_cast<EncodeTiled>(p);
  }();
  return found;
}

// A tensor of 16-bit numbers [B, H, S, D]: sizes and strides from D outwards, strides in elements.
template <typename T>
std::string encode_map(TensorMap& map, const void* data, const int64_t (&size)[4], const int64_t (&stride)[4],
                       int rows) {
  const EncodeTiled encode = encode_tiled();
  if (!encode) return "the driver has no cuTensorMapEncodeTiled";
  cuuint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; ++i) sizes[i] = cuuint64_t(size[i]);
  for (int i = 0; i < 3; ++i) strides[i] = cuuint64_t(stride[i + 1]) * 2;
  const cuuint32_t box[4] = {64, cuuint32_t(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result = encode(
      &map, is_bf16<T> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? "" : "cuTensorMapEncodeTiled: error " + std::to_string(int(result));
}

}  // namespace saccade
