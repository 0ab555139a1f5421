// Twin of csrc/device/ptx_ldmatrix.cuh.
#pragma once

#include "device/launch.cuh"

namespace partita::device {

template <int kNumMatrices, bool kIsTransposed>
inline void ldmatrix(uint32_t (&r)[kNumMatrices], const void* shared_row, simt::Site site) {
  const auto loaded = simt::ldmatrix(kNumMatrices, kIsTransposed, shared_row, site);
  for (int i = 0; i < kNumMatrices; ++i) r[i] = loaded.at[i];
}

inline void ldmatrix_x1(uint32_t (&r)[1], const void* shared_row, simt::Site site = simt::Site::here()) {
  ldmatrix<1, false>(r, shared_row, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row, simt::Site site = simt::Site::here()) {
  ldmatrix<2, false>(r, shared_row, site);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, simt::Site site = simt::Site::here()) {
  ldmatrix<4, false>(r, shared_row, site);
}
inline void ldmatrix_x1_trans(uint32_t (&r)[1], const void* shared_row, simt::Site site = simt::Site::here()) {
  ldmatrix<1, true>(r, shared_row, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row, simt::Site site = simt::Site::here()) {
  ldmatrix<2, true>(r, shared_row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, simt::Site site = simt::Site::here()) {
  ldmatrix<4, true>(r, shared_row, site);
}

}  // namespace partita::device
