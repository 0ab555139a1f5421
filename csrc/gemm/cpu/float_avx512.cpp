// fp32 (exact) and bf16 matmul. One fp32 accumulator per (token, row), K ascending, whatever the shape.
#if defined(__x86_64__)
// GCC 12 calls the deliberately undefined operand of its own intrinsics uninitialised (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "gemm/kernels.h"

namespace partita {
namespace {

constexpr int kTileTokens = 12;        // x 2 tiles of rows: 24 accumulators
constexpr int64_t kBlockInputs = 128;  // K block of dequantised weights: 2 x 16 rows x 128 x 4 bytes = 16 KB
constexpr int64_t kBlockPairs = 256;   // K block of bf16 pairs: 2 tiles x 256 lines = 32 KB

__m512 load_halves(const std::byte* halves) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
}
__m512 load_bytes(const std::byte* bytes, bool is_signed) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(packed) : _mm512_cvtepu8_epi32(packed));
}

// The exact values of inputs [32 * group, + 32) of one tile; out[k * stride] is [16] rows.
void dequantize_group(const TileLayout& layout, const std::byte* tile, int64_t group, float* out, int64_t stride) {
  const std::byte* record = tile + layout.parameter_offset + group * layout.parameter_bytes;
  const std::byte* super = tile + layout.super_offset + group / 8 * layout.super_bytes;
  __m512 scale[2], min = _mm512_setzero_ps();
  int zero = 0;
  bool has_min = false;
  switch (layout.format) {
    case WeightFormat::kQ4_K:
      scale[0] = scale[1] = _mm512_mul_ps(load_halves(super), load_bytes(record, false));
      min =
          _mm512_xor_ps(_mm512_mul_ps(load_halves(super + 32), load_bytes(record + 16, false)), _mm512_set1_ps(-0.0f));
      has_min = true;
      break;
    case WeightFormat::kQ6_K:
      scale[0] = _mm512_mul_ps(load_halves(super), load_bytes(record, true));
      scale[1] = _mm512_mul_ps(load_halves(super), load_bytes(record + 16, true));
      zero = 32;
      break;
    case WeightFormat::kQ4_1:
      scale[0] = scale[1] = load_halves(record);
      min = load_halves(record + 32);
      has_min = true;
      break;
    default:
      scale[0] = scale[1] = load_halves(record);
      zero = layout.format == WeightFormat::kQ4_0 ? 8 : layout.format == WeightFormat::kQ5_0 ? 16 : 128;
      break;
  }
  // scale * (code - zero) rounds at most once (Q6_K), scale * code + min once: fma gives the format's exact value.
  const bool is_nibble = layout.code_bytes == 256;
  const __m512i mask = _mm512_set1_epi32(is_nibble ? 0x0f : 0xff);
  const __m512i zeros = _mm512_set1_epi32(zero);
  const std::byte* codes = tile + group * layout.code_bytes;
  for (int k = 0; k < kGroupValues; ++k) {
    const std::byte* line = codes + (is_nibble ? k / 8 : k / 4) * 64;
    const int shift = 8 * (k % 4) + (is_nibble ? k % 8 / 4 * 4 : 0);
    const __m512i code = _mm512_and_si512(_mm512_srl_epi32(_mm512_load_si512(line), _mm_cvtsi32_si128(shift)), mask);
    const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, zeros));
    const __m512 group_scale = scale[k / 16];
    _mm512_store_ps(out + k * stride,
                    has_min ? _mm512_fmadd_ps(value, group_scale, min) : _mm512_mul_ps(value, group_scale));
  }
}

void expand_float(const TileLayout& layout, const std::byte* tile, int64_t first_input, int64_t num_inputs, float* out,
                  int64_t stride) {
  for (int64_t k = 0; k < num_inputs; ++k) {
    const int64_t index = (first_input + k) * kTileRows;
    __m512 value;
    if (layout.format == WeightFormat::kF32) {
      value = _mm512_loadu_ps(reinterpret_cast<const float*>(tile) + index);
    } else if (layout.format == WeightFormat::kF16) {
      value = load_halves(tile + index * 2);
    } else {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + index * 2));
      value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    _mm512_store_ps(out + k * stride, value);
  }
}

struct F32Step {
  static __m512 multiply_add(__m512 acc, const std::byte* weight, const std::byte* activation) {
    return _mm512_fmadd_ps(_mm512_load_ps(weight), _mm512_set1_ps(*reinterpret_cast<const float*>(activation)), acc);
  }
};

struct BF16Step {
  static __m512 multiply_add(__m512 acc, const std::byte* weight, const std::byte* activation) {
    const __m512i pair = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(activation));
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_load_si512(weight), (__m512bh)pair);
  }
};

