// fp32 matmul, for the exact mode and for bf16 activations (whose rounded values are fp32 by the time they meet).
// One fp32 accumulator per (token, row), one fused multiply-add per input, K ascending, whatever the shape.
//
// VDPBF16PS was measured at half the operations per second of fp32 FMA on Emerald Rapids (machine_peaks), so bf16
// weights are widened (a shift) and multiplied as fp32.
#if defined(__x86_64__)
// GCC 12 calls the deliberately undefined operand of its own intrinsics uninitialised (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "gemm/cpu/tiles_ahead.h"
#include "gemm/kernels.h"

namespace partita {
namespace {

constexpr int kTileTokens = 12;        // x 2 tiles of rows: 24 accumulators
constexpr int64_t kBlockInputs = 128;  // K block of dequantised weights: 2 x 16 rows x 128 x 4 bytes = 16 KB
constexpr int kMaxStreamTokens = 8;    // float weights are read straight from packed tiles up to here

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

// Input k of a float tile, 16 rows.
template <WeightFormat F>
inline __attribute__((always_inline)) __m512 load_float_line(const std::byte* tile, int64_t k) {
  if constexpr (F == WeightFormat::kF32) return _mm512_load_ps(tile + k * 64);
  if constexpr (F == WeightFormat::kF16) return load_halves(tile + k * 32);
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + k * 32));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <WeightFormat F>
void widen_float(const std::byte* tile, int64_t first_input, int64_t num_inputs, float* out, int64_t stride) {
  for (int64_t k = 0; k < num_inputs; ++k) _mm512_store_ps(out + k * stride, load_float_line<F>(tile, first_input + k));
}

void expand_inputs(const TileLayout& layout, const std::byte* tile, int64_t first, int64_t count, float* out,
                   int64_t stride) {
  switch (layout.format) {
    case WeightFormat::kF32:
      return widen_float<WeightFormat::kF32>(tile, first, count, out, stride);
    case WeightFormat::kF16:
      return widen_float<WeightFormat::kF16>(tile, first, count, out, stride);
    case WeightFormat::kBF16:
      return widen_float<WeightFormat::kBF16>(tile, first, count, out, stride);
    default:
      for (int64_t k = 0; k < count; k += kGroupValues)
        dequantize_group(layout, tile, (first + k) / kGroupValues, out + k * stride, stride);
  }
}

// R tiles x T tokens over one K block of fp32 weights.  weights: [num_inputs][R][16]
template <int R, int T>
void dot_block(const float* weights, int64_t num_inputs, const std::byte* prepared, int64_t row_bytes, float* sums,
               int64_t sums_stride, bool is_first_block) {
  __m512 acc[T][R];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
      acc[t][r] = is_first_block ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + t * sums_stride + r * 16);
  for (int64_t k = 0; k < num_inputs; ++k) {
    __m512 line[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) line[r] = _mm512_load_ps(weights + (k * R + r) * 16);
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      const __m512 input = _mm512_set1_ps(*reinterpret_cast<const float*>(prepared + t * row_bytes + 4 * k));
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) acc[t][r] = _mm512_fmadd_ps(line[r], input, acc[t][r]);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(sums + t * sums_stride + r * 16, acc[t][r]);
}

template <int R>
void multiply_expanded(const TileProduct& p, int64_t first_tile) {
  using Dot = void (*)(const float*, int64_t, const std::byte*, int64_t, float*, int64_t, bool);
  static constexpr Dot kDots[kTileTokens] = {dot_block<R, 1>, dot_block<R, 2>,  dot_block<R, 3>,  dot_block<R, 4>,
                                             dot_block<R, 5>, dot_block<R, 6>,  dot_block<R, 7>,  dot_block<R, 8>,
                                             dot_block<R, 9>, dot_block<R, 10>, dot_block<R, 11>, dot_block<R, 12>};
  static_assert(2 * kBlockInputs * kTileRows * 4 <= static_cast<int64_t>(kTileScratchBytes), "scratch too small");
  const TileLayout& layout = *p.layout;
  auto* values = reinterpret_cast<float*>(p.scratch);
  const int64_t num_token_tiles = (p.num_tokens + kTileTokens - 1) / kTileTokens;
  const int64_t num_blocks = (layout.in_features + kBlockInputs - 1) / kBlockInputs;
  LinesToCome next(p.tiles + (first_tile + R) * layout.tile_bytes, R * layout.tile_bytes, p.prefetch_end,
                   num_blocks * num_token_tiles);
  for (int64_t first = 0; first < layout.in_features; first += kBlockInputs) {
    const int64_t left = layout.in_features - first;
    const int64_t num_inputs = left < kBlockInputs ? left : kBlockInputs;
    for (int r = 0; r < R; ++r)
      expand_inputs(layout, p.tiles + (first_tile + r) * layout.tile_bytes, first, num_inputs, values + r * kTileRows,
                    R * kTileRows);
    for (int64_t i = 0; i < num_token_tiles; ++i) {
      const int64_t token = p.num_tokens * i / num_token_tiles;
      const int64_t tile_tokens = p.num_tokens * (i + 1) / num_token_tiles - token;
      next.step();
      kDots[tile_tokens - 1](values, num_inputs, p.prepared + token * p.prepared_row_bytes + first * 4,
                             p.prepared_row_bytes, p.sums + token * p.sums_stride + first_tile * kTileRows,
                             p.sums_stride, first == 0);
    }
  }
}

