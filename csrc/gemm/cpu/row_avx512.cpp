// A token's row before the matmul (RMS norm, conversion) and its sums after it (bias, gate, residual).
// Every step is the same sequence of correctly rounded operations as in row_portable.cpp: equal bits.
#if defined(__x86_64__)
// GCC 12 calls the deliberately undefined operand of its own intrinsics uninitialised (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "gemm/kernels.h"

namespace partita {
namespace {

constexpr int kLanes = 16;

__mmask16 tail_mask(int64_t left) {
  return left >= kLanes ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << left) - 1u);
}

__m512 upper_half_to_lower(__m512 v) { return _mm512_shuffle_f32x4(v, v, _MM_SHUFFLE(1, 0, 3, 2)); }

// 1 / sqrt(mean(x^2) + eps): 32 running sums (lane = k mod 32), then halved pairwise.
float inverse_rms(const float* x, int64_t count, float eps) {
  __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 2 * kLanes) {
    const __m512 a = _mm512_maskz_loadu_ps(tail_mask(count - k), x + k);
    even = _mm512_fmadd_ps(a, a, even);
    if (k + kLanes >= count) continue;
    const __m512 b = _mm512_maskz_loadu_ps(tail_mask(count - k - kLanes), x + k + kLanes);
    odd = _mm512_fmadd_ps(b, b, odd);
  }
  __m512 v = _mm512_add_ps(even, odd);
  v = _mm512_add_ps(v, upper_half_to_lower(v));
  v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, _MM_SHUFFLE(0, 0, 0, 1)));
  __m128 q = _mm512_castps512_ps128(v);
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  q = _mm_add_ss(q, _mm_shuffle_ps(q, q, 1));
  const __m128 mean = _mm_div_ss(q, _mm_set_ss(static_cast<float>(count)));
  return _mm_cvtss_f32(_mm_div_ss(_mm_set_ss(1.0f), _mm_sqrt_ss(_mm_add_ss(mean, _mm_set_ss(eps)))));
}

// The 16 inputs at k, normalised if there is a norm; zero past the end.
struct RowReader {
  const float* x;
  const float* norm_weight;
  __m512 factor;
  RowReader(const float* row, const float* weight, float eps, int64_t count) : x(row), norm_weight(weight) {
    factor = _mm512_set1_ps(weight ? inverse_rms(row, count, eps) : 1.0f);
  }
  __m512 load(int64_t k, __mmask16 mask) const {
    const __m512 value = _mm512_maskz_loadu_ps(mask, x + k);
    if (!norm_weight) return value;
    return _mm512_mul_ps(_mm512_mul_ps(value, factor), _mm512_maskz_loadu_ps(mask, norm_weight + k));
  }
};

int32_t sum_4(__m128i v) {
  v = _mm_add_epi32(v, _mm_shuffle_epi32(v, _MM_SHUFFLE(1, 0, 3, 2)));
  v = _mm_add_epi32(v, _mm_shuffle_epi32(v, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(v);
}

void quantize_group(__m512 low, __m512 high, ActivationGroup* group) {
  // The maximum of the magnitudes' bit patterns: a NaN is above all numbers and so reaches the scale.
  const __m512i magnitude_mask = _mm512_set1_epi32(0x7fffffff);
  __m512i m = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(low), magnitude_mask),
                               _mm512_and_si512(_mm512_castps_si512(high), magnitude_mask));
  __m256i m8 = _mm256_max_epu32(_mm512_castsi512_si256(m), _mm512_extracti64x4_epi64(m, 1));
  __m128i m4 = _mm_max_epu32(_mm256_castsi256_si128(m8), _mm256_extracti128_si256(m8, 1));
  m4 = _mm_max_epu32(m4, _mm_shuffle_epi32(m4, _MM_SHUFFLE(1, 0, 3, 2)));
  m4 = _mm_max_epu32(m4, _mm_shuffle_epi32(m4, _MM_SHUFFLE(2, 3, 0, 1)));
  const float absmax = _mm_cvtss_f32(_mm_castsi128_ps(m4));
  const bool is_zero = absmax < kMinAbsmax;
  const float scale = is_zero ? 0.0f : absmax / 127.0f;
  const __m512 inverse = _mm512_set1_ps(is_zero ? 0.0f : 127.0f / absmax);
  const __m128i codes_low = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(low, inverse)));
  const __m128i codes_high = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(high, inverse)));
  _mm_store_si128(reinterpret_cast<__m128i*>(group->codes), codes_low);
  _mm_store_si128(reinterpret_cast<__m128i*>(group->codes + 16), codes_high);
  const __m128i ones = _mm_set1_epi8(1);
  const int32_t sum_low = sum_4(_mm_dpbusd_epi32(_mm_setzero_si128(), ones, codes_low));
  const int32_t sum_high = sum_4(_mm_dpbusd_epi32(_mm_setzero_si128(), ones, codes_high));
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

