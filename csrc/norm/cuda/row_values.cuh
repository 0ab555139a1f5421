// A row that one thread block holds: items of eight neighbouring values as fp32, their loads and stores in every row
// type, reductions over the block and the codes of int8 and e4m3. Used by prepare_rows and by the gated activation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "device/launch.cuh"
#include "device/ptx_convert.cuh"
#include "device/ptx_memory.cuh"
#include "norm/cuda/codes.cuh"
#include "norm/norm_gpu.h"

namespace partita::rows {

constexpr int kItemValues = 8;

__device__ __forceinline__ float low_f16(uint32_t pair) { return device::f16_to_f32(static_cast<uint16_t>(pair)); }
__device__ __forceinline__ float high_f16(uint32_t pair) {
  return device::f16_to_f32(static_cast<uint16_t>(pair >> 16));
}
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ void unpack_f32(float (&x)[kItemValues], uint4 low, uint4 high) {
  x[0] = __uint_as_float(low.x), x[1] = __uint_as_float(low.y);
  x[2] = __uint_as_float(low.z), x[3] = __uint_as_float(low.w);
  x[4] = __uint_as_float(high.x), x[5] = __uint_as_float(high.y);
  x[6] = __uint_as_float(high.z), x[7] = __uint_as_float(high.w);
}
__device__ __forceinline__ void unpack_f16(float (&x)[kItemValues], uint4 words) {
  x[0] = low_f16(words.x), x[1] = high_f16(words.x), x[2] = low_f16(words.y), x[3] = high_f16(words.y);
  x[4] = low_f16(words.z), x[5] = high_f16(words.z), x[6] = low_f16(words.w), x[7] = high_f16(words.w);
}
__device__ __forceinline__ void unpack_bf16(float (&x)[kItemValues], uint4 words) {
  x[0] = low_bf16(words.x), x[1] = high_bf16(words.x), x[2] = low_bf16(words.y), x[3] = high_bf16(words.y);
  x[4] = low_bf16(words.z), x[5] = high_bf16(words.z), x[6] = low_bf16(words.w), x[7] = high_bf16(words.w);
}

__device__ __forceinline__ float load_value(const void* row, DType type, int64_t at) {
  if (type == DType::kF32) return static_cast<const float*>(row)[at];
  const uint16_t bits = static_cast<const uint16_t*>(row)[at];
  return type == DType::kF16 ? device::f16_to_f32(bits) : device::bf16_to_f32(bits);
}

// Values [at, at + 8) of a row of f32, f16 or bf16; zeros past its end.  is_vector: the width is a multiple of 8 and
// the row starts at a multiple of 16 bytes.
__device__ __forceinline__ void load_item(float (&x)[kItemValues], const void* row, DType type, int64_t at,
                                          int64_t width, bool is_vector) {
  if (!is_vector) {
#pragma unroll
    for (int j = 0; j < kItemValues; ++j) x[j] = at + j < width ? load_value(row, type, at + j) : 0.0f;
  } else if (type == DType::kF32) {
    const float* from = static_cast<const float*>(row) + at;
    unpack_f32(x, device::load_16(from), device::load_16(from + 4));
  } else {
    const uint4 words = device::load_16(static_cast<const uint16_t*>(row) + at);
    if (type == DType::kF16)
      unpack_f16(x, words);
    else
      unpack_bf16(x, words);
  }
}

// The same of what no kernel writes meanwhile, such as weights.
__device__ __forceinline__ void load_constant_item(float (&x)[kItemValues], const float* row, int64_t at, int64_t width,
                                                   bool is_vector) {
  if (is_vector) {
    unpack_f32(x, device::load_nc_16(row + at), device::load_nc_16(row + at + 4));
  } else {
#pragma unroll
    for (int j = 0; j < kItemValues; ++j) x[j] = at + j < width ? row[at + j] : 0.0f;
  }
}

__device__ __forceinline__ void store_item(const float (&x)[kItemValues], void* row, DType type, int64_t at,
                                           int64_t width, bool is_vector) {
  if (type == DType::kF32) {
    float* to = static_cast<float*>(row) + at;
    if (is_vector) {
      device::store_16(
          to, make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])));
      device::store_16(to + 4, make_uint4(__float_as_uint(x[4]), __float_as_uint(x[5]), __float_as_uint(x[6]),
                                          __float_as_uint(x[7])));
      return;
    }
