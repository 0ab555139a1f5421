// The matmul on AVX2: 8 rows per register, one packed tile at a time, unpacked a K block at a time into scratch.
// vpmaddubsw saturates at 16 bits; codes below 64 cannot reach that (63 * 127 * 2). Q8_0 moves its sign to the
// activation (|q| <= 128, so 128 * 127 * 2 fits) and so needs no start value.
#if defined(__x86_64__)
#include <immintrin.h>

#include "gemm/kernels.h"

namespace partita {
namespace {

constexpr int kHalfRows = 8;
constexpr int kInt8Tokens = 4;
constexpr int kFloatTokens = 6;  // x 2 registers of rows: 12 accumulators
constexpr int64_t kBlockGroups = 32;
constexpr int64_t kBlockInputs = 256;

struct Parameters {
  __m256 scale[2][2];  // [half group][half of the rows]
  __m256 min[2];
};

__m256 load_halves(const std::byte* halves) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}
__m256 load_bytes(const std::byte* bytes, bool is_signed) {
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  return _mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(packed) : _mm256_cvtepu8_epi32(packed));
}
__m256i load_half_line(const std::byte* line) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line)); }

bool has_min(const TileLayout& layout) {
  return layout.format == WeightFormat::kQ4_1 || layout.format == WeightFormat::kQ4_K;
}

Parameters load_parameters(const TileLayout& layout, const std::byte* tile, int64_t group) {
  Parameters p;
  const std::byte* record = tile + layout.parameter_offset + group * layout.parameter_bytes;
  const std::byte* super = tile + layout.super_offset + group / 8 * layout.super_bytes;
  for (int i = 0; i < 2; ++i) {
    p.min[i] = _mm256_setzero_ps();
    if (layout.format == WeightFormat::kQ4_K) {
      p.scale[0][i] = _mm256_mul_ps(load_halves(super + 16 * i), load_bytes(record + 8 * i, false));
      const __m256 min = _mm256_mul_ps(load_halves(super + 32 + 16 * i), load_bytes(record + 16 + 8 * i, false));
      p.min[i] = _mm256_xor_ps(min, _mm256_set1_ps(-0.0f));
      p.scale[1][i] = p.scale[0][i];
    } else if (layout.format == WeightFormat::kQ6_K) {
      for (int h = 0; h < 2; ++h)
        p.scale[h][i] = _mm256_mul_ps(load_halves(super + 16 * i), load_bytes(record + 16 * h + 8 * i, true));
    } else {
      p.scale[0][i] = p.scale[1][i] = load_halves(record + 16 * i);
      if (layout.format == WeightFormat::kQ4_1) p.min[i] = load_halves(record + 32 + 16 * i);
    }
  }
  return p;
}

// [8] lines of u8 codes per group (Q8_0: signed), then the parameters.
struct alignas(64) UnpackedGroup {
  uint8_t codes[8][64];
  float scale[2][kTileRows];
  float min[kTileRows];
};

void unpack_groups(const TileLayout& layout, const std::byte* tile, int64_t first_group, int64_t num_groups,
                   UnpackedGroup* unpacked) {
  const __m256i mask = _mm256_set1_epi8(0x0f);
  const __m256i flip = _mm256_set1_epi8(layout.format == WeightFormat::kQ8_0 ? static_cast<char>(0x80) : 0);
  for (int64_t g = first_group; g < first_group + num_groups; ++g, ++unpacked) {
    const std::byte* codes = tile + g * layout.code_bytes;
    for (int half = 0; half < 2; ++half) {
      if (layout.code_bytes == 256) {
        for (int i = 0; i < 4; ++i) {
          const __m256i packed = load_half_line(codes + i * 64 + half * 32);
          _mm256_store_si256(reinterpret_cast<__m256i*>(unpacked->codes[2 * i] + half * 32),
                             _mm256_and_si256(packed, mask));
          _mm256_store_si256(reinterpret_cast<__m256i*>(unpacked->codes[2 * i + 1] + half * 32),
                             _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask));
        }
      } else {
        for (int i = 0; i < 8; ++i)
          _mm256_store_si256(reinterpret_cast<__m256i*>(unpacked->codes[i] + half * 32),
                             _mm256_xor_si256(load_half_line(codes + i * 64 + half * 32), flip));
      }
    }
    const Parameters p = load_parameters(layout, tile, g);
    for (int i = 0; i < 2; ++i) {
      for (int h = 0; h < 2; ++h) _mm256_store_ps(unpacked->scale[h] + i * kHalfRows, p.scale[h][i]);
      _mm256_store_ps(unpacked->min + i * kHalfRows, p.min[i]);
    }
  }
}

// How the codes of a format meet the activations.
enum class Codes { kUnsigned, kUnsignedWithMin, kUnsignedHalves, kSigned };

