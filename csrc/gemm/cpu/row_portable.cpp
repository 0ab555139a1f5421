// A token's row before the matmul (RMS norm, conversion) and its sums after it (bias, gate, residual), in plain C++.
// The vector versions follow this order of correctly rounded operations: equal bits.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/float16.h"
#include "gemm/kernels.h"

namespace partita {
namespace {

constexpr int kRunningSums = 32;

float inverse_rms(const float* x, int64_t count, float eps) {
  float sums[kRunningSums] = {};
  for (int64_t k = 0; k < count; ++k) sums[k % kRunningSums] = std::fma(x[k], x[k], sums[k % kRunningSums]);
  for (int width = kRunningSums / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return 1.0f / std::sqrt(sums[0] / static_cast<float>(count) + eps);
}

struct RowReader {
  const float* x;
  const float* norm_weight;
  float factor;
  RowReader(const float* row, const float* weight, float eps, int64_t count)
      : x(row), norm_weight(weight), factor(weight ? inverse_rms(row, count, eps) : 1.0f) {}
  float at(int64_t k) const { return norm_weight ? x[k] * factor * norm_weight[k] : x[k]; }
};

// Adding 1.5 * 2^23 leaves no fraction bits: the hardware rounds to nearest even. |x| < 2^22.
float round_to_even(float x) {
  constexpr float kShift = 12582912.0f;
  return (x + kShift) - kShift;
}

void quantize_group(const float* values, ActivationGroup* group) {
  uint32_t max_bits = 0;  // a NaN's magnitude bits are above all numbers' and so reach the scale
  for (int i = 0; i < kGroupValues; ++i) max_bits = std::max(max_bits, float_to_bits(values[i]) & 0x7fffffffu);
  const float absmax = bits_to_float(max_bits);
  const bool is_zero = absmax < kMinAbsmax;
  const float scale = is_zero ? 0.0f : absmax / 127.0f;
  const float inverse = is_zero ? 0.0f : 127.0f / absmax;
  int32_t half_sums[2] = {0, 0};
  for (int i = 0; i < kGroupValues; ++i) {
    const float scaled = values[i] * inverse;
    const int code = std::fabs(scaled) < 128.0f ? static_cast<int>(round_to_even(scaled)) : -128;
    group->codes[i] = static_cast<int8_t>(code);
    half_sums[i / 16] += code;
  }
  const int32_t sum = half_sums[0] + half_sums[1];
  group->scale = scale;
  group->scaled_sum = scale * static_cast<float>(sum);
  group->start_zero8 = -8 * sum;
  group->start_zero16 = -16 * sum;
  group->start_zero128 = -128 * sum;
  group->start_zero32[0] = -32 * half_sums[0];
  group->start_zero32[1] = -32 * half_sums[1];
  group->sum = sum;
}

// e^x to about 1e-7 relative on [-87, 88], clamped outside: Cody-Waite reduction, Cephes' polynomial.
float exponential(float x) {
  x = x > -87.0f ? x : -87.0f;
  x = x < 88.0f ? x : 88.0f;
  const float n = round_to_even(x * 1.44269504088896341f);
  float r = std::fma(n, -0.693359375f, x);
  r = std::fma(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r) + 1.0f;
  return p * bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// silu(x) = x / (1 + e^-x); gelu_tanh(x) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)
float activate(GateActivation gate, float x) {
  float z = 0.0f - x;
  if (gate == GateActivation::kGeluTanh) z = z * std::fma(x * x, 0.044715f, 1.0f) * 1.5957691216057308f;
  return x / (exponential(z) + 1.0f);
}

}  // namespace

void prepare_int8_row_portable(const float* x, const float* norm_weight, float norm_eps, int64_t in_features,
                               std::byte* prepared) {
  const RowReader row(x, norm_weight, norm_eps, in_features);
  auto* groups = reinterpret_cast<ActivationGroup*>(prepared);
  float values[kGroupValues];
  for (int64_t k = 0; k < in_features; k += kGroupValues) {
    for (int i = 0; i < kGroupValues; ++i) values[i] = row.at(k + i);
    quantize_group(values, groups + k / kGroupValues);
  }
}

void prepare_bf16_row_portable(const float* x, const float* norm_weight, float norm_eps, int64_t in_features,
                               std::byte* prepared) {
  const RowReader row(x, norm_weight, norm_eps, in_features);
  auto* out = reinterpret_cast<float*>(prepared);
  for (int64_t k = 0; k < in_features; ++k) out[k] = bf16_to_float(float_to_bf16(row.at(k)));
}

void prepare_f32_row_portable(const float* x, const float* norm_weight, float norm_eps, int64_t in_features,
                              std::byte* prepared) {
  const RowReader row(x, norm_weight, norm_eps, in_features);
  auto* out = reinterpret_cast<float*>(prepared);
  for (int64_t k = 0; k < in_features; ++k) out[k] = row.at(k);
}

void store_sums_portable(const SumsStore& s) {
  for (int64_t t = 0; t < s.num_tokens; ++t) {
    const float* sums = s.sums + t * s.sums_stride;
    float* out = s.out + t * s.out_stride;
    for (int64_t r = 0; r < s.num_rows; ++r) {
      float value = s.bias ? sums[r] + s.bias[r] : sums[r];
      if (s.up_sums) {
        const float up = s.up_sums[t * s.sums_stride + r];
        value = activate(s.gate, value) * (s.up_bias ? up + s.up_bias[r] : up);
      }
      out[r] = s.add_to_out ? value + out[r] : value;
    }
  }
}

}  // namespace partita