#pragma unroll
    for (int j = 0; j < kItemValues; ++j)
      if (at + j < width) to[j] = x[j];
    return;
  }
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j)
    words[j] = type == DType::kF16 ? device::f32x2_to_f16x2(x[2 * j], x[2 * j + 1])
                                   : device::f32x2_to_bf16x2(x[2 * j], x[2 * j + 1]);
  uint16_t* to = static_cast<uint16_t*>(row) + at;
  if (is_vector) {
    device::store_16(to, make_uint4(words[0], words[1], words[2], words[3]));
    return;
  }
#pragma unroll
  for (int j = 0; j < kItemValues; ++j)
    if (at + j < width) to[j] = static_cast<uint16_t>(words[j / 2] >> 16 * (j % 2));
}

__device__ __forceinline__ void store_codes(const uint32_t (&words)[2], void* row, int64_t at, int64_t width,
                                            bool is_vector) {
  uint8_t* to = static_cast<uint8_t*>(row) + at;
  if (is_vector) {
    device::store_8(to, make_uint2(words[0], words[1]));
    return;
  }
#pragma unroll
  for (int j = 0; j < kItemValues; ++j)
    if (at + j < width) to[j] = static_cast<uint8_t>(words[j / 4] >> 8 * (j % 4));
}

// ---- reductions over the block; every thread comes, and gets the result. Each has a scratch of its own, so that one
// barrier is enough.

constexpr int kMaxWarps = 32;
struct RowScratch {
  float sums[kMaxWarps];
  uint32_t magnitudes[kMaxWarps];
  int32_t code_sums[kMaxWarps];
};

template <typename T, typename Combine>
__device__ __forceinline__ T reduce_block(T value, T neutral, T (&scratch)[kMaxWarps], Combine combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(device::kFullWarp, value, distance));
  const unsigned lane_idx = threadIdx.x % 32, num_warps = blockDim.x / 32;
  if (num_warps == 1) return value;
  if (lane_idx == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = lane_idx < num_warps ? scratch[lane_idx] : neutral;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(device::kFullWarp, value, distance));
  return value;
}

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// ---- codes

// absmax as the bits of a magnitude: a NaN's are above all numbers' and so reach the scale.
__device__ __forceinline__ uint32_t absmax_bits(const float (&x)[kItemValues]) {
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kItemValues; ++j) bits = larger(bits, __float_as_uint(x[j]) & 0x7fffffffu);
  return bits;
}

struct CodeScale {
  float scale, inverse;
};
__device__ __forceinline__ CodeScale code_scale(uint32_t bits, DType type) {
  const float absmax = __uint_as_float(bits), top = type == DType::kI8 ? 127.0f : 448.0f;
  if (absmax < kMinRowAbsmax) return {0.0f, 0.0f};
  return {absmax / top, top / absmax};
}

// Eight codes, the first in the low byte; returns the sum of the int8 ones. num_values: that lie inside the row.
__device__ __forceinline__ int32_t encode_item(uint32_t (&words)[2], const float (&x)[kItemValues], float inverse,
                                               DType type, int64_t num_values) {
  int32_t sum = 0;
  words[0] = words[1] = 0;
#pragma unroll
  for (int j = 0; j < kItemValues; j += 2) {
    const float first = __fmul_rn(x[j], inverse), second = __fmul_rn(x[j + 1], inverse);
    uint32_t pair;
    if (type == DType::kI8) {
      const auto code = [num_values](float scaled, int j) { return j >= num_values ? 0 : int8_code(scaled); };
      const int a = code(first, j), b = code(second, j + 1);
      sum += a + b;
      pair = (static_cast<uint32_t>(a) & 0xffu) | (static_cast<uint32_t>(b) & 0xffu) << 8;
    } else {
      pair = device::f32x2_to_e4m3x2(first, second);
    }
    words[j / 4] |= pair << 8 * (j % 4);
  }
  return sum;
}