template <Codes C>
__m256i add_dot(__m256i dot, __m256i codes, __m256i activation) {
  const __m256i pairs = C == Codes::kSigned
                            ? _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(activation, codes))
                            : _mm256_maddubs_epi16(codes, activation);
  return _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// 8 rows x T tokens over one K block.
template <Codes C, int T>
void dot_int8(const UnpackedGroup* groups, int half, int64_t num_groups, int start_offset, const std::byte* prepared,
              int64_t row_bytes, float* sums, int64_t sums_stride, bool is_first_block) {
  constexpr int kHalves = C == Codes::kUnsignedHalves ? 2 : 1;
  constexpr int kSteps = 8 / kHalves;
  __m256 acc[T];
  for (int t = 0; t < T; ++t) acc[t] = is_first_block ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + t * sums_stride);
  for (int64_t g = 0; g < num_groups; ++g, ++groups, prepared += sizeof(ActivationGroup)) {
    for (int h = 0; h < kHalves; ++h) {
      __m256i dot[T];
      for (int t = 0; t < T; ++t) {
        if constexpr (C == Codes::kUnsigned || C == Codes::kUnsignedHalves)
          dot[t] =
              _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(prepared + t * row_bytes + start_offset + 4 * h));
        else
          dot[t] = _mm256_setzero_si256();
      }
      for (int j = h * kSteps; j < (h + 1) * kSteps; ++j) {
        const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(groups->codes[j] + half * 32));
        for (int t = 0; t < T; ++t)
          dot[t] = add_dot<C>(dot[t], codes,
                              _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(prepared + t * row_bytes + 4 * j)));
      }
      const __m256 weight_scale = _mm256_load_ps(groups->scale[h] + half * kHalfRows);
      for (int t = 0; t < T; ++t) {
        const auto* record = reinterpret_cast<const ActivationGroup*>(prepared + t * row_bytes);
        const __m256 scale = _mm256_mul_ps(weight_scale, _mm256_set1_ps(record->scale));
        acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[t]), scale, acc[t]);
        if constexpr (C == Codes::kUnsignedWithMin)
          acc[t] = _mm256_fmadd_ps(_mm256_load_ps(groups->min + half * kHalfRows), _mm256_set1_ps(record->scaled_sum),
                                   acc[t]);
      }
    }
  }
  for (int t = 0; t < T; ++t) _mm256_storeu_ps(sums + t * sums_stride, acc[t]);
}

template <Codes C>
void multiply_int8(const TileProduct& p, int start_offset) {
  using Dot = void (*)(const UnpackedGroup*, int, int64_t, int, const std::byte*, int64_t, float*, int64_t, bool);
  static constexpr Dot kDots[kInt8Tokens] = {dot_int8<C, 1>, dot_int8<C, 2>, dot_int8<C, 3>, dot_int8<C, 4>};
  static_assert(kBlockGroups * sizeof(UnpackedGroup) <= kTileScratchBytes, "scratch too small");
  const TileLayout& layout = *p.layout;
  auto* groups = reinterpret_cast<UnpackedGroup*>(p.scratch);
  for (int64_t tile = 0; tile < p.num_tiles; ++tile) {
    for (int64_t first = 0; first < layout.num_groups; first += kBlockGroups) {
      const int64_t left = layout.num_groups - first;
      const int64_t num_groups = left < kBlockGroups ? left : kBlockGroups;
      unpack_groups(layout, p.tiles + tile * layout.tile_bytes, first, num_groups, groups);
      for (int64_t t = 0; t < p.num_tokens; t += kInt8Tokens) {
        const int64_t tokens_left = p.num_tokens - t;
        const Dot dot = kDots[(tokens_left < kInt8Tokens ? tokens_left : kInt8Tokens) - 1];
        for (int half = 0; half < 2; ++half)
          dot(groups, half, num_groups, start_offset,
              p.prepared + t * p.prepared_row_bytes + first * sizeof(ActivationGroup), p.prepared_row_bytes,
              p.sums + t * p.sums_stride + tile * kTileRows + half * kHalfRows, p.sums_stride, first == 0);
      }
    }
  }
}

// The exact values of inputs [32 * group, + 32) of one tile.  out: [32][16]
void dequantize_group(const TileLayout& layout, const std::byte* tile, int64_t group, float* out) {
  const Parameters p = load_parameters(layout, tile, group);
  const bool is_nibble = layout.code_bytes == 256;
  const bool with_min = has_min(layout);
  const int zero = with_min                               ? 0
                   : layout.format == WeightFormat::kQ4_0 ? 8
                   : layout.format == WeightFormat::kQ5_0 ? 16
                   : layout.format == WeightFormat::kQ8_0 ? 128
                                                          : 32;
  const __m256i mask = _mm256_set1_epi32(is_nibble ? 0x0f : 0xff);
  const std::byte* codes = tile + group * layout.code_bytes;
  for (int k = 0; k < kGroupValues; ++k) {
    const __m128i shift = _mm_cvtsi32_si128(8 * (k % 4) + (is_nibble ? k % 8 / 4 * 4 : 0));
    for (int i = 0; i < 2; ++i) {
      const __m256i line = load_half_line(codes + (is_nibble ? k / 8 : k / 4) * 64 + i * 32);
      const __m256i code =
          _mm256_sub_epi32(_mm256_and_si256(_mm256_srl_epi32(line, shift), mask), _mm256_set1_epi32(zero));
      const __m256 value = _mm256_cvtepi32_ps(code);
      const __m256 scale = p.scale[k / 16][i];
      _mm256_store_ps(out + k * kTileRows + i * kHalfRows,
                      with_min ? _mm256_fmadd_ps(value, scale, p.min[i]) : _mm256_mul_ps(value, scale));
    }
  }
}

