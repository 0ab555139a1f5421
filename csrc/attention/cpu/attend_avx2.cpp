// AVX2 + FMA: fp32 arithmetic for every codec and mode.
#include "attention/cpu/attend_kernel.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace partita {
namespace {

typedef float Vec __attribute__((vector_size(32)));
typedef int32_t Int __attribute__((vector_size(32)));
constexpr int kLanes = 8;
constexpr int kVecBlock = 2;
constexpr int kRows = 4;
inline Vec fused(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
const KvRowKernel& row_kernel() { return kv_row_kernel_avx2(); }

}  // namespace
}  // namespace partita

#include "attention/cpu/attend_fp32.h"

namespace partita {
const AttendKernel& attend_kernel_avx2() { return kFp32Kernel; }
}  // namespace partita

#else  // a machine of another kind: never chosen there
namespace partita {
const AttendKernel& attend_kernel_avx2() { return attend_kernel_portable(); }
}  // namespace partita
#endif
