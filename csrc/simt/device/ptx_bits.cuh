// Twin of csrc/device/ptx_bits.cuh.
#pragma once

#include "device/launch.cuh"

namespace partita::device {

template <int kTable>
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(kTable >= 0 && kTable < 256);
  uint32_t d = 0;
  if constexpr ((kTable & 0x01) != 0) d |= ~a & ~b & ~c;
  if constexpr ((kTable & 0x02) != 0) d |= ~a & ~b & c;
  if constexpr ((kTable & 0x04) != 0) d |= ~a & b & ~c;
  if constexpr ((kTable & 0x08) != 0) d |= ~a & b & c;
  if constexpr ((kTable & 0x10) != 0) d |= a & ~b & ~c;
  if constexpr ((kTable & 0x20) != 0) d |= a & ~b & c;
  if constexpr ((kTable & 0x40) != 0) d |= a & b & ~c;
  if constexpr ((kTable & 0x80) != 0) d |= a & b & c;
  return d;
}

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | uint64_t{b} << 32;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i);
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 0xffu;
    if ((nibble & 8) != 0) byte = (byte & 0x80u) != 0 ? 0xffu : 0u;
    d |= byte << (8 * i);
  }
  return d;
}

inline uint32_t shf_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}

inline int32_t dp4a_s8(uint32_t a, uint32_t b, int32_t c) {
  uint32_t sum = static_cast<uint32_t>(c);
  for (int i = 0; i < 4; ++i)
    sum += static_cast<uint32_t>(static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i)));
  return static_cast<int32_t>(sum);
}

inline int32_t dp4a_u8s8(uint32_t a, uint32_t b, int32_t c) {
  uint32_t sum = static_cast<uint32_t>(c);
  for (int i = 0; i < 4; ++i)
    sum += static_cast<uint32_t>(static_cast<uint8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i)));
  return static_cast<int32_t>(sum);
}

}  // namespace partita::device
