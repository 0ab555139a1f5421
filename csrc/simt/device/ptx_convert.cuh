// Twin of csrc/device/ptx_convert.cuh.
#pragma once

#include "device/launch.cuh"
#include "simt/number_formats.h"

namespace partita::device {

inline uint16_t f32_to_f16(float value) { return simt::f16_from_float(value); }
inline uint16_t f32_to_bf16(float value) { return simt::bf16_from_float(value); }
inline float f16_to_f32(uint16_t bits) { return simt::float_from_f16(bits); }
inline float bf16_to_f32(uint16_t bits) { return simt::float_from_bf16(bits); }

inline uint32_t f32x2_to_f16x2(float lo, float hi) { return f32_to_f16(lo) | uint32_t{f32_to_f16(hi)} << 16; }
inline uint32_t f32x2_to_bf16x2(float lo, float hi) { return f32_to_bf16(lo) | uint32_t{f32_to_bf16(hi)} << 16; }
inline uint32_t e4m3x2_to_f16x2(uint16_t codes) {
  return simt::f16_from_e4m3(static_cast<uint8_t>(codes)) |
         uint32_t{simt::f16_from_e4m3(static_cast<uint8_t>(codes >> 8))} << 16;
}
inline uint16_t f32x2_to_e4m3x2(float lo, float hi) {
  return static_cast<uint16_t>(simt::e4m3_from_float(lo) | simt::e4m3_from_float(hi) << 8);
}

}  // namespace partita::device
