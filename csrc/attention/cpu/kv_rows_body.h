// Row arithmetic of append, included by one translation unit per instruction set. Loops run over fixed groups of 16
// elements in a fixed order without fused multiply-adds, so that every instruction set writes the same page bytes.
// Everything is in an anonymous namespace: see attend_kernel.h.

#include <cstring>

#if defined(__F16C__)
// GCC 12 takes its own intrinsics' deliberately undefined operands for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#include "attention/cpu/attend_kernel.h"
#if !defined(__F16C__)
#include "core/float16.h"
#endif

namespace partita {
namespace {

constexpr int kGroup = 16;
constexpr float kMaxHalf = 65504.0f;

inline float clamp_to_half(float x) { return x > kMaxHalf ? kMaxHalf : (x < -kMaxHalf ? -kMaxHalf : x); }

#if defined(__F16C__)
inline uint16_t to_half(float x) { return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
inline float from_half(uint16_t x) { return _cvtsh_ss(x); }
#else
inline uint16_t to_half(float x) { return float_to_fp16(x); }
inline float from_half(uint16_t x) { return fp16_to_float(x); }
#endif

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint16_t to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

// The addition of 2^14 leaves multiples of 2^-9, e4m3's subnormals, in the low bits, rounded to nearest even.
inline uint8_t to_e4m3(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 16384.0f) - float_bits(16384.0f);
  const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  uint32_t code = magnitude < 0x3c800000u ? subnormal : normal;  // below 2^-6
  code = magnitude >= 0x43e00000u ? 0x7eu : code;                // 448
  code = magnitude > 0x7f800000u ? 0x7fu : code;
  return static_cast<uint8_t>(code | ((bits >> 24) & 0x80u));
}
inline float from_e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu, sign = (code & 0x80u) << 24;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  const uint32_t subnormal = float_bits(static_cast<float>(magnitude) * 0.001953125f);  // 2^-9
  uint32_t bits = magnitude < 8 ? subnormal : normal;
  bits = magnitude == 0x7f ? 0x7fc00000u : bits;
  return bits_float(bits | sign);
}

void normalize_row(float* x, const float* weight, float eps, int head_dim) {
  float sums[kGroup] = {};
  int d = 0;
  for (; d + kGroup <= head_dim; d += kGroup)
    for (int l = 0; l < kGroup; ++l) sums[l] += x[d + l] * x[d + l];
  for (int l = 0; d + l < head_dim; ++l) sums[l] += x[d + l] * x[d + l];
  for (int h = kGroup / 2; h > 0; h /= 2)
    for (int l = 0; l < h; ++l) sums[l] += sums[l + h];
  const float inverse = 1.0f / __builtin_sqrtf(sums[0] / static_cast<float>(head_dim) + eps);
  for (int i = 0; i < head_dim; ++i) x[i] = x[i] * inverse * weight[i];
}

void apply_rope_row(float* x, const float* cos, const float* sin, int rotary_dim) {
  const int half = rotary_dim / 2;
  float* high = x + half;
  for (int i = 0; i < half; ++i) {
    const float a = x[i];
    const float b = high[i];
    x[i] = a * cos[i] - b * sin[i];
    high[i] = b * cos[i] + a * sin[i];
  }
}

#if defined(__AVX512F__)
// One butterfly stage inside a vector: the lane whose bit kStride is set gets a - b, its partner a + b.
template <int kStride>
inline __m512 butterfly(__m512 x) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i partner = _mm512_xor_si512(lane, _mm512_set1_epi32(kStride));
  const __mmask16 is_second = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(kStride));
  const __m512 other = _mm512_permutexvar_ps(partner, x);
  return _mm512_mask_sub_ps(_mm512_add_ps(x, other), is_second, other, x);
}
#endif

// y = H x / sqrt(n) on each run of n = rotation_size elements: butterflies of stride 1, 2, ... n/2 in fp32.
void rotate_row(float* x, int head_dim, int rotation_size) {
  int stride = 1;
#if defined(__AVX512F__)
  if (rotation_size >= kGroup) {
    for (int d = 0; d < head_dim; d += kGroup)
      _mm512_storeu_ps(x + d, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(_mm512_loadu_ps(x + d))))));
    stride = kGroup;
  }
#endif
#if defined(__AVX512F__)
  // By hand: GCC guards each short loop against aliasing, which costs more than the loop.
  for (; stride >= kGroup && stride < rotation_size; stride *= 2) {
    for (int base = 0; base < head_dim; base += 2 * stride) {
      for (int i = base; i < base + stride; i += kGroup) {
        const __m512 a = _mm512_loadu_ps(x + i);
        const __m512 b = _mm512_loadu_ps(x + i + stride);
        _mm512_storeu_ps(x + i, _mm512_add_ps(a, b));
        _mm512_storeu_ps(x + i + stride, _mm512_sub_ps(a, b));
      }
    }
  }
#endif
  for (; stride < rotation_size; stride *= 2) {
    for (int base = 0; base < head_dim; base += 2 * stride) {
      float* low = x + base;
      float* high = low + stride;
      for (int i = 0; i < stride; ++i) {
        const float a = low[i];
        const float b = high[i];
        low[i] = a + b;
        high[i] = a - b;
      }
    }
  }
  const float norm = 1.0f / __builtin_sqrtf(static_cast<float>(rotation_size));
  for (int i = 0; i < head_dim; ++i) x[i] *= norm;
}

