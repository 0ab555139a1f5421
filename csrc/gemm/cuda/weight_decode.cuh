// From a lane's packed vector to the registers of an MMA fragment, one struct for each packed layout; and the MMA that
// the fragment goes into. gemm_tile.cuh is the schedule around them.
//
// A decoder says
//   kActivations, kCodeBits, kScaling, Sum            what it multiplies, and the type of the accumulators
//   Parameters, Uniform                               per channel of a fragment and group; per launch
//   read_parameters()                                 of the 2 * kFragments channels of a lane, from shared memory
//   decode()                                          fragment of one K step of a vector
//   multiply()                                        sums += fragment * activations
#pragma once

#include <cstdint>

#include "device/ptx_bits.cuh"
#include "device/ptx_convert.cuh"
#include "device/ptx_half.cuh"
#include "device/ptx_mma.cuh"
#include "gemm/fragment_layout.h"
#include "gemm/gemm_kernels_gpu.h"

namespace partita::gemm {

template <int kWords>
__device__ __forceinline__ void load_words(const void* shared, uint32_t (&words)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords % 4 == 0);
  if constexpr (kWords == 1) {
    words[0] = *static_cast<const uint32_t*>(shared);
  } else if constexpr (kWords == 2) {
    const uint2 v = *static_cast<const uint2*>(shared);
    words[0] = v.x, words[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 v = static_cast<const uint4*>(shared)[i];
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  }
}

__device__ __forceinline__ uint32_t low_twice(uint32_t pair) { return device::prmt(pair, 0, 0x1010); }
__device__ __forceinline__ uint32_t high_twice(uint32_t pair) { return device::prmt(pair, 0, 0x3232); }

constexpr uint32_t kMinusZeros = 0x80008000u;  // x * s + -0 is x * s, also where that is -0
constexpr int kLop3AndOr = (0xf0 & 0xcc) | 0xaa;

// Arithmetic of the two 16-bit types under one name.
template <GpuActivations>
struct Half;

template <>
struct Half<GpuActivations::kF16> {
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) { return device::add_f16x2(a, b); }
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return device::fma_f16x2(a, b, c);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    device::mma_m16n8k16_f16(d, a, b);
  }
};

template <>
struct Half<GpuActivations::kBF16> {
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) { return device::add_bf16x2(a, b); }
  static __device__ __forceinline__ uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return device::fma_bf16x2(a, b, c);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    device::mma_m16n8k16_bf16(d, a, b);
  }
};

// ---- 16-bit activations

// Plain 16-bit elements.
template <GpuActivations kType>
struct PlainElements {
  static constexpr GpuActivations kActivations = kType;
  static constexpr int kCodeBits = 16;
  static constexpr WeightScaling kScaling = WeightScaling::kNone;
  static constexpr bool kMultipliesScale = false;
  using Sum = float;
  struct Parameters {};
  struct Uniform {};
  static __device__ __forceinline__ Uniform make_uniform(const PackedWeightView&) { return {}; }
  static __device__ __forceinline__ void decode(const uint32_t (&vector)[4], int, const Parameters (&)[2],
                                                const Uniform&, uint32_t (&a)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = vector[r];
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                  const Parameters (&)[2]) {
    Half<kType>::mma(d, a, b);
  }
};

// Codes of a group: element = fma(code + bias, scale, addend), where code + bias is the exact integer code - zero and
// the fma rounds once. `bias` holds the zero and what the integer-to-float pattern added; `addend` the min, or -0.
// An entry in memory is the scale alone, or a pair with -(pattern + zero) or the min in its upper half.
struct GroupUniform {
  bool has_pairs, is_min;
  uint32_t bias[2];  // of row group and row group + 8
};

template <GpuActivations kType, int kBits>
struct GroupCodes;

template <int kFragments, typename Parameters>
__device__ __forceinline__ void read_group_parameters(const std::byte* entries, int first_fragment,
                                                      const GroupUniform& uniform,
                                                      Parameters (&parameters)[kFragments][2]) {
  if (uniform.has_pairs) {
    uint32_t words[2 * kFragments];
    load_words(entries + first_fragment * 8, words);
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t word = words[2 * f + r], upper = high_twice(word);
        parameters[f][r].scale = low_twice(word);
        parameters[f][r].bias = uniform.is_min ? uniform.bias[r] : upper;
        parameters[f][r].addend = uniform.is_min ? upper : kMinusZeros;
      }
  } else {
    uint32_t words[kFragments];
    load_words(entries + first_fragment * 4, words);
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        parameters[f][r].scale = r == 0 ? low_twice(words[f]) : high_twice(words[f]);
        parameters[f][r].bias = uniform.bias[r];
        parameters[f][r].addend = kMinusZeros;
      }
  }
}

