// Sixteen 32-bit lanes as one value: a kernel body written once, compiled per instruction set.
//
// A 64-byte vector is one AVX-512 register, two AVX2 registers or four SSE ones; the arithmetic of a lane is the same
// IEEE operation in each (the build has -ffp-contract=off), so a kernel written with it gives the same bits on every
// instruction set. Everything here is in an anonymous namespace: no translation unit can end up with the code that
// another one compiled for a larger instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // lanes never cross a real call: everything below is inlined
#endif

namespace partita {
namespace {

typedef float F32Lanes __attribute__((vector_size(64)));
typedef int32_t I32Lanes __attribute__((vector_size(64)));

constexpr int kNumLanes = 16;

#define PARTITA_INLINE inline __attribute__((always_inline))

PARTITA_INLINE F32Lanes load_lanes(const float* from) {
  F32Lanes lanes;
  __builtin_memcpy(&lanes, from, sizeof lanes);
  return lanes;
}
PARTITA_INLINE void store_lanes(float* to, const F32Lanes& lanes) { __builtin_memcpy(to, &lanes, sizeof lanes); }

// The first `count` < 16 lanes; the rest hold `fill`.
PARTITA_INLINE F32Lanes load_first_lanes(const float* from, int64_t count, float fill) {
  F32Lanes lanes = fill - F32Lanes{};
  __builtin_memcpy(&lanes, from, static_cast<size_t>(count) * sizeof(float));
  return lanes;
}
PARTITA_INLINE void store_first_lanes(float* to, const F32Lanes& lanes, int64_t count) {
  __builtin_memcpy(to, &lanes, static_cast<size_t>(count) * sizeof(float));
}

PARTITA_INLINE F32Lanes all_lanes(float value) { return value - F32Lanes{}; }
PARTITA_INLINE I32Lanes all_lanes_i32(int32_t value) { return value - I32Lanes{}; }
PARTITA_INLINE I32Lanes bits_of(const F32Lanes& lanes) { return reinterpret_cast<I32Lanes>(lanes); }
PARTITA_INLINE F32Lanes from_bits(const I32Lanes& lanes) { return reinterpret_cast<F32Lanes>(lanes); }

// a where a > b, else b: b also where either is NaN.
PARTITA_INLINE F32Lanes max_lanes(const F32Lanes& a, const F32Lanes& b) { return a > b ? a : b; }
PARTITA_INLINE F32Lanes min_lanes(const F32Lanes& a, const F32Lanes& b) { return a < b ? a : b; }
PARTITA_INLINE I32Lanes max_lanes(const I32Lanes& a, const I32Lanes& b) { return a > b ? a : b; }

// Always the same tree: lane i meets lane i + 8, then i + 4, i + 2, i + 1.
PARTITA_INLINE float sum_of_lanes(const F32Lanes& lanes) {
  float partial[kNumLanes];
  __builtin_memcpy(partial, &lanes, sizeof lanes);
  for (int width = kNumLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) partial[i] += partial[i + width];
  return partial[0];
}

// e^x for x in [-87, 88], within 1.5 ulp. The argument must lie in that range (NaN gives some finite number).
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r = 1 + r + r^2 q(r), q a degree-4 minimax fit (relative error of e^r 3e-9).
PARTITA_INLINE F32Lanes exp_in_range(const F32Lanes& x) {
  constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  constexpr int32_t kRoundingShiftBits = 0x4b400000;
  const F32Lanes shifted = x * 1.44269504088896341f + kRoundingShift;
  const F32Lanes n = shifted - kRoundingShift;
  F32Lanes r = x - n * 0.693359375f;  // the product is exact: 10 significant bits times at most 8
  r = r - n * -2.12194440e-4f;
  F32Lanes q = r * 0.0013814539f + 0.008368745f;
  q = q * r + 0.04166839f;
  q = q * r + 0.16666521f;
  q = q * r + 0.49999994f;
  const F32Lanes e_r = q * (r * r) + r + 1.0f;
  return from_bits(bits_of(e_r) + ((bits_of(shifted) - kRoundingShiftBits) << 23));
}

}  // namespace
}  // namespace partita