// Few tokens over R float tiles as they lie in memory.
template <WeightFormat F, int R, int T>
void dot_stream(const std::byte* tiles, int64_t tile_bytes, const std::byte* prefetch_end, int64_t num_inputs,
                const std::byte* prepared, int64_t row_bytes, float* sums, int64_t sums_stride) {
  constexpr int kLineInputs = F == WeightFormat::kF32 ? 1 : 2;
  TilesAhead<R> ahead(tiles, tile_bytes, prefetch_end);
  __m512 acc[T][R];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[t][r] = _mm512_setzero_ps();
  for (int64_t k = 0; k < num_inputs; ++k) {
    if (k % kLineInputs == 0) ahead.template advance<1>();
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512 line = load_float_line<F>(tiles + r * tile_bytes, k);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
        acc[t][r] = _mm512_fmadd_ps(
            line, _mm512_set1_ps(*reinterpret_cast<const float*>(prepared + t * row_bytes + 4 * k)), acc[t][r]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(sums + t * sums_stride + r * 16, acc[t][r]);
}

template <WeightFormat F>
void multiply_stream(const TileProduct& p) {
  using Dot =
      void (*)(const std::byte*, int64_t, const std::byte*, int64_t, const std::byte*, int64_t, float*, int64_t);
  static constexpr Dot kTwo[kMaxStreamTokens] = {dot_stream<F, 2, 1>, dot_stream<F, 2, 2>, dot_stream<F, 2, 3>,
                                                 dot_stream<F, 2, 4>, dot_stream<F, 2, 5>, dot_stream<F, 2, 6>,
                                                 dot_stream<F, 2, 7>, dot_stream<F, 2, 8>};
  static constexpr Dot kOne[kMaxStreamTokens] = {dot_stream<F, 1, 1>, dot_stream<F, 1, 2>, dot_stream<F, 1, 3>,
                                                 dot_stream<F, 1, 4>, dot_stream<F, 1, 5>, dot_stream<F, 1, 6>,
                                                 dot_stream<F, 1, 7>, dot_stream<F, 1, 8>};
  const TileLayout& layout = *p.layout;
  for (int64_t tile = 0; tile < p.num_tiles;) {
    const bool is_pair = tile + 2 <= p.num_tiles;
    (is_pair ? kTwo : kOne)[p.num_tokens - 1](p.tiles + tile * layout.tile_bytes, layout.tile_bytes, p.prefetch_end,
                                              layout.in_features, p.prepared, p.prepared_row_bytes,
                                              p.sums + tile * kTileRows, p.sums_stride);
    tile += is_pair ? 2 : 1;
  }
}

}  // namespace

void multiply_f32_avx512(const TileProduct& p) {
  if (p.num_tokens <= kMaxStreamTokens && p.layout->num_groups == 0) {
    if (p.layout->format == WeightFormat::kF32) return multiply_stream<WeightFormat::kF32>(p);
    if (p.layout->format == WeightFormat::kF16) return multiply_stream<WeightFormat::kF16>(p);
    return multiply_stream<WeightFormat::kBF16>(p);
  }
  int64_t tile = 0;
  for (; tile + 2 <= p.num_tiles; tile += 2) multiply_expanded<2>(p, tile);
  if (tile < p.num_tiles) multiply_expanded<1>(p, tile);
}

}  // namespace partita

#endif  // __x86_64__
