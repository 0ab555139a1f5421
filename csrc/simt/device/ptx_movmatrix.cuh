// Twin of csrc/device/ptx_movmatrix.cuh.
#pragma once

#include "device/launch.cuh"

namespace partita::device {

inline uint32_t movmatrix_trans(uint32_t row_pair, simt::Site site = simt::Site::here()) {
  const int row = static_cast<int>(lane_idx()) % 4 * 2, column = static_cast<int>(lane_idx()) / 4;
  const int source = row * 4 + column / 2, shift = column % 2 * 16;
  const uint32_t low = __shfl_sync(kFullWarp, row_pair, source, kWarpSize, site) >> shift & 0xffffu;
  const uint32_t high = __shfl_sync(kFullWarp, row_pair, source + 4, kWarpSize, site) >> shift & 0xffffu;
  return low | high << 16;
}

}  // namespace partita::device