// The maximum magnitude of each of four groups, in every 128-bit lane. Compared as integers: a NaN is above all
// numbers.
__m512 absmax_of_4_groups(const __m512 (&low)[4], const __m512 (&high)[4]) {
  const __m512i magnitude_mask = _mm512_set1_epi32(0x7fffffff);
  __m512i m[4];
  for (int i = 0; i < 4; ++i)
    m[i] = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(low[i]), magnitude_mask),
                            _mm512_and_si512(_mm512_castps_si512(high[i]), magnitude_mask));
  const __m512i m01 = _mm512_max_epu32(_mm512_unpacklo_epi32(m[0], m[1]), _mm512_unpackhi_epi32(m[0], m[1]));
  const __m512i m23 = _mm512_max_epu32(_mm512_unpacklo_epi32(m[2], m[3]), _mm512_unpackhi_epi32(m[2], m[3]));
  __m512i all = _mm512_max_epu32(_mm512_unpacklo_epi64(m01, m23), _mm512_unpackhi_epi64(m01, m23));
  all = _mm512_max_epu32(all, _mm512_shuffle_i32x4(all, all, _MM_SHUFFLE(1, 0, 3, 2)));
  all = _mm512_max_epu32(all, _mm512_shuffle_i32x4(all, all, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm512_castsi512_ps(all);
}

// What follows the codes in the records of two groups. codes: their 64 bytes; scale: one of each, eight times.
__m512i records_after_codes(__m512i codes, __m512 scale) {
  __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), codes);
  sums = _mm512_add_epi32(sums, _mm512_shuffle_epi32(sums, _MM_PERM_BADC));
  sums = _mm512_add_epi32(sums, _mm512_shuffle_epi32(sums, _MM_PERM_CDAB));  // each lane: the sum of its 16 codes
  const __m512i other = _mm512_shuffle_i32x4(sums, sums, _MM_SHUFFLE(2, 3, 0, 1));
  const __m512i total = _mm512_add_epi32(sums, other);
  // scale, scaled sum, -8, -16, -128 times the sum | -32 times each half's, the sum
  __m512i words = _mm512_mask_mov_epi32(total, 0x2020, other);
  words = _mm512_mask_mov_epi32(words, 0x4040, sums);
  const __m512i shifts = _mm512_setr_epi32(0, 0, 3, 4, 7, 5, 5, 0, 0, 0, 3, 4, 7, 5, 5, 0);
  words = _mm512_mask_sub_epi32(words, 0x7c7c, _mm512_setzero_si512(), _mm512_sllv_epi32(words, shifts));
  const __m512 scaled_sum = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(total));
  words = _mm512_mask_mov_epi32(words, 0x0101, _mm512_castps_si512(scale));
  return _mm512_mask_mov_epi32(words, 0x0202, _mm512_castps_si512(scaled_sum));
}

// As quantize_group() does one: one group at a time is a chain of reductions, three times as long.
void quantize_4_groups(const __m512 (&low)[4], const __m512 (&high)[4], ActivationGroup* groups) {
  const __m512 absmax = absmax_of_4_groups(low, high);
  const __m128 absmax4 = _mm512_castps512_ps128(absmax);
  const __mmask8 is_zero = _mm_cmp_ps_mask(absmax4, _mm_set1_ps(kMinAbsmax), _CMP_LT_OQ);
  const auto is_kept = static_cast<__mmask8>(~is_zero);
  const __m512 scale = _mm512_broadcast_f32x4(_mm_maskz_div_ps(is_kept, absmax4, _mm_set1_ps(127.0f)));
  const __m512 inverse = _mm512_broadcast_f32x4(_mm_maskz_div_ps(is_kept, _mm_set1_ps(127.0f), absmax4));
  const __m512 inverses[4] = {_mm512_permute_ps(inverse, 0x00), _mm512_permute_ps(inverse, 0x55),
                              _mm512_permute_ps(inverse, 0xaa), _mm512_permute_ps(inverse, 0xff)};
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int pair = 0; pair < 2; ++pair) {
    __m512i words[2];
    for (int i = 0; i < 2; ++i) {
      const int g = 2 * pair + i;
      words[i] = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(low[g], inverses[g])),
                                    _mm512_cvtps_epi32(_mm512_mul_ps(high[g], inverses[g])));
    }
    // Packing leaves dword 4 i + j = codes 16 j + 4 i of the 64: transposed.
    const __m512i codes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(words[0], words[1]));
    const __m512i which = pair ? _mm512_setr_epi32(2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3)
                               : _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i rest = records_after_codes(codes, _mm512_permutexvar_ps(which, scale));
    _mm512_store_si512(groups + 2 * pair, _mm512_shuffle_i64x2(codes, rest, _MM_SHUFFLE(1, 0, 1, 0)));
    _mm512_store_si512(groups + 2 * pair + 1, _mm512_shuffle_i64x2(codes, rest, _MM_SHUFFLE(3, 2, 3, 2)));
  }
}