struct GroupParameters {
  uint32_t scale, bias, addend;
};

template <GpuActivations kType>
__device__ __forceinline__ uint32_t twice(float value) {
  return kType == GpuActivations::kF16 ? device::f32x2_to_f16x2(value, value) : device::f32x2_to_bf16x2(value, value);
}

template <GpuActivations kType>
struct GroupCodes<kType, 4> {
  static constexpr GpuActivations kActivations = kType;
  static constexpr int kCodeBits = 4;
  static constexpr WeightScaling kScaling = WeightScaling::kGroup;
  static constexpr bool kMultipliesScale = false;
  using Sum = float;
  using Parameters = GroupParameters;
  using Uniform = GroupUniform;

  static __device__ __forceinline__ Uniform make_uniform(const PackedWeightView& weight) {
    const float zero = static_cast<float>(weight.common_zero);
    Uniform u{weight.offset != GroupOffset::kCommonZero, weight.offset == GroupOffset::kMin, {0, 0}};
    u.bias[0] = twice<kType>(-zero - kFirstPattern);
    u.bias[1] = twice<kType>(-zero - kSecondPattern);
    return u;
  }
  template <int kFragments>
  static __device__ __forceinline__ void read_parameters(const std::byte* entries, int first_fragment,
                                                         const Uniform& uniform, Parameters (&p)[kFragments][2]) {
    read_group_parameters<kFragments>(entries, first_fragment, uniform, p);
  }
  static __device__ __forceinline__ void decode(const uint32_t (&vector)[4], int step, const Parameters (&p)[2],
                                                const Uniform&, uint32_t (&a)[4]) {
    const uint32_t word = vector[step];
    if constexpr (kType == GpuActivations::kF16) {
      // 0x6400 | n is 1024 + n; a nibble four bits up under 0x5400 is 64 + n.
      const uint32_t upper = word >> 8;
      a[0] = device::lop3<kLop3AndOr>(word, 0x000f000fu, 0x64006400u);
      a[1] = device::lop3<kLop3AndOr>(word, 0x00f000f0u, 0x54005400u);
      a[2] = device::lop3<kLop3AndOr>(upper, 0x000f000fu, 0x64006400u);
      a[3] = device::lop3<kLop3AndOr>(upper, 0x00f000f0u, 0x54005400u);
    } else {
      // 0x4300 | n is 128 + n; seven bits of mantissa leave no room for the nibble four bits up.
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = device::lop3<kLop3AndOr>(word >> (4 * r), 0x000f000fu, 0x43004300u);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
      a[r] = Half<kType>::fma(Half<kType>::add(a[r], p[r & 1].bias), p[r & 1].scale, p[r & 1].addend);
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                  const Parameters (&)[2]) {
    Half<kType>::mma(d, a, b);
  }

  // What the exponent patterns add to a nibble: registers of row group, of row group + 8.
  static constexpr float kFirstPattern = kType == GpuActivations::kF16 ? 1024.0f : 128.0f;
  static constexpr float kSecondPattern = kType == GpuActivations::kF16 ? 64.0f : 128.0f;
};

template <>
struct GroupCodes<GpuActivations::kF16, 8> {
  static constexpr GpuActivations kActivations = GpuActivations::kF16;
  static constexpr int kCodeBits = 8;
  static constexpr WeightScaling kScaling = WeightScaling::kGroup;
  static constexpr bool kMultipliesScale = false;
  using Sum = float;
  using Parameters = GroupParameters;
  using Uniform = GroupUniform;

  static __device__ __forceinline__ Uniform make_uniform(const PackedWeightView& weight) {
    const uint32_t bias = twice<kActivations>(-1024.0f - static_cast<float>(weight.common_zero));
    return {weight.offset != GroupOffset::kCommonZero, weight.offset == GroupOffset::kMin, {bias, bias}};
  }
  template <int kFragments>
  static __device__ __forceinline__ void read_parameters(const std::byte* entries, int first_fragment,
                                                         const Uniform& uniform, Parameters (&p)[kFragments][2]) {
    read_group_parameters<kFragments>(entries, first_fragment, uniform, p);
  }
  static __device__ __forceinline__ void decode(const uint32_t (&vector)[4], int step, const Parameters (&p)[2],
                                                const Uniform&, uint32_t (&a)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t bytes =
          device::prmt(vector[2 * step + r / 2], 0x64646464u, r % 2 ? 0x4342u : 0x4140u);  // 1024 + n
      a[r] = device::fma_f16x2(device::add_f16x2(bytes, p[r & 1].bias), p[r & 1].scale, p[r & 1].addend);
    }
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                  const Parameters (&)[2]) {
    device::mma_m16n8k16_f16(d, a, b);
  }
};

