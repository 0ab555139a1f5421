// e4m3 codes shifted into halves: what there is instead of a conversion before 8.9, and faster than it where a power of
// two may be left in the product. Plain arithmetic, so both worlds share this file.
#pragma once

#include "device/launch.cuh"

namespace partita::device {

// The codes in the high byte of either half of `word`, as f16x2 of their values times 2^-8; low bytes are ignored.
// Sign, exponent and mantissa fall into place one bit below the code's own, subnormals included; the factor is the
// difference of the exponents' biases. The NaN codes 0x7f and 0xff alone carry into bit 14 when a unit of the last
// place is added: that bit makes a NaN (0x7f80) of what would be 480 * 2^-8. Two of the five instructions are for it.
__device__ __forceinline__ uint32_t e4m3_high_bytes_to_scaled_f16x2(uint32_t word) {
  const uint32_t magnitude = (word >> 1) & 0x3f803f80u;
  return (word & 0x80008000u) | magnitude | ((magnitude + 0x00800080u) & 0x40004000u);
}

}  // namespace partita::device