// ---- a row's way out

struct RowTarget {
  std::byte* row;    // of this block
  DType type;        // f32, f16, bf16, int8, e4m3
  float* scales;     // int8, e4m3: [T], or [T, K / group]
  int32_t* sums;     // int8: the same shape, or null
  int64_t group;     // 0, 32, 128
  float code_scale;  // > 0: known beforehand, of every row
};

// Params: has out, out_type, out_stride, out_scale, out_sum and group, as PrepareRowsParams.
template <typename Params>
__device__ __forceinline__ RowTarget target_of(const Params& p) {
  auto* row =
      static_cast<std::byte*>(p.out) + blockIdx.x * p.out_stride * static_cast<int64_t>(dtype_bytes(p.out_type));
  return {row, p.out_type, p.out_scale, p.out_sum, p.group, p.code_scale};
}

// for_each_item(body) calls body(x, at) for each of the thread's items, the same values each time.
template <typename ForEachItem>
__device__ __forceinline__ void emit_row(ForEachItem&& for_each_item, const RowTarget& target, int64_t row_idx,
                                         int64_t width, bool is_vector, RowScratch& scratch) {
  // ---- floats
  if (target.type != DType::kI8 && target.type != DType::kE4M3) {
    for_each_item(
        [&](float (&x)[kItemValues], int64_t at) { store_item(x, target.row, target.type, at, width, is_vector); });
    return;
  }

  // ---- codes with a scale for each group of 4 or 16 lanes
  if (target.group > 0) {
    const int group_lanes = static_cast<int>(target.group) / kItemValues;
    const unsigned lane_idx = threadIdx.x % 32;
    const unsigned mask = ((1u << group_lanes) - 1u) << (lane_idx & ~(group_lanes - 1u));
    for_each_item([&](float (&x)[kItemValues], int64_t at) {
      uint32_t bits = absmax_bits(x);
      for (int distance = 1; distance < group_lanes; distance *= 2)
        bits = larger(bits, __shfl_xor_sync(mask, bits, distance));
      const CodeScale scale = code_scale(bits, target.type);
      uint32_t words[2];
      int32_t sum = encode_item(words, x, scale.inverse, target.type, width - at);
      store_codes(words, target.row, at, width, is_vector);
      for (int distance = 1; distance < group_lanes; distance *= 2) sum += __shfl_xor_sync(mask, sum, distance);
      if (lane_idx % group_lanes == 0) {
        const int64_t group_idx = (row_idx * width + at) / target.group;
        target.scales[group_idx] = scale.scale;
        if (target.sums) target.sums[group_idx] = sum;
      }
    });
    return;
  }

  // ---- codes with the row's scale
  CodeScale scale{target.code_scale, 1.0f / target.code_scale};
  if (!(target.code_scale > 0)) {
    uint32_t bits = 0;
    for_each_item([&](float (&x)[kItemValues], int64_t) { bits = larger(bits, absmax_bits(x)); });
    bits = reduce_block(bits, 0u, scratch.magnitudes, larger);
    scale = code_scale(bits, target.type);
  }
  int32_t sum = 0;
  for_each_item([&](float (&x)[kItemValues], int64_t at) {
    uint32_t words[2];
    sum += encode_item(words, x, scale.inverse, target.type, width - at);
    store_codes(words, target.row, at, width, is_vector);
  });
  if (target.sums) sum = reduce_block(sum, 0, scratch.code_sums, [](int32_t a, int32_t b) { return a + b; });
  if (threadIdx.x == 0) {
    if (target.scales) target.scales[row_idx] = scale.scale;
    if (target.sums) target.sums[row_idx] = sum;
  }
}

}  // namespace partita::rows
