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

// A sum of products times params.score_scale -> its score.
__device__ __forceinline__ float finish_score(const AttendKernelParams& params, float scaled) {
  return params.score_cap > 0 ? soft_capped(scaled, params.score_cap) : scaled;
}

}  // namespace partita
