// One logit row of a call: its parameters, its splits, and how it ends.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "sampling/cuda/prefix_cut.cuh"
#include "sampling/sampling_kernels.h"

namespace partita::device {

// What a block works on: blockIdx.y is the logit row, blockIdx.x the split.
struct RowSplit {
  int logit_row;
  int split;
  int row;  // -1: padded
  float* logits;
  const GpuSamplingRow* params;
  int64_t index;  // of this split among all

  __device__ __forceinline__ explicit RowSplit(const SamplingLaunch& launch)
      : logit_row(static_cast<int>(blockIdx.y)), split(static_cast<int>(blockIdx.x)) {
    const SampleGpuParams& call = launch.call;
    row = call.logit_rows[logit_row];
    logits = call.logits + logit_row * call.logits_stride;
    params = reinterpret_cast<const GpuSamplingRow*>(call.rows.records + (row < 0 ? 0 : row) * call.rows.record_bytes);
    index = static_cast<int64_t>(logit_row) * launch.num_splits + split;
  }

  // This warp's segment.
  __device__ __forceinline__ int segment() const {
    return split * kSamplingWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  }
};

struct SegmentRange {
  int begin, end;
};
__device__ __forceinline__ SegmentRange segment_range(const SamplingLaunch& launch, int segment) {
  const int vocab_size = static_cast<int>(launch.call.vocab_size);
  const int64_t begin = static_cast<int64_t>(segment) * launch.segment_length;
  const int64_t end = begin + launch.segment_length;
  return {static_cast<int>(begin < vocab_size ? begin : vocab_size),
          static_cast<int>(end < vocab_size ? end : vocab_size)};
}

// Lists the candidates of a warp's lanes, in any order. All lanes call it.
__device__ __forceinline__ void append_to_list(const SamplingLaunch& launch, int logit_row, bool is_wanted, float logit,
                                               int id) {
  const unsigned wanted = __ballot_sync(kFullWarp, is_wanted);
  if (wanted == 0) return;
  uint32_t position = 0;
  if (lane_idx() == 0)
    position = atomicAdd(&launch.workspace.list_sizes[logit_row], static_cast<uint32_t>(__popc(wanted)));
  position = __shfl_sync(kFullWarp, position, 0) + __popc(wanted & ((1u << lane_idx()) - 1));
  if (is_wanted && position < kListCapacity)
    store_8(launch.workspace.lists + static_cast<int64_t>(logit_row) * kListCapacity + position,
            make_uint2(__float_as_uint(logit), static_cast<uint32_t>(id)));
}

// The row's token is found and nothing reads its logits any more: by all threads of the one block that knows it.
__device__ __forceinline__ void finish_row(const SamplingLaunch& launch, const RowSplit& at, int token) {
  const SampleGpuParams& call = launch.call;
  if (threadIdx.x == 0) {
    call.sampled[at.logit_row] = token;
    const int64_t position = call.num_tokens[at.logit_row];
    if (position >= 0 && position < call.tokens_stride) call.tokens[at.row * call.tokens_stride + position] = token;
  }
  if (!call.features.adjusts) return;
  const GpuTouchedLogit* touched = launch.workspace.touched + at.logit_row * launch.workspace.max_touched;
  const uint32_t num_touched = launch.workspace.num_touched[at.logit_row];
  for (uint32_t i = threadIdx.x; i < num_touched; i += kSamplingThreads) at.logits[touched[i].token] = touched[i].raw;
}

}  // namespace partita::device
