// Sixteen 32-bit lanes as one value: a kernel body written once, compiled per instruction set.
//
// The lanes are one AVX-512 register, two AVX2 registers or four of the baseline's. The arithmetic of a lane is the
// same IEEE operation in each (the build has -ffp-contract=off), so a kernel written with them gives the same bits on
// every instruction set. (One 64-byte compiler vector for all was tried: GCC splits it through memory, four to eight
// times slower under AVX2.) Everything here is in an anonymous namespace: no translation unit can end up with the code
// that another one compiled for a larger instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // lanes never cross a real call: everything below is inlined
#endif

#define PARTITA_INLINE inline __attribute__((always_inline))

namespace partita {
namespace {

template <typename Half>
struct TwoHalves {
  Half low, high;
};

#if defined(__AVX512F__)
typedef float F32Lanes __attribute__((vector_size(64)));
typedef int32_t I32Lanes __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef float F32Register __attribute__((vector_size(32)));
typedef int32_t I32Register __attribute__((vector_size(32)));
using F32Lanes = TwoHalves<F32Register>;
using I32Lanes = TwoHalves<I32Register>;
#else
typedef float F32Register __attribute__((vector_size(16)));
typedef int32_t I32Register __attribute__((vector_size(16)));
using F32Lanes = TwoHalves<TwoHalves<F32Register> >;
using I32Lanes = TwoHalves<TwoHalves<I32Register> >;
#endif

constexpr int kNumLanes = 16;

// A register's operators are the compiler's own; halves pass them on, one register after the other.
#define PARTITA_LANE_OPERATOR(op)                                                                        \
  template <typename Half>                                                                               \
  PARTITA_INLINE auto operator op(const TwoHalves<Half>& a, const TwoHalves<Half>& b)                    \
      ->TwoHalves<decltype(a.low op b.low)> {                                                            \
    return {a.low op b.low, a.high op b.high};                                                           \
  }                                                                                                      \
  template <typename Half, typename Scalar>                                                              \
  PARTITA_INLINE auto operator op(const TwoHalves<Half>& a, Scalar b)->TwoHalves<decltype(a.low op b)> { \
    return {a.low op b, a.high op b};                                                                    \
  }                                                                                                      \
  template <typename Half>                                                                               \
  PARTITA_INLINE auto operator op(float a, const TwoHalves<Half>& b)->TwoHalves<decltype(a op b.low)> {  \
    return {a op b.low, a op b.high};                                                                    \
  }
PARTITA_LANE_OPERATOR(+)
PARTITA_LANE_OPERATOR(-)
PARTITA_LANE_OPERATOR(*)
PARTITA_LANE_OPERATOR(/)
PARTITA_LANE_OPERATOR(&)
PARTITA_LANE_OPERATOR(<<)
PARTITA_LANE_OPERATOR(<)
PARTITA_LANE_OPERATOR(>)
PARTITA_LANE_OPERATOR(>=)
#undef PARTITA_LANE_OPERATOR

template <typename Half>
PARTITA_INLINE TwoHalves<Half> operator-(const TwoHalves<Half>& a) {
  return {-a.low, -a.high};
}
template <typename Half, typename Other>
PARTITA_INLINE TwoHalves<Half>& operator+=(TwoHalves<Half>& a, const Other& b) {
  return a = a + b;
}

// mask ? a : b, lane by lane; a mask is what a comparison gives.
template <typename Mask, typename Register>
PARTITA_INLINE Register select_lanes(const Mask& mask, const Register& a, const Register& b) {
  return mask ? a : b;
}
template <typename MaskHalf, typename Half>
PARTITA_INLINE TwoHalves<Half> select_lanes(const TwoHalves<MaskHalf>& mask, const TwoHalves<Half>& a,
                                            const TwoHalves<Half>& b) {
  return {select_lanes(mask.low, a.low, b.low), select_lanes(mask.high, a.high, b.high)};
}

// Register by register: a copy of all halves at once would go through memory.
template <typename Register>
PARTITA_INLINE void load_into(Register& lanes, const float* from) {
  __builtin_memcpy(&lanes, from, sizeof lanes);
}
template <typename Half>
PARTITA_INLINE void load_into(TwoHalves<Half>& lanes, const float* from) {
  load_into(lanes.low, from);
  load_into(lanes.high, from + sizeof(Half) / sizeof(float));
}
PARTITA_INLINE F32Lanes load_lanes(const float* from) {
  F32Lanes lanes;
  load_into(lanes, from);
  return lanes;
}

template <typename Register>
PARTITA_INLINE void store_lanes(float* to, const Register& lanes) {
  __builtin_memcpy(to, &lanes, sizeof lanes);
}
template <typename Half>
PARTITA_INLINE void store_lanes(float* to, const TwoHalves<Half>& lanes) {
  store_lanes(to, lanes.low);
  store_lanes(to + sizeof(Half) / sizeof(float), lanes.high);
}

PARTITA_INLINE F32Lanes all_lanes(float value) { return value - F32Lanes{}; }

// The first `count` < 16 lanes; the rest hold `fill`.
PARTITA_INLINE F32Lanes load_first_lanes(const float* from, int64_t count, float fill) {
  float padded[kNumLanes];
  for (int i = 0; i < kNumLanes; ++i) padded[i] = i < count ? from[i] : fill;
  return load_lanes(padded);
}
PARTITA_INLINE void store_first_lanes(float* to, const F32Lanes& lanes, int64_t count) {
  float padded[kNumLanes];
  store_lanes(padded, lanes);
  for (int i = 0; i < count; ++i) to[i] = padded[i];
}

// The same bits as the other element type.
template <typename To, typename From>
PARTITA_INLINE void reinterpret_into(To& to, const From& from) {
  to = reinterpret_cast<To>(from);
}
template <typename To, typename From>
PARTITA_INLINE void reinterpret_into(TwoHalves<To>& to, const TwoHalves<From>& from) {
  reinterpret_into(to.low, from.low);
  reinterpret_into(to.high, from.high);
}
PARTITA_INLINE I32Lanes bits_of(const F32Lanes& lanes) {
  I32Lanes bits;
  reinterpret_into(bits, lanes);
  return bits;
}
PARTITA_INLINE F32Lanes from_bits(const I32Lanes& bits) {
  F32Lanes lanes;
  reinterpret_into(lanes, bits);
  return lanes;
}

// a where a > b, else b: b also where either is NaN.
template <typename Lanes>
PARTITA_INLINE Lanes max_lanes(const Lanes& a, const Lanes& b) {
  return select_lanes(a > b, a, b);
}
template <typename Lanes>
PARTITA_INLINE Lanes min_lanes(const Lanes& a, const Lanes& b) {
  return select_lanes(a < b, a, b);
}

// Always the same tree: lane i meets lane i + 8, then i + 4, i + 2, i + 1.
PARTITA_INLINE float sum_of_lanes(const F32Lanes& lanes) {
  float partial[kNumLanes];
  store_lanes(partial, lanes);
  for (int width = kNumLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) partial[i] += partial[i + width];
  return partial[0];
}

// e^x for x in [-87, 88], within 1 ulp (swept). The argument must lie in that range (NaN gives some finite number).
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