void expand_float(const TileLayout& layout, const std::byte* tile, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count * kTileRows; i += kHalfRows) {
    const int64_t index = first * kTileRows + i;
    __m256 value;
    if (layout.format == WeightFormat::kF32) {
      value = _mm256_loadu_ps(reinterpret_cast<const float*>(tile) + index);
    } else if (layout.format == WeightFormat::kF16) {
      value = load_halves(tile + 2 * index);
    } else {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + 2 * index));
      value = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    _mm256_store_ps(out + i, value);
  }
}

// 16 rows x T tokens over one K block of dequantised lines.
template <int T>
void dot_float(const float* lines, int64_t num_steps, const std::byte* prepared, int64_t row_bytes, float* sums,
               int64_t sums_stride, bool is_first_block) {
  __m256 acc[T][2];
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < 2; ++i)
      acc[t][i] = is_first_block ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + t * sums_stride + i * kHalfRows);
  for (int64_t k = 0; k < num_steps; ++k)
    for (int t = 0; t < T; ++t) {
      const __m256 input = _mm256_set1_ps(*reinterpret_cast<const float*>(prepared + t * row_bytes + 4 * k));
      for (int i = 0; i < 2; ++i)
        acc[t][i] = _mm256_fmadd_ps(_mm256_load_ps(lines + k * kTileRows + i * kHalfRows), input, acc[t][i]);
    }
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < 2; ++i) _mm256_storeu_ps(sums + t * sums_stride + i * kHalfRows, acc[t][i]);
}

void dot_tokens(const TileProduct& p, int64_t tile, const float* lines, int64_t first_step, int64_t num_steps) {
  using Dot = void (*)(const float*, int64_t, const std::byte*, int64_t, float*, int64_t, bool);
  static constexpr Dot kDots[kFloatTokens] = {dot_float<1>, dot_float<2>, dot_float<3>,
                                              dot_float<4>, dot_float<5>, dot_float<6>};
  for (int64_t t = 0; t < p.num_tokens; t += kFloatTokens) {
    const int64_t left = p.num_tokens - t;
    kDots[(left < kFloatTokens ? left : kFloatTokens) - 1](
        lines, num_steps, p.prepared + t * p.prepared_row_bytes + 4 * first_step, p.prepared_row_bytes,
        p.sums + t * p.sums_stride + tile * kTileRows, p.sums_stride, first_step == 0);
  }
}

}  // namespace

void multiply_int8_avx2(const TileProduct& product) {
  switch (product.layout->format) {
    case WeightFormat::kQ4_0:
      return multiply_int8<Codes::kUnsigned>(product, offsetof(ActivationGroup, start_zero8));
    case WeightFormat::kQ5_0:
      return multiply_int8<Codes::kUnsigned>(product, offsetof(ActivationGroup, start_zero16));
    case WeightFormat::kQ8_0:
      return multiply_int8<Codes::kSigned>(product, 0);
    case WeightFormat::kQ6_K:
      return multiply_int8<Codes::kUnsignedHalves>(product, offsetof(ActivationGroup, start_zero32));
    default:
      return multiply_int8<Codes::kUnsignedWithMin>(product, 0);
  }
}

void multiply_f32_avx2(const TileProduct& p) {
  static_assert(kBlockInputs * kTileRows * sizeof(float) <= kTileScratchBytes, "scratch too small");
  auto* values = reinterpret_cast<float*>(p.scratch);
  const TileLayout& layout = *p.layout;
  for (int64_t i = 0; i < p.num_tiles; ++i) {
    const std::byte* tile = p.tiles + i * layout.tile_bytes;
    for (int64_t first = 0; first < layout.in_features; first += kBlockInputs) {
      const int64_t left = layout.in_features - first;
      const int64_t count = left < kBlockInputs ? left : kBlockInputs;
      if (layout.num_groups == 0) {
        expand_float(layout, tile, first, count, values);
      } else {
        for (int64_t k = 0; k < count; k += kGroupValues)
          dequantize_group(layout, tile, (first + k) / kGroupValues, values + k * kTileRows);
      }
      dot_tokens(p, i, values, first, count);
    }
  }
}

}  // namespace partita

#endif  // __x86_64__
