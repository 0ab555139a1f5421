// Sums over a block, and the last block of a row to be done.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "device/ptx_memory.cuh"
#include "sampling/sampling_kernels.h"

namespace partita::device {

__device__ __forceinline__ uint64_t warp_sum(uint64_t value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

struct BlockSumStorage {
  uint64_t warp_sums[kSamplingWarps];
};

struct PrefixSum {
  uint64_t before;  // the sum over the threads before this one
  uint64_t total;
};

// To be called by all threads; storage may be used again after the caller's next barrier.
__device__ __forceinline__ PrefixSum block_prefix_sum(BlockSumStorage& storage, uint64_t value) {
  const unsigned lane = lane_idx();
  const unsigned warp = threadIdx.x / kWarpSize;
  uint64_t through = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t left = __shfl_up_sync(kFullWarp, through, distance);
    if (lane >= static_cast<unsigned>(distance)) through += left;
  }
  if (lane == 31) storage.warp_sums[warp] = through;
  __syncthreads();
  uint64_t before = 0, total = 0;
#pragma unroll
  for (unsigned w = 0; w < kSamplingWarps; ++w) {
    const uint64_t sum = storage.warp_sums[w];
    if (w < warp) before += sum;
    total += sum;
  }
  return {before + through - value, total};
}

// Whether this block is the row's last: then it sees what the others wrote. To be called by all threads, once.
__device__ __forceinline__ bool is_last_block(uint32_t* ticket, int num_blocks, uint32_t* is_last) {
  __syncthreads();  // orders global memory only
  if (threadIdx.x == 0) {
    *is_last = add_acquire_release_u32(ticket, 1) == static_cast<uint32_t>(num_blocks - 1);
    if (*is_last) *ticket = 0;
  }
  __syncthreads();
  return *is_last != 0;
}

}  // namespace partita::device