// To nearest even, on the bits; a NaN stays one.
__m512 round_to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_castsi512_ps(_mm512_and_si512(kept, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// e^x to about 1e-7 relative on [-87, 88], clamped outside: Cody-Waite reduction, Cephes' polynomial.
__m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)));
}

// silu(x) = x / (1 + e^-x); gelu_tanh(x) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)
__m512 activate(GateActivation gate, __m512 x) {
  const __m512 zero = _mm512_setzero_ps();
  __m512 z = _mm512_sub_ps(zero, x);
  if (gate == GateActivation::kGeluTanh) {
    const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
    z = _mm512_mul_ps(_mm512_mul_ps(z, cubic), _mm512_set1_ps(1.5957691216057308f));
  }
  return _mm512_div_ps(x, _mm512_add_ps(exponential(z), _mm512_set1_ps(1.0f)));
}

}  // namespace

void prepare_int8_row_avx512(const float* x, const float* norm_weight, float norm_eps, int64_t in_features,
                             std::byte* prepared) {
  const RowReader row(x, norm_weight, norm_eps, in_features);
  auto* groups = reinterpret_cast<ActivationGroup*>(prepared);
  int64_t k = 0;
  for (; k + 4 * kGroupValues <= in_features; k += 4 * kGroupValues) {
    __m512 low[4], high[4];
    for (int g = 0; g < 4; ++g) {
      low[g] = row.load(k + g * kGroupValues, 0xffff);
      high[g] = row.load(k + g * kGroupValues + kLanes, 0xffff);
    }
    quantize_4_groups(low, high, groups + k / kGroupValues);
  }
  for (; k < in_features; k += kGroupValues)
    quantize_group(row.load(k, 0xffff), row.load(k + kLanes, 0xffff), groups + k / kGroupValues);
}

void prepare_bf16_row_avx512(const float* x, const float* norm_weight, float norm_eps, int64_t in_features,
                             std::byte* prepared) {
  const RowReader row(x, norm_weight, norm_eps, in_features);
  auto* out = reinterpret_cast<float*>(prepared);
  for (int64_t k = 0; k < in_features; k += kLanes)
    _mm512_store_ps(out + k, round_to_bf16(row.load(k, tail_mask(in_features - k))));
}

void prepare_f32_row_avx512(const float* x, const float* norm_weight, float norm_eps, int64_t in_features,
                            std::byte* prepared) {
  const RowReader row(x, norm_weight, norm_eps, in_features);
  auto* out = reinterpret_cast<float*>(prepared);
  for (int64_t k = 0; k < in_features; k += kLanes) _mm512_store_ps(out + k, row.load(k, tail_mask(in_features - k)));
}

void store_sums_avx512(const SumsStore& s) {
  for (int64_t t = 0; t < s.num_tokens; ++t) {
    const float* sums = s.sums + t * s.sums_stride;
    const float* up_sums = s.up_sums ? s.up_sums + t * s.sums_stride : nullptr;
    float* out = s.out + t * s.out_stride;
    for (int64_t r = 0; r < s.num_rows; r += kLanes) {
      const __mmask16 mask = tail_mask(s.num_rows - r);
      __m512 value = _mm512_maskz_loadu_ps(mask, sums + r);
      if (s.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, s.bias + r));
      if (up_sums) {
        __m512 up = _mm512_maskz_loadu_ps(mask, up_sums + r);
        if (s.up_bias) up = _mm512_add_ps(up, _mm512_maskz_loadu_ps(mask, s.up_bias + r));
        value = _mm512_mul_ps(activate(s.gate, value), up);
      }
      if (s.add_to_out) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, out + r));
      _mm512_mask_storeu_ps(out + r, mask, value);
    }
  }
}

}  // namespace partita

#endif  // __x86_64__