void encode_integer(const float* x, int head_dim, int max_code, std::byte* codes, uint16_t* params) {
  float lows[8], highs[8];
  for (int l = 0; l < 8; ++l) lows[l] = highs[l] = x[l];
  for (int d = 8; d < head_dim; d += 8)
    for (int l = 0; l < 8; ++l) {
      lows[l] = x[d + l] < lows[l] ? x[d + l] : lows[l];
      highs[l] = x[d + l] > highs[l] ? x[d + l] : highs[l];
    }
  float low = lows[0], high = highs[0];
  for (int l = 1; l < 8; ++l) {
    low = lows[l] < low ? lows[l] : low;
    high = highs[l] > high ? highs[l] : high;
  }
  // Adding zero turns -0 into 0: which of equal zeros came first must not show in the bytes.
  low = clamp_to_half(low) + 0.0f;
  high = clamp_to_half(high) + 0.0f;
  params[0] = to_half(clamp_to_half((high - low) / static_cast<float>(max_code)));
  params[1] = to_half(low);
  // A scale that rounds to zero (all elements equal, or nearly) leaves every code 0: the value is the minimum.
  const float scale = from_half(params[0]);
  const float divisor = scale > 0 ? scale : bits_float(0x7f800000u);
  const float min = from_half(params[1]);
  const float top = static_cast<float>(max_code);
  constexpr float kRounder = 8388608.0f;  // 2^23: adding it rounds to nearest even
  alignas(64) int32_t values[256];
  for (int i = 0; i < head_dim; ++i) {
    float code = (x[i] - min) / divisor;
    code = code > 0.0f ? code : 0.0f;  // NaN too
    code = code < top ? code : top;
    values[i] = static_cast<int32_t>(float_bits(code + kRounder) & 0xffu);
  }
  auto* bytes = reinterpret_cast<uint8_t*>(codes);
  if (max_code == 255) {
    for (int i = 0; i < head_dim; ++i) bytes[i] = static_cast<uint8_t>(values[i]);
  } else {
    uint64_t pairs[128];  // two codes each (little-endian, as pages are)
    std::memcpy(pairs, values, sizeof(int32_t) * head_dim);
    for (int i = 0; i < head_dim / 2; ++i) bytes[i] = static_cast<uint8_t>(pairs[i] | (pairs[i] >> 28));
  }
}

void encode_row(KvCodec codec, const float* x, int head_dim, std::byte* codes, uint16_t* params) {
  switch (codec) {
    case KvCodec::kF32:
      std::memcpy(codes, x, sizeof(float) * head_dim);
      return;
    case KvCodec::kBF16: {
      auto* out = reinterpret_cast<uint16_t*>(codes);
      for (int i = 0; i < head_dim; ++i) out[i] = to_bf16(x[i]);
      return;
    }
    case KvCodec::kF16: {
      auto* out = reinterpret_cast<uint16_t*>(codes);
      for (int i = 0; i < head_dim; ++i) out[i] = to_half(clamp_to_half(x[i]));
      return;
    }
    case KvCodec::kInt8:
      return encode_integer(x, head_dim, 255, codes, params);
    case KvCodec::kInt4Rotated:
    case KvCodec::kInt4Plain:
      return encode_integer(x, head_dim, 15, codes, params);
    case KvCodec::kE4M3: {
      auto* out = reinterpret_cast<uint8_t*>(codes);
      for (int i = 0; i < head_dim; ++i) out[i] = to_e4m3(x[i]);
      return;
    }
  }
}

void decode_row(KvCodec codec, const std::byte* codes, const uint16_t* params, int head_dim, float* x) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(codes);
  const auto* words = reinterpret_cast<const uint16_t*>(codes);
  switch (codec) {
    case KvCodec::kF32:
      std::memcpy(x, codes, sizeof(float) * head_dim);
      return;
    case KvCodec::kBF16:
      for (int i = 0; i < head_dim; ++i) x[i] = bits_float(static_cast<uint32_t>(words[i]) << 16);
      return;
    case KvCodec::kF16:
      for (int i = 0; i < head_dim; ++i) x[i] = from_half(words[i]);
      return;
    case KvCodec::kInt8: {
      const float scale = from_half(params[0]);
      const float min = from_half(params[1]);
      for (int i = 0; i < head_dim; ++i) x[i] = static_cast<float>(bytes[i]) * scale + min;
      return;
    }
    case KvCodec::kInt4Rotated:
    case KvCodec::kInt4Plain: {
      const float scale = from_half(params[0]);
      const float min = from_half(params[1]);
      for (int i = 0; i < head_dim / 2; ++i) {
        x[2 * i] = static_cast<float>(bytes[i] & 15) * scale + min;
        x[2 * i + 1] = static_cast<float>(bytes[i] >> 4) * scale + min;
      }
      return;
    }
    case KvCodec::kE4M3:
      for (int i = 0; i < head_dim; ++i) x[i] = from_e4m3(bytes[i]);
      return;
  }
}

constexpr KvRowKernel kRowKernel{normalize_row, apply_rope_row, rotate_row, encode_row, decode_row};

}  // namespace
}  // namespace partita
