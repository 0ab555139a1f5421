// Plain C++ with the compiler's own vectors: four lanes suit SSE2 and NEON alike.
#include "attention/cpu/attend_kernel.h"

namespace partita {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Int __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kVecBlock = 2;
constexpr int kRows = 4;
inline Vec fused(Vec a, Vec b, Vec c) { return a * b + c; }
const KvRowKernel& row_kernel() { return kv_row_kernel_portable(); }

}  // namespace
}  // namespace partita

#include "attention/cpu/attend_fp32.h"

namespace partita {
const AttendKernel& attend_kernel_portable() { return kFp32Kernel; }
}  // namespace partita
