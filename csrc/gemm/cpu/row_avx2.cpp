// A token's row before the matmul (RMS norm, conversion) and its sums after it (bias, gate, residual).
// Every step is the same sequence of correctly rounded operations as in row_portable.cpp: equal bits.
#if defined(__x86_64__)
#include <immintrin.h>

#include "gemm/kernels.h"

namespace partita {
namespace {

constexpr int kLanes = 8;

__m256i tail_mask(int64_t left) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(left > kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0), lane);
}

// 1 / sqrt(mean(x^2) + eps): 32 running sums (lane = k mod 32), then halved pairwise.
float inverse_rms(const float* x, int64_t count, float eps) {
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t k = 0; k < count; k += kLanes) {
    const __m256 value = _mm256_maskload_ps(x + k, tail_mask(count - k));
    __m256& sum = sums[k / kLanes % 4];
    sum = _mm256_fmadd_ps(value, value, sum);
  }
  const __m256 v = _mm256_add_ps(_mm256_add_ps(sums[0], sums[2]), _mm256_add_ps(sums[1], sums[3]));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  q = _mm_add_ss(q, _mm_shuffle_ps(q, q, 1));
  const __m128 mean = _mm_div_ss(q, _mm_set_ss(static_cast<float>(count)));
  return _mm_cvtss_f32(_mm_div_ss(_mm_set_ss(1.0f), _mm_sqrt_ss(_mm_add_ss(mean, _mm_set_ss(eps)))));
}

// The 8 inputs at k, normalised if there is a norm; zero past the end.
struct RowReader {
  const float* x;
  const float* norm_weight;
  __m256 factor;
  int64_t count;
  RowReader(const float* row, const float* weight, float eps, int64_t num_inputs)
      : x(row), norm_weight(weight), count(num_inputs) {
    factor = _mm256_set1_ps(weight ? inverse_rms(row, num_inputs, eps) : 1.0f);
  }
  __m256 load(int64_t k) const {
    const __m256i mask = tail_mask(count - k);
    const __m256 value = _mm256_maskload_ps(x + k, mask);
    if (!norm_weight) return value;
    return _mm256_mul_ps(_mm256_mul_ps(value, factor), _mm256_maskload_ps(norm_weight + k, mask));
  }
};

int32_t sum_8(__m256i v) {
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, _MM_SHUFFLE(1, 0, 3, 2)));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(q);
}

void quantize_group(const __m256* values, ActivationGroup* group) {
  // The maximum of the magnitudes' bit patterns: a NaN is above all numbers and so reaches the scale.
  const __m256i magnitude_mask = _mm256_set1_epi32(0x7fffffff);
  __m256i m = _mm256_setzero_si256();
  for (int i = 0; i < 4; ++i) m = _mm256_max_epu32(m, _mm256_and_si256(_mm256_castps_si256(values[i]), magnitude_mask));
  __m128i m4 = _mm_max_epu32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  m4 = _mm_max_epu32(m4, _mm_shuffle_epi32(m4, _MM_SHUFFLE(1, 0, 3, 2)));
  m4 = _mm_max_epu32(m4, _mm_shuffle_epi32(m4, _MM_SHUFFLE(2, 3, 0, 1)));
  const float absmax = _mm_cvtss_f32(_mm_castsi128_ps(m4));
  const bool is_zero = absmax < kMinAbsmax;
  const float scale = is_zero ? 0.0f : absmax / 127.0f;
  const __m256 inverse = _mm256_set1_ps(is_zero ? 0.0f : 127.0f / absmax);
  __m256i codes[4];
  for (int i = 0; i < 4; ++i) codes[i] = _mm256_cvtps_epi32(_mm256_mul_ps(values[i], inverse));
  // Saturating packs keep non-finite inputs (INT32_MIN) at -128; the lanes come out interleaved and are put back.
  const __m256i words_low = _mm256_packs_epi32(codes[0], codes[1]);
  const __m256i words_high = _mm256_packs_epi32(codes[2], codes[3]);
  const __m256i bytes =
      _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words_low, words_high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_store_si256(reinterpret_cast<__m256i*>(group->codes), bytes);
  const __m256i ones = _mm256_set1_epi16(1);
  const int32_t sum_low = sum_8(_mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)), ones));
  const int32_t sum_high = sum_8(_mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1)), ones));
  const int32_t sum = sum_low + sum_high;
  group->scale = scale;
  group->scaled_sum = scale * static_cast<float>(sum);
  group->start_zero8 = -8 * sum;
  group->start_zero16 = -16 * sum;
  group->start_zero128 = -128 * sum;
  group->start_zero32[0] = -32 * sum_low;
  group->start_zero32[1] = -32 * sum_high;
  group->sum = sum;
}