// A byte does not fit under a bf16 exponent beside the hidden bit: 0x4700 with the byte next to it is 32768 + n in
// fp32, where the zero is subtracted; the integer, at most eight bits and a sign, is then exact in bf16.
template <>
struct GroupCodes<GpuActivations::kBF16, 8> {
  static constexpr GpuActivations kActivations = GpuActivations::kBF16;
  static constexpr int kCodeBits = 8;
  static constexpr WeightScaling kScaling = WeightScaling::kGroup;
  static constexpr bool kMultipliesScale = false;
  using Sum = float;
  struct Parameters {
    uint32_t scale, bias, addend;  // bias: fp32 bits
  };
  using Uniform = GroupUniform;

  static __device__ __forceinline__ Uniform make_uniform(const PackedWeightView& weight) {
    const uint32_t bias = __float_as_uint(-32768.0f - static_cast<float>(weight.common_zero));
    return {weight.offset != GroupOffset::kCommonZero, weight.offset == GroupOffset::kMin, {bias, bias}};
  }
  template <int kFragments>
  static __device__ __forceinline__ void read_parameters(const std::byte* entries, int first_fragment,
                                                         const Uniform& uniform, Parameters (&p)[kFragments][2]) {
    read_group_parameters<kFragments>(entries, first_fragment, uniform, p);
    if (uniform.has_pairs && !uniform.is_min) {
      // The upper half of the pair was -zero in bf16.
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          p[f][r].bias = __float_as_uint(__uint_as_float(p[f][r].bias & 0xffff0000u) - 32768.0f);
    }
  }
  static __device__ __forceinline__ void decode(const uint32_t (&vector)[4], int step, const Parameters (&p)[2],
                                                const Uniform&, uint32_t (&a)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t word = vector[2 * step + r / 2];
      const float bias = __uint_as_float(p[r & 1].bias);
      const float lo = __uint_as_float(device::prmt(word, 0x47000000u, r % 2 ? 0x7424u : 0x7404u)) + bias;
      const float hi = __uint_as_float(device::prmt(word, 0x47000000u, r % 2 ? 0x7434u : 0x7414u)) + bias;
      a[r] = device::fma_bf16x2(device::f32x2_to_bf16x2(lo, hi), p[r & 1].scale, p[r & 1].addend);
    }
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                  const Parameters (&)[2]) {
    device::mma_m16n8k16_bf16(d, a, b);
  }
};

// ---- int8 activations: exact integer sums

// Signed bytes, one scale per channel.
struct SignedBytes {
  static constexpr GpuActivations kActivations = GpuActivations::kInt8;
  static constexpr int kCodeBits = 8;
  static constexpr WeightScaling kScaling = WeightScaling::kChannel;
  static constexpr bool kMultipliesScale = false;
  using Sum = int32_t;
  struct Parameters {};
  struct Uniform {};
  static __device__ __forceinline__ Uniform make_uniform(const PackedWeightView&) { return {}; }
  static __device__ __forceinline__ void decode(const uint32_t (&vector)[4], int, const Parameters (&)[2],
                                                const Uniform&, uint32_t (&a)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = vector[r];
  }
  static __device__ __forceinline__ void multiply(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                  const Parameters (&)[2]) {
    device::mma_m16n8k32_s8(d, a, b);
  }
};

