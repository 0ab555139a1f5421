// wgmma: the tensor cores of compute capability 9.0, a warpgroup (four warps, of which the first's number is a multiple
// of four) at a time. D[64, 128] += A[64, k] B[128, k]^T with A in registers and B in shared memory.
//
// Of each 16 rows of A and D a warp of the group has its own, in the fragments of mma.sync (ptx_mma.cuh): a[] as there,
// d[n] those of columns 8 n to 8 n + 7.
//
// The product runs on by itself. wgmma_fence comes before the first one and after whatever else wrote its registers;
// until wgmma_wait has covered it, a, d and the bytes of B are not to be touched. What threads wrote to shared memory,
// cp.async included, the tensor cores see only behind fence_async_proxy by the thread that wrote (and had waited for
// its copies) and a barrier.
#pragma once

#include "device/launch.cuh"

namespace partita::device {

// Operand B: rows of 128 bytes, one after another from a multiple of 1024 bytes on, in which the 16-byte chunk c of row
// r lies at place c ^ (r % 8).
using WgmmaMatrix = uint64_t;

__device__ __forceinline__ WgmmaMatrix wgmma_matrix(const void* rows) {
  const uint64_t address = __cvta_generic_to_shared(rows);
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

// The matrix that begins `bytes` (a multiple of 32 below 128) further along the rows.
__device__ __forceinline__ WgmmaMatrix wgmma_columns(WgmmaMatrix matrix, int bytes) { return matrix + (bytes >> 4); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// clang-format off
#define PARTITA_WGMMA_SUMS(constraint) \
  constraint(d[0][0]), constraint(d[0][1]), constraint(d[0][2]), constraint(d[0][3]), \
  constraint(d[1][0]), constraint(d[1][1]), constraint(d[1][2]), constraint(d[1][3]), \
  constraint(d[2][0]), constraint(d[2][1]), constraint(d[2][2]), constraint(d[2][3]), \
  constraint(d[3][0]), constraint(d[3][1]), constraint(d[3][2]), constraint(d[3][3]), \
  constraint(d[4][0]), constraint(d[4][1]), constraint(d[4][2]), constraint(d[4][3]), \
  constraint(d[5][0]), constraint(d[5][1]), constraint(d[5][2]), constraint(d[5][3]), \
  constraint(d[6][0]), constraint(d[6][1]), constraint(d[6][2]), constraint(d[6][3]), \
  constraint(d[7][0]), constraint(d[7][1]), constraint(d[7][2]), constraint(d[7][3]), \
  constraint(d[8][0]), constraint(d[8][1]), constraint(d[8][2]), constraint(d[8][3]), \
  constraint(d[9][0]), constraint(d[9][1]), constraint(d[9][2]), constraint(d[9][3]), \
  constraint(d[10][0]), constraint(d[10][1]), constraint(d[10][2]), constraint(d[10][3]), \
  constraint(d[11][0]), constraint(d[11][1]), constraint(d[11][2]), constraint(d[11][3]), \
  constraint(d[12][0]), constraint(d[12][1]), constraint(d[12][2]), constraint(d[12][3]), \
  constraint(d[13][0]), constraint(d[13][1]), constraint(d[13][2]), constraint(d[13][3]), \
  constraint(d[14][0]), constraint(d[14][1]), constraint(d[14][2]), constraint(d[14][3]), \
  constraint(d[15][0]), constraint(d[15][1]), constraint(d[15][2]), constraint(d[15][3])
#define PARTITA_WGMMA_REGISTERS \
  "{" \
  "%0, %1, %2, %3, %4, %5, %6, %7, " \
  "%8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63" \
  "}, {%64, %65, %66, %67}, %68, p"
// clang-format on
#define PARTITA_FLOAT_SUM(value) "+f"(value)
#define PARTITA_INTEGER_SUM(value) "+r"(value)
#define PARTITA_WGMMA(name, Sum, sum_constraint, instruction, scales)                                         \
  __device__ __forceinline__ void name(Sum(&d)[16][4], const uint32_t (&a)[4], WgmmaMatrix b) {               \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; " instruction " " PARTITA_WGMMA_REGISTERS scales ";}" \
                 : PARTITA_WGMMA_SUMS(sum_constraint)                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                               \
  }
PARTITA_WGMMA(wgmma_m64n128k16_f16, float, PARTITA_FLOAT_SUM, "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16",
              ", 1, 1, 0")
PARTITA_WGMMA(wgmma_m64n128k16_bf16, float, PARTITA_FLOAT_SUM, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
              ", 1, 1, 0")
PARTITA_WGMMA(wgmma_m64n128k32_s8, int32_t, PARTITA_INTEGER_SUM, "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8",
              "")
PARTITA_WGMMA(wgmma_m64n128k32_u8s8, int32_t, PARTITA_INTEGER_SUM, "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8",
              "")
#undef PARTITA_WGMMA
#undef PARTITA_INTEGER_SUM
#undef PARTITA_FLOAT_SUM
#undef PARTITA_WGMMA_REGISTERS
#undef PARTITA_WGMMA_SUMS

}  // namespace partita::device
