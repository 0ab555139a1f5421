// Bit and byte permutations, and the byte dot products of the integer unit.
#pragma once

#include "device/launch.cuh"

namespace partita::device {

// Any function of three bits: kTable is its value at a = 0xf0, b = 0xcc, c = 0xaa; (a & b) | c is (0xf0 & 0xcc) | 0xaa.
template <int kTable>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(kTable >= 0 && kTable < 256);
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// Byte i of the result is byte (selector >> 4 * i) & 7 of b:a (0..3 are a's); with bit 3 of the nibble, its sign
// spread.
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// The low word of high:low >> (shift & 31).
__device__ __forceinline__ uint32_t shf_r(uint32_t low, uint32_t high, uint32_t shift) {
  uint32_t d;
  asm("shf.r.wrap.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(shift));
  return d;
}

// c + sum of a[i] * b[i] over four bytes.
__device__ __forceinline__ int32_t dp4a_s8(uint32_t a, uint32_t b, int32_t c) {
  int32_t d;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// `a` unsigned, `b` signed.
__device__ __forceinline__ int32_t dp4a_u8s8(uint32_t a, uint32_t b, int32_t c) {
  int32_t d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

}  // namespace partita::device
