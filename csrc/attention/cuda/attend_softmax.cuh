// Scores in units of log2: what a sum of products becomes before the softmax.
#pragma once

#include "attention/cuda/attend_rows.cuh"
#include "device/ptx_math.cuh"

namespace partita {

// cap * tanh(x) without the coarse tanh of the special function unit, whose error a cap of 50 would make 0.02.
__device__ __forceinline__ float soft_capped(float x_over_cap, float cap) {
  const float e = device::ex2_approx(x_over_cap * (2.0f * kLog2E));
  return cap - 2.0f * cap * device::rcp_approx(1.0f + e);
}

struct ScoreScale {
  float scale;     // of sums of products, to what soft_cap or the softmax takes
  float soft_cap;  // in units of log2; 0: none

  __device__ __forceinline__ explicit ScoreScale(const AttendKernelParams& params)
      : scale(params.soft_cap > 0 ? params.scale / params.soft_cap : params.scale * kLog2E),
        soft_cap(params.soft_cap * kLog2E) {}
  __device__ __forceinline__ float finish(float scaled) const {
    return soft_cap > 0 ? soft_capped(scaled, soft_cap) : scaled;
  }
};

}  // namespace partita
