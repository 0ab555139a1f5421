// From sums to what is stored: scales of the channel and the token, bias, gate, residual, conversion.
//
//   value = float(sum - channel_zero * x_sum) * channel_scale * x_scale     in this order, each product rounded
//   out   = value + bias                                        (gated: f(value + bias) * (up value + up bias))
//   out  += what was there                                      (add_to_out)
//   code  = round(out * out_inverse_scale)                      (int8, e4m3: norm/cuda/codes.cuh)
//
// Sums of a token's int8 codes: lanes that hold a row of a tile add theirs by shuffles, one integer atomic for each row
// of a tile. Integers come out alike in every order.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "device/ptx_convert.cuh"
#include "device/ptx_memory.cuh"
#include "gemm/gemm_kernels_gpu.h"
#include "norm/cuda/codes.cuh"

namespace partita::gemm {

constexpr int kVector = 4;  // outputs of a token that a thread finishes at once

template <typename Sum>
struct alignas(16) SumVector {
  Sum values[kVector];
};

__device__ __forceinline__ float gated(GateActivation activation, float gate, float up) {
  if (activation == GateActivation::kSilu) return gate / (1.0f + expf(-gate)) * up;
  const float u = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
  return gate / (1.0f + expf(-2.0f * u)) * up;
}

// Row of the packed matrix that holds output `o`'s gate, when rows are interleaved by eight; its up row is eight on.
__device__ __forceinline__ int64_t interleaved_row(int64_t output) { return output / 8 * 16 + output % 8; }

// One sum of packed row `row` to a value before the bias.
template <WeightScaling kScaling, typename Sum>
__device__ __forceinline__ float scaled_sum(const GemmKernelParams& params, Sum sum, int64_t row, int64_t token) {
  if constexpr (kScaling == WeightScaling::kChannel || kScaling == WeightScaling::kTwoLevel) {
    if (kScaling == WeightScaling::kChannel && params.weight.channel_zero)
      sum -= static_cast<Sum>(params.weight.channel_zero[row]) * static_cast<Sum>(params.x_sum[token]);
    return static_cast<float>(sum) * params.weight.channel_scale[row] * params.x_scale[token];
  } else if constexpr (kScaling == WeightScaling::kGroupSum) {
    return static_cast<float>(sum) * params.x_scale[token];
  } else {
    return static_cast<float>(sum);
  }
}

__device__ __forceinline__ bool is_code_type(DType type) { return type == DType::kI8 || type == DType::kE4M3; }

// The same as codes; returns the sum of the int8 ones.
__device__ __forceinline__ int32_t store_output_codes(const GemmKernelParams& params, const float (&values)[kVector],
                                                      int64_t first, int count, int64_t token) {
  static_assert(kVector == 4);
  int32_t codes[kVector];
  const uint32_t word = four_codes(values, params.out_inverse_scale, params.out_type, codes);
  auto* out = static_cast<uint8_t*>(params.out) + token * params.out_stride + first;
  if (count == kVector && reinterpret_cast<uintptr_t>(out) % 4 == 0) {
    device::store_4(out, word);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) out[i] = static_cast<uint8_t>(word >> 8 * i);
  }
  if (first == 0 && params.out_scale) params.out_scale[token] = params.out_code_scale;
  int32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum += i < count ? codes[i] : 0;
  return sum;
}

// Stores the outputs [first, first + kVector) of a token that exist; returns the sum of their int8 codes, else 0.
__device__ __forceinline__ int32_t store_outputs(const GemmKernelParams& params, float (&values)[kVector],
                                                 int64_t first, int64_t num_outputs, int64_t token) {
  const int64_t offset = token * params.out_stride + first;
  const int count = num_outputs - first < kVector ? static_cast<int>(num_outputs - first) : kVector;
  if (is_code_type(params.out_type)) return store_output_codes(params, values, first, count, token);
  if (params.out_type == DType::kF32) {
    float* out = static_cast<float*>(params.out) + offset;
    if (count == kVector && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
      if (params.add_to_out) {
        const uint4 before = device::load_16(out);
        values[0] += __uint_as_float(before.x), values[1] += __uint_as_float(before.y);
        values[2] += __uint_as_float(before.z), values[3] += __uint_as_float(before.w);
      }
      device::store_16(out, make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                                       __float_as_uint(values[2]), __float_as_uint(values[3])));
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (i < count) out[i] = params.add_to_out ? out[i] + values[i] : values[i];
    }
    return 0;
  }
  const bool is_f16 = params.out_type == DType::kF16;
  uint16_t* out = static_cast<uint16_t*>(params.out) + offset;
  if (count == kVector && reinterpret_cast<uintptr_t>(out) % 8 == 0) {
    device::store_8(out, is_f16 ? make_uint2(device::f32x2_to_f16x2(values[0], values[1]),
                                             device::f32x2_to_f16x2(values[2], values[3]))
                                : make_uint2(device::f32x2_to_bf16x2(values[0], values[1]),
                                             device::f32x2_to_bf16x2(values[2], values[3])));
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) out[i] = is_f16 ? device::f32_to_f16(values[i]) : device::f32_to_bf16(values[i]);
  }
  return 0;
}

// Finishes the outputs of one token from their sums. `load(row_in_tile)` gives SumVector of kVector neighbouring packed
// rows. first_row: of the tile, in the packed matrix. Returns what store_outputs does.
template <WeightScaling kScaling, typename Load>
__device__ __forceinline__ int32_t finish_outputs(const GemmKernelParams& params, int64_t first_row, int vector_idx,
                                                  int64_t token, const Load& load) {
  float values[kVector];
  if (params.gate == GateActivation::kNone) {
    const int64_t row = first_row + vector_idx * kVector;
    if (row >= params.weight.out_features) return 0;
    const auto sums = load(vector_idx * kVector);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int64_t n = row + i < params.weight.out_features ? row + i : params.weight.out_features - 1;
      values[i] = scaled_sum<kScaling>(params, sums.values[i], n, token);
      if (params.bias) values[i] += params.bias[n];
    }
    return store_outputs(params, values, row, params.weight.out_features, token);
  } else {
    const int64_t num_outputs = params.weight.out_features / 2;
    const int first = vector_idx * kVector;  // output in the tile
    const int64_t output = first_row / 2 + first;
    if (output >= num_outputs) return 0;
    const int gate_row = static_cast<int>(interleaved_row(first));
    const auto gates = load(gate_row), ups = load(gate_row + 8);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int64_t o = output + i < num_outputs ? output + i : num_outputs - 1;
      const int64_t row = interleaved_row(o);
      float gate = scaled_sum<kScaling>(params, gates.values[i], row, token);
      float up = scaled_sum<kScaling>(params, ups.values[i], row + 8, token);
      if (params.bias) gate += params.bias[o], up += params.up_bias[o];
      values[i] = gated(params.gate, gate, up);
    }
    return store_outputs(params, values, output, num_outputs, token);
  }
}

}  // namespace partita::gemm