// Signed bytes with an fp32 scale for each 32 inputs, which is one K step: its integer sum is taken to fp32 and scaled.
// The MMA starts at 2^23 + 2^22 as an integer's bits: with |sum| < 2^22 its result read as a float is that plus the
// sum, which saves the conversion, an instruction of a quarter of the rate.
struct SignedBytesInGroups {
  static constexpr GpuActivations kActivations = GpuActivations::kInt8;
  static constexpr int kCodeBits = 8;
  static constexpr WeightScaling kScaling = WeightScaling::kGroupSum;
  static constexpr bool kMultipliesScale = true;
  using Sum = float;
  struct Parameters {
    float scale;
  };
  struct Uniform {};
  static __device__ __forceinline__ Uniform make_uniform(const PackedWeightView&) { return {}; }
  template <int kFragments>
  static __device__ __forceinline__ void read_parameters(const std::byte* entries, int first_fragment, const Uniform&,
                                                         Parameters (&p)[kFragments][2]) {
    uint32_t words[2 * kFragments];
    load_words(entries + first_fragment * 8, words);
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int r = 0; r < 2; ++r) p[f][r].scale = __uint_as_float(words[2 * f + r]);
  }
  static __device__ __forceinline__ void decode(const uint32_t (&vector)[4], int, const Parameters (&)[2],
                                                const Uniform&, uint32_t (&a)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = vector[r];
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                  const Parameters (&p)[2]) {
    constexpr int32_t kStart = 0x4b400000;
    int32_t sums[4] = {kStart, kStart, kStart, kStart};
    device::mma_m16n8k32_s8(sums, a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = fmaf(__int_as_float(sums[i]) - 12582912.0f, p[i / 2].scale, d[i]);
  }
};

__device__ __forceinline__ uint32_t low_nibbles(uint32_t word) { return word & 0x0f0f0f0fu; }
__device__ __forceinline__ uint32_t high_nibbles(uint32_t word) { return word >> 4 & 0x0f0f0f0fu; }

// Nibbles with a scale and a zero per channel; the zero meets the token's sum in the epilogue, so that the nibbles go
// into the MMA as they are.
struct Nibbles {
  static constexpr GpuActivations kActivations = GpuActivations::kInt8;
  static constexpr int kCodeBits = 4;
  static constexpr WeightScaling kScaling = WeightScaling::kChannel;
  static constexpr bool kMultipliesScale = false;
  using Sum = int32_t;
  struct Parameters {};
  struct Uniform {};
  static __device__ __forceinline__ Uniform make_uniform(const PackedWeightView&) { return {}; }
  static __device__ __forceinline__ void decode(const uint32_t (&vector)[4], int step, const Parameters (&)[2],
                                                const Uniform&, uint32_t (&a)[4]) {
    a[0] = low_nibbles(vector[2 * step]), a[1] = high_nibbles(vector[2 * step]);
    a[2] = low_nibbles(vector[2 * step + 1]), a[3] = high_nibbles(vector[2 * step + 1]);
  }
  static __device__ __forceinline__ void multiply(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                  const Parameters (&)[2]) {
    device::mma_m16n8k32_u8s8(d, a, b);
  }
};

// QoQ: the signed byte is (code - zero) * sub_scale. (code * s + 128 - zero * s) XOR 128, where the first part lies in
// 0..255, so four of them are one 32-bit multiply-add with (128 - zero * s) * 0x01010101: the word's sum is the
// concatenation of its bytes even where 128 - zero * s is negative. An entry in memory is s, and 128 - zero * s above.
struct TwoLevelNibbles {
  static constexpr GpuActivations kActivations = GpuActivations::kInt8;
  static constexpr int kCodeBits = 4;
  static constexpr WeightScaling kScaling = WeightScaling::kTwoLevel;
  static constexpr bool kMultipliesScale = false;
  using Sum = int32_t;
  struct Parameters {
    uint32_t scale, addend;
  };
  struct Uniform {};
  static __device__ __forceinline__ Uniform make_uniform(const PackedWeightView&) { return {}; }
  template <int kFragments>
  static __device__ __forceinline__ void read_parameters(const std::byte* entries, int first_fragment, const Uniform&,
                                                         Parameters (&p)[kFragments][2]) {
    uint32_t words[2 * kFragments];
    load_words(entries + first_fragment * 8, words);
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        p[f][r].scale = words[2 * f + r] & 0xffffu;
        p[f][r].addend = static_cast<uint32_t>(static_cast<int32_t>(words[2 * f + r]) >> 16) * 0x01010101u;
      }
  }
  static __device__ __forceinline__ void decode(const uint32_t (&vector)[4], int step, const Parameters (&p)[2],
                                                const Uniform&, uint32_t (&a)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t word = vector[2 * step + r / 2];
      a[r] = ((r % 2 ? high_nibbles(word) : low_nibbles(word)) * p[r & 1].scale + p[r & 1].addend) ^ 0x80808080u;
    }
  }
  static __device__ __forceinline__ void multiply(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                  const Parameters (&)[2]) {
    device::mma_m16n8k32_s8(d, a, b);
  }
};

}  // namespace partita::gemm