// R tiles x T tokens over num_steps lines of weights and 4-byte pieces of activations.
template <typename Step, int R, int T>
void dot_block(const std::byte* weights, int64_t line_bytes, int64_t tile_bytes, int64_t num_steps,
               const std::byte* prepared, int64_t row_bytes, float* sums, int64_t sums_stride, bool is_first_block) {
  __m512 acc[T][R];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
      acc[t][r] = is_first_block ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + t * sums_stride + r * 16);
  for (int64_t k = 0; k < num_steps; ++k) {
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r)
        acc[t][r] = Step::multiply_add(acc[t][r], weights + r * tile_bytes, prepared + t * row_bytes + 4 * k);
    weights += line_bytes;
  }
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(sums + t * sums_stride + r * 16, acc[t][r]);
}

using DotBlock = void (*)(const std::byte*, int64_t, int64_t, int64_t, const std::byte*, int64_t, float*, int64_t,
                          bool);
template <typename Step, int R>
constexpr DotBlock kDotBlocks[kTileTokens] = {dot_block<Step, R, 1>,  dot_block<Step, R, 2>,  dot_block<Step, R, 3>,
                                              dot_block<Step, R, 4>,  dot_block<Step, R, 5>,  dot_block<Step, R, 6>,
                                              dot_block<Step, R, 7>,  dot_block<Step, R, 8>,  dot_block<Step, R, 9>,
                                              dot_block<Step, R, 10>, dot_block<Step, R, 11>, dot_block<Step, R, 12>};

template <typename Step, int R>
void dot_tokens(const TileProduct& p, int64_t first_tile, const std::byte* weights, int64_t line_bytes,
                int64_t tile_bytes, int64_t first_step, int64_t num_steps) {
  const int64_t num_token_tiles = (p.num_tokens + kTileTokens - 1) / kTileTokens;
  for (int64_t i = 0; i < num_token_tiles; ++i) {
    const int64_t token = p.num_tokens * i / num_token_tiles;
    const int64_t tile_tokens = p.num_tokens * (i + 1) / num_token_tiles - token;
    kDotBlocks<Step, R>[tile_tokens - 1](
        weights, line_bytes, tile_bytes, num_steps, p.prepared + token* p.prepared_row_bytes + first_step* 4,
        p.prepared_row_bytes, p.sums + token* p.sums_stride + first_tile* kTileRows, p.sums_stride, first_step == 0);
  }
}

template <int R>
void multiply_f32_tiles(const TileProduct& p, int64_t first_tile) {
  static_assert(2 * kBlockInputs * kTileRows * 4 <= static_cast<int64_t>(kTileScratchBytes), "scratch too small");
  const TileLayout& layout = *p.layout;
  auto* values = reinterpret_cast<float*>(p.scratch);
  for (int64_t first = 0; first < layout.in_features; first += kBlockInputs) {
    const int64_t left = layout.in_features - first;
    const int64_t num_inputs = left < kBlockInputs ? left : kBlockInputs;
    for (int r = 0; r < R; ++r) {
      const std::byte* tile = p.tiles + (first_tile + r) * layout.tile_bytes;
      float* out = values + r * kTileRows;
      if (layout.num_groups == 0) {
        expand_float(layout, tile, first, num_inputs, out, R * kTileRows);
      } else {
        for (int64_t k = 0; k < num_inputs; k += kGroupValues)
          dequantize_group(layout, tile, (first + k) / kGroupValues, out + k * R * kTileRows, R * kTileRows);
      }
    }
    dot_tokens<F32Step, R>(p, first_tile, p.scratch, R * 64, 64, first, num_inputs);
  }
}

template <int R>
void multiply_bf16_tiles(const TileProduct& p, int64_t first_tile) {
  const TileLayout& layout = *p.layout;
  const int64_t num_pairs = (layout.in_features + 1) / 2;
  for (int64_t first = 0; first < num_pairs; first += kBlockPairs) {
    const int64_t left = num_pairs - first;
    dot_tokens<BF16Step, R>(p, first_tile, p.tiles + first_tile * layout.tile_bytes + first * 64, 64, layout.tile_bytes,
                            first, left < kBlockPairs ? left : kBlockPairs);
  }
}

}  // namespace

void multiply_f32_avx512(const TileProduct& product) {
  int64_t tile = 0;
  for (; tile + 2 <= product.num_tiles; tile += 2) multiply_f32_tiles<2>(product, tile);
  if (tile < product.num_tiles) multiply_f32_tiles<1>(product, tile);
}

void multiply_bf16_avx512(const TileProduct& product) {
  int64_t tile = 0;
  for (; tile + 2 <= product.num_tiles; tile += 2) multiply_bf16_tiles<2>(product, tile);
  if (tile < product.num_tiles) multiply_bf16_tiles<1>(product, tile);
}

}  // namespace partita

#endif  // __x86_64__
