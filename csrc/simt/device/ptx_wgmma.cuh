// Twin of csrc/device/ptx_wgmma.cuh: eight columns at a time through mma.sync. The sums are complete when the call
// returns, but the bytes of B count as read until the wait, and what was written to them must have been fenced. What is
// not checked is the use of the registers of A and D before the wait, and wgmma_fence.
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
inline void wgmma_commit() { simt::read_async_commit(); }
template <int kPending>
inline void wgmma_wait(simt::Site site = simt::Site::here()) {
  simt::read_async_wait(kPending, site);
}
inline void fence_async_proxy(simt::Site site = simt::Site::here()) { simt::fence_async_proxy(site); }

// The swizzle is that of the address, as in hardware: rows that do not begin at a multiple of 1024 bytes come out
// wrong.
template <typename Multiply, typename Sum>
inline void wgmma_by_columns(Sum (&d)[16][4], const uint32_t (&a)[4], WgmmaMatrix b, const Multiply& multiply,
                             simt::Site site) {
  const int lane = static_cast<int>(lane_idx());
  // Of the 128 rows each lane answers for four: the two chunks lie in the same 32 bytes, in this order or the other.
  for (int row = lane; row < 128; row += kWarpSize) {
    const int swizzle = static_cast<int>(reinterpret_cast<uintptr_t>(b.rows + row * 128) / 128 % 8);
    simt::read_async(b.rows + row * 128 + ((b.first_chunk ^ swizzle) & ~1) * 16);
  }
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
