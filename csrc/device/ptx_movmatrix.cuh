// Transposes an 8x8 matrix of 16-bit elements that a warp holds as mma's fragments: lane l gives elements 2 * (l % 4)
// and 2 * (l % 4) + 1 of row l / 4 (low half first) and receives those of column l / 4. Every lane of the warp executes
// it.
#pragma once

#include "device/launch.cuh"

namespace partita::device {

__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t row_pair) {
  uint32_t column_pair;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column_pair) : "r"(row_pair));
  return column_pair;
}

}  // namespace partita::device
