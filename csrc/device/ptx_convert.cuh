// Conversions between fp32, fp16, bf16 and e4m3. 16-bit numbers are raw bits; of a packed pair `lo` lies in the low
// half. Rounding is to nearest even.
#pragma once

#include "device/e4m3_bits.cuh"
#include "device/launch.cuh"

namespace partita::device {

__device__ __forceinline__ uint32_t f32x2_to_f16x2(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

__device__ __forceinline__ uint32_t f32x2_to_bf16x2(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

__device__ __forceinline__ uint16_t f32_to_f16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ uint16_t f32_to_bf16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float f16_to_f32(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ float bf16_to_f32(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Two e4m3 codes, low byte first. NaN stays NaN.
__device__ __forceinline__ uint32_t e4m3x2_to_f16x2(uint16_t codes) {
  uint32_t packed;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(packed) : "h"(codes));
#else
  // The multiplication by 2^8 is exact.
  const uint32_t scaled = e4m3_high_bytes_to_scaled_f16x2((codes & 0xffu) << 8 | (codes & 0xff00u) << 16);
  asm("mul.f16x2 %0, %1, %2;" : "=r"(packed) : "r"(scaled), "r"(0x5c005c00u));
#endif
  return packed;
}

// Low byte first. What is too large becomes +-448, NaN becomes NaN.
__device__ __forceinline__ uint16_t f32x2_to_e4m3x2(float lo, float hi) {
#if __CUDA_ARCH__ >= 890
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(hi), "f"(lo));
  return codes;
#else
  const auto code = [](float value) -> uint32_t {
    const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
    uint32_t rounded;
    if (magnitude > 0x7f800000u)
      rounded = 0x7f;
    else if (magnitude >= 0x43e00000u)  // 448
      rounded = 0x7e;
    else if (magnitude < 0x3c800000u)  // below 2^-6: the addition rounds to multiples of 2^-9
      rounded = __float_as_uint(__uint_as_float(magnitude) + 16384.0f) - __float_as_uint(16384.0f);
    else
      rounded = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
    return rounded | (bits >> 24 & 0x80u);
  };
  return static_cast<uint16_t>(code(lo) | code(hi) << 8);
#endif
}

}  // namespace partita::device
