// Query and output rows in global memory, and one output row as a warp holds it.
#pragma once

#include "attention/attend_gpu_kernels.h"
#include "device/ptx_convert.cuh"
#include "device/ptx_memory.cuh"

namespace partita {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNegativeInfinity = -__builtin_huge_valf();

__device__ __forceinline__ float load_row_element(const void* rows, DType type, int64_t index) {
  if (type == DType::kF32) return static_cast<const float*>(rows)[index];
  const uint16_t bits = static_cast<const uint16_t*>(rows)[index];
  return type == DType::kF16 ? device::f16_to_f32(bits) : device::bf16_to_f32(bits);
}

__device__ __forceinline__ void store_row_element(void* rows, DType type, int64_t index, float value) {
  if (type == DType::kF32)
    static_cast<float*>(rows)[index] = value;
  else
    static_cast<uint16_t*>(rows)[index] = type == DType::kF16 ? device::f32_to_f16(value) : device::f32_to_bf16(value);
}

// Two neighbours, the first at an even index of rows that are aligned for it.
__device__ __forceinline__ void store_row_pair(void* rows, DType type, int64_t index, float first, float second) {
  if (type == DType::kF32)
    device::store_8(static_cast<float*>(rows) + index, make_uint2(__float_as_uint(first), __float_as_uint(second)));
  else
    device::store_4(static_cast<uint16_t*>(rows) + index, type == DType::kF16 ? device::f32x2_to_f16x2(first, second)
                                                                              : device::f32x2_to_bf16x2(first, second));
}

// The orthonormal block Hadamard transform of a row of which lane l holds elements l * kPerLane ... Its own inverse.
// block: a power of two, at most 32 * kPerLane.
template <int kPerLane>
__device__ __forceinline__ void rotate_row(float (&x)[kPerLane], int block) {
  const int lane = static_cast<int>(device::lane_idx());
#pragma unroll
  for (int stride = 1; stride < kPerLane; stride *= 2) {
    if (stride >= block) break;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i & stride) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
  for (int stride = 1; stride * kPerLane < block; stride *= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float other = __shfl_xor_sync(device::kFullWarp, x[i], stride);
      x[i] = lane & stride ? other - x[i] : x[i] + other;
    }
  }
  const float norm = 1.0f / sqrtf(static_cast<float>(block));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] *= norm;
}

// A finished row: turned back if V was rotated, and stored. x: as rotate_row; sum: of the softmax's weights, 0 where
// the row saw nothing.
template <int kPerLane>
__device__ __forceinline__ void store_out_row(const AttendKernelParams& params, int64_t token, int head,
                                              float (&x)[kPerLane], float sum) {
  const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] *= inverse;
  if (params.v_rotation > 0) rotate_row<kPerLane>(x, params.v_rotation);
  const int first = static_cast<int>(device::lane_idx()) * kPerLane;
  const int64_t row = token * params.out_stride + int64_t{head} * params.head_dim;
#pragma unroll
  for (int i = 0; i < kPerLane; i += 2)
    if (first + i < params.head_dim) store_row_pair(params.out, params.out_type, row + first + i, x[i], x[i + 1]);
}

// An unfinished row, for attend_merge.
template <int kPerLane>
__device__ __forceinline__ void store_partial_row(const AttendKernelParams& params, int64_t partial_row,
                                                  const float (&x)[kPerLane], float max, float sum) {
  const int lane = static_cast<int>(device::lane_idx());
#pragma unroll
  for (int i = 0; i < kPerLane; i += 2)
    if (lane * kPerLane + i < params.head_dim)
      store_row_pair(params.partial_out, DType::kF32, partial_row * params.head_dim + lane * kPerLane + i, x[i],
                     x[i + 1]);
  if (lane == 0) store_row_pair(params.partial_sums, DType::kF32, partial_row * 2, max, sum);
}

}  // namespace partita
