// Twin of csrc/device/ptx_wgmma.cuh: eight columns at a time through mma.sync. The product is complete when the call
// returns, and shared memory is read then; the waits and fences of the asynchronous instruction are not checked here.
#pragma once

#include "device/launch.cuh"
#include "device/ptx_ldmatrix.cuh"
#include "device/ptx_mma.cuh"

namespace partita::device {

struct WgmmaMatrix {
  const std::byte* rows;
  int first_chunk;
};

inline WgmmaMatrix wgmma_matrix(const void* rows) { return {static_cast<const std::byte*>(rows), 0}; }
inline WgmmaMatrix wgmma_columns(WgmmaMatrix matrix, int bytes) {
  return {matrix.rows, matrix.first_chunk + bytes / 16};
}

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kPending>
inline void wgmma_wait() {}
inline void fence_async_proxy() {}

// The swizzle is that of the address, as in hardware: rows that do not begin at a multiple of 1024 bytes come out
// wrong.
template <typename Multiply, typename Sum>
inline void wgmma_by_columns(Sum (&d)[16][4], const uint32_t (&a)[4], WgmmaMatrix b, const Multiply& multiply,
                             simt::Site site) {
  const int lane = static_cast<int>(lane_idx());
  for (int n = 0; n < 16; ++n) {
    const std::byte* row = b.rows + (8 * n + lane % 8) * 128;
    const int swizzle = static_cast<int>(reinterpret_cast<uintptr_t>(row) / 128 % 8);
    uint32_t columns[2];
    ldmatrix_x2(columns, row + ((b.first_chunk + lane / 8 % 2) ^ swizzle) * 16, site);
    multiply(d[n], a, columns);
  }
}

inline void wgmma_m64n128k16_f16(float (&d)[16][4], const uint32_t (&a)[4], WgmmaMatrix b,
                                 simt::Site site = simt::Site::here()) {
  wgmma_by_columns(
      d, a, b, [&](auto& sums, auto& rows, auto& columns) { mma_m16n8k16_f16(sums, rows, columns, site); }, site);
}
inline void wgmma_m64n128k16_bf16(float (&d)[16][4], const uint32_t (&a)[4], WgmmaMatrix b,
                                  simt::Site site = simt::Site::here()) {
  wgmma_by_columns(
      d, a, b, [&](auto& sums, auto& rows, auto& columns) { mma_m16n8k16_bf16(sums, rows, columns, site); }, site);
}
inline void wgmma_m64n128k32_s8(int32_t (&d)[16][4], const uint32_t (&a)[4], WgmmaMatrix b,
                                simt::Site site = simt::Site::here()) {
  wgmma_by_columns(
      d, a, b, [&](auto& sums, auto& rows, auto& columns) { mma_m16n8k32_s8(sums, rows, columns, site); }, site);
}
inline void wgmma_m64n128k32_u8s8(int32_t (&d)[16][4], const uint32_t (&a)[4], WgmmaMatrix b,
                                  simt::Site site = simt::Site::here()) {
  wgmma_by_columns(
      d, a, b, [&](auto& sums, auto& rows, auto& columns) { mma_m16n8k32_u8s8(sums, rows, columns, site); }, site);
}

}  // namespace partita::device
