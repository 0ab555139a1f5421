// From a value over its scale to the code that is stored: the one rounding that rows (row_values.cuh) and the epilogues
// of matmuls share, so that a code does not depend on who made it.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "device/launch.cuh"
#include "device/ptx_convert.cuh"

namespace partita {

// Rounded to nearest even, held to -128..127; -128 for NaN.
__device__ __forceinline__ int32_t int8_code(float scaled) {
  return __float2int_rn(fminf(fmaxf(scaled, -128.0f), 127.0f));
}

// Four codes, the first in the low byte. codes: the int8 ones as numbers, zeros for e4m3, which is held to +-448 and
// keeps NaN.
__device__ __forceinline__ uint32_t four_codes(const float (&values)[4], float inverse_scale, DType type,
                                               int32_t (&codes)[4]) {
  float scaled[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) scaled[i] = __fmul_rn(values[i], inverse_scale);
  if (type == DType::kE4M3) {
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = 0;
    return device::f32x2_to_e4m3x2(scaled[0], scaled[1]) |
           static_cast<uint32_t>(device::f32x2_to_e4m3x2(scaled[2], scaled[3])) << 16;
  }
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    codes[i] = int8_code(scaled[i]);
    word |= (static_cast<uint32_t>(codes[i]) & 0xffu) << 8 * i;
  }
  return word;
}

}  // namespace partita
