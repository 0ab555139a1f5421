// Single logits: their order as integers, their weights as the CPU computes them, and how rows are read.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "device/ptx_memory.cuh"
#include "sampling/sampling_kernels.h"

namespace partita::device {

constexpr float kMinusInfinity = -__builtin_huge_valf();
constexpr float kLargestFloat = 3.402823466e+38f;

// NaN and +infinity make a row unusable; -infinity is a token that cannot be drawn.
__device__ __forceinline__ bool is_broken(float x) { return !(x <= kLargestFloat); }

// Unsigned integers in the order of the floats; -0 and +0 are one.
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_order_key(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) ? key & 0x7fffffffu : ~key);
}

// A token's place in the order of sampling, the more likely the smaller: descending logits, then ascending ids.
// Distinct for distinct tokens, below 2^kOrderBits.
constexpr int kOrderBits = 32 + kTokenIdBits;
constexpr uint64_t kLastOrder = ~uint64_t{0};
__device__ __forceinline__ uint64_t order_of(const Candidate& candidate) {
  return static_cast<uint64_t>(~order_key(candidate.logit)) << kTokenIdBits | static_cast<uint32_t>(candidate.id);
}

// e^x for x in [-87, 88], operation by operation that of core/lanes16.h: no product is fused into a sum, so a weight
// has the same bits on every device.
__device__ __forceinline__ float exp_in_range(float x) {
  constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  constexpr int32_t kRoundingShiftBits = 0x4b400000;
  const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896341f), kRoundingShift);
  const float n = __fadd_rn(shifted, -kRoundingShift);
  float r = __fadd_rn(x, -__fmul_rn(n, 0.693359375f));
  r = __fadd_rn(r, -__fmul_rn(n, -2.12194440e-4f));
  float q = __fadd_rn(__fmul_rn(r, 0.0013814539f), 0.008368745f);
  q = __fadd_rn(__fmul_rn(q, r), 0.04166839f);
  q = __fadd_rn(__fmul_rn(q, r), 0.16666521f);
  q = __fadd_rn(__fmul_rn(q, r), 0.49999994f);
  const float e_r = __fadd_rn(__fadd_rn(__fmul_rn(q, __fmul_rn(r, r)), r), 1.0f);
  return __int_as_float(__float_as_int(e_r) +
                        static_cast<int>(static_cast<unsigned>(__float_as_int(shifted) - kRoundingShiftBits) << 23));
}

// Weights relative to the largest logit are integers in units of 2^-43, so that sums of up to 2^20 of them are exact,
// whatever the order of summation. What is lost is 2^-43 of the largest weight per token.
constexpr float kWeightUnits = 8796093022208.0f;  // 2^43
constexpr float kNegligibleExponent = -30.0f;     // e^-30 is less than one unit

struct WeightScale {
  float max;
  float inverse_temperature;
  float min_p;  // lighter tokens weigh nothing
};

__device__ __forceinline__ uint64_t weight_of(float logit, const WeightScale& scale) {
  const float exponent = __fmul_rn(logit - scale.max, scale.inverse_temperature);  // <= 0
  if (exponent < kNegligibleExponent) return 0;
  const float weight = exp_in_range(exponent);
  return weight < scale.min_p ? 0 : static_cast<uint64_t>(weight * kWeightUnits);
}

// The bin of a histogram over logits that starts at the largest one; the last bin is all the rest. Monotone, so bins
// never part equal logits, nor turn two around.
__device__ __forceinline__ int bin_of(float logit, float max, float bins_per_logit) {
  return static_cast<int>(fminf(__fmul_rn(max - logit, bins_per_logit), static_cast<float>(kNumSamplingBins - 1)));
}

// Calls f(logit, id, is_inside) for the logits [begin, end) of a row, by one warp; begin is a multiple of 128. All
// lanes call f equally often, so that it may vote; is_inside is false past the end.
template <int kQuads, typename Function>
__device__ __forceinline__ void for_each_logit(const float* row, int begin, int end, const Function& f) {
  const bool is_aligned = (reinterpret_cast<uintptr_t>(row) & 15) == 0;
  for (int start = begin; start < end; start += kQuads * kSegmentUnit) {
    float x[kQuads][4];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int first = start + q * kSegmentUnit + 4 * static_cast<int>(lane_idx());
      if (is_aligned && first + 4 <= end) {
        const uint4 bits = load_16(row + first);
        x[q][0] = __uint_as_float(bits.x);
        x[q][1] = __uint_as_float(bits.y);
        x[q][2] = __uint_as_float(bits.z);
        x[q][3] = __uint_as_float(bits.w);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          x[q][j] = first + j < end ? __uint_as_float(load_4(row + first + j)) : kMinusInfinity;
      }
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int first = start + q * kSegmentUnit + 4 * static_cast<int>(lane_idx());
#pragma unroll
      for (int j = 0; j < 4; ++j) f(x[q][j], first + j, first + j < end);
    }
  }
}

}  // namespace partita::device
