// Twin of csrc/device/ptx_half.cuh.
#pragma once

#include "device/launch.cuh"
#include "simt/number_formats.h"

namespace partita::device {

template <uint16_t (*kOperation)(uint16_t, uint16_t)>
inline uint32_t on_pairs(uint32_t a, uint32_t b) {
  return kOperation(static_cast<uint16_t>(a), static_cast<uint16_t>(b)) |
         uint32_t{kOperation(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16))} << 16;
}
template <uint16_t (*kOperation)(uint16_t, uint16_t, uint16_t)>
inline uint32_t on_pairs(uint32_t a, uint32_t b, uint32_t c) {
  return kOperation(static_cast<uint16_t>(a), static_cast<uint16_t>(b), static_cast<uint16_t>(c)) |
         uint32_t{
             kOperation(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16), static_cast<uint16_t>(c >> 16))}
             << 16;
}

inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) { return on_pairs<simt::fma_f16>(a, b, c); }
inline uint32_t add_f16x2(uint32_t a, uint32_t b) { return on_pairs<simt::add_f16>(a, b); }
inline uint32_t sub_f16x2(uint32_t a, uint32_t b) { return on_pairs<simt::sub_f16>(a, b); }
inline uint32_t mul_f16x2(uint32_t a, uint32_t b) { return on_pairs<simt::mul_f16>(a, b); }
inline uint32_t min_f16x2(uint32_t a, uint32_t b) { return on_pairs<simt::min_f16>(a, b); }
inline uint32_t max_f16x2(uint32_t a, uint32_t b) { return on_pairs<simt::max_f16>(a, b); }

inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) { return on_pairs<simt::fma_bf16>(a, b, c); }
inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(a, b, 0x80008000u); }
inline uint32_t add_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(a, 0x3f803f80u, b); }
inline uint32_t sub_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(b, 0xbf80bf80u, a); }
inline uint32_t min_bf16x2(uint32_t a, uint32_t b) { return on_pairs<simt::min_bf16>(a, b); }
inline uint32_t max_bf16x2(uint32_t a, uint32_t b) { return on_pairs<simt::max_bf16>(a, b); }

}  // namespace partita::device