// To nearest even, on the bits; a NaN stays one.
__m256 round_to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, quiet, is_nan);
  return _mm256_castsi256_ps(_mm256_and_si256(kept, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// e^x to about 1e-7 relative on [-87, 88], clamped outside: Cody-Waite reduction, Cephes' polynomial.
__m256 exponential(__m256 x) {
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.0f)), _mm256_set1_ps(88.0f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-0.693359375f), x);
  r = _mm256_fmadd_ps(n, _mm256_set1_ps(2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

// silu(x) = x / (1 + e^-x); gelu_tanh(x) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)
__m256 activate(GateActivation gate, __m256 x) {
  __m256 z = _mm256_sub_ps(_mm256_setzero_ps(), x);
  if (gate == GateActivation::kGeluTanh) {
    const __m256 cubic = _mm256_fmadd_ps(_mm256_mul_ps(x, x), _mm256_set1_ps(0.044715f), _mm256_set1_ps(1.0f));
    z = _mm256_mul_ps(_mm256_mul_ps(z, cubic), _mm256_set1_ps(1.5957691216057308f));
  }
  return _mm256_div_ps(x, _mm256_add_ps(exponential(z), _mm256_set1_ps(1.0f)));
}

}  // namespace

void prepare_int8_row_avx2(const float* x, const float* norm_weight, float norm_eps, int64_t in_features,
                           std::byte* prepared) {
  const RowReader row(x, norm_weight, norm_eps, in_features);
  auto* groups = reinterpret_cast<ActivationGroup*>(prepared);
  for (int64_t k = 0; k < in_features; k += kGroupValues) {
    const __m256 values[4] = {row.load(k), row.load(k + 8), row.load(k + 16), row.load(k + 24)};
    quantize_group(values, groups + k / kGroupValues);
  }
}

void prepare_bf16_row_avx2(const float* x, const float* norm_weight, float norm_eps, int64_t in_features,
                           std::byte* prepared) {
  const RowReader row(x, norm_weight, norm_eps, in_features);
  auto* out = reinterpret_cast<float*>(prepared);
  for (int64_t k = 0; k < in_features; k += kLanes) _mm256_store_ps(out + k, round_to_bf16(row.load(k)));
}

void prepare_f32_row_avx2(const float* x, const float* norm_weight, float norm_eps, int64_t in_features,
                          std::byte* prepared) {
  const RowReader row(x, norm_weight, norm_eps, in_features);
  auto* out = reinterpret_cast<float*>(prepared);
  for (int64_t k = 0; k < in_features; k += kLanes) _mm256_store_ps(out + k, row.load(k));
}

void store_sums_avx2(const SumsStore& s) {
  for (int64_t t = 0; t < s.num_tokens; ++t) {
    const float* sums = s.sums + t * s.sums_stride;
    const float* up_sums = s.up_sums ? s.up_sums + t * s.sums_stride : nullptr;
    float* out = s.out + t * s.out_stride;
    for (int64_t r = 0; r < s.num_rows; r += kLanes) {
      const __m256i mask = tail_mask(s.num_rows - r);
      __m256 value = _mm256_maskload_ps(sums + r, mask);
      if (s.bias) value = _mm256_add_ps(value, _mm256_maskload_ps(s.bias + r, mask));
      if (up_sums) {
        __m256 up = _mm256_maskload_ps(up_sums + r, mask);
        if (s.up_bias) up = _mm256_add_ps(up, _mm256_maskload_ps(s.up_bias + r, mask));
        value = _mm256_mul_ps(activate(s.gate, value), up);
      }
      if (s.add_to_out) value = _mm256_add_ps(value, _mm256_maskload_ps(out + r, mask));
      _mm256_maskstore_ps(out + r, mask, value);
    }
  }
}

}  // namespace partita

#endif  // __x86_64__
