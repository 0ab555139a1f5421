// int8 matmul on VNNI. Weights are the unsigned operand of vpdpbusd (16 rows x 4 inputs per register), activations
// the signed one, broadcast from memory 4 at a time.
//
// One accumulation order for all shapes: the int32 dot of a group is exact, then
//   acc = fma(float(dot), weight_scale * activation_scale, acc);  acc = fma(min, scaled_sum, acc)
// over groups in ascending order, in one fp32 accumulator per (token, row).
#if defined(__x86_64__)
// GCC 12 calls the deliberately undefined operand of its own intrinsics uninitialised (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "gemm/cpu/tiles_ahead.h"
#include "gemm/kernels.h"

namespace partita {
namespace {

constexpr int kMaxPackedTokens = 8;  // read straight from packed tiles, unpacked in registers
constexpr int kTileTokens = 6;       // x 2 tiles of rows: 12 int32 + 12 fp32 accumulators
constexpr int kBlockGroups = 18;  // K block of unpacked weights: 23 KB, so that it stays in L1 beside the activations

struct Parameters {
  __m512 scale[2];  // Q6_K: of each half group
  __m512 min;
};

__m512 load_halves(const std::byte* halves) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
}
__m512 load_unsigned_bytes(const std::byte* bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
}
__m512 load_signed_bytes(const std::byte* bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
}
__m512i load_line(const std::byte* line) { return _mm512_load_si512(line); }
__m512i broadcast_i32(const void* value) { return _mm512_set1_epi32(*static_cast<const int32_t*>(value)); }
__m512 broadcast_f32(const float* value) { return _mm512_set1_ps(*value); }

constexpr bool is_nibble(WeightFormat format) {
  return format == WeightFormat::kQ4_0 || format == WeightFormat::kQ4_1 || format == WeightFormat::kQ4_K;
}
constexpr bool has_min(WeightFormat format) { return format == WeightFormat::kQ4_1 || format == WeightFormat::kQ4_K; }
constexpr int num_halves(WeightFormat format) { return format == WeightFormat::kQ6_K ? 2 : 1; }

// Where in an ActivationGroup the int32 start of a symmetric format's dot lies.
constexpr int start_offset(WeightFormat format) {
  return format == WeightFormat::kQ4_0   ? static_cast<int>(offsetof(ActivationGroup, start_zero8))
         : format == WeightFormat::kQ5_0 ? static_cast<int>(offsetof(ActivationGroup, start_zero16))
         : format == WeightFormat::kQ8_0 ? static_cast<int>(offsetof(ActivationGroup, start_zero128))
                                         : static_cast<int>(offsetof(ActivationGroup, start_zero32));
}

template <WeightFormat F>
Parameters load_parameters(const TileLayout& layout, const std::byte* tile, int64_t group) {
  Parameters parameters;
  const std::byte* record = tile + layout.parameter_offset + group * (F == WeightFormat::kQ4_1 ? 64 : 32);
  if constexpr (F == WeightFormat::kQ4_K) {
    const std::byte* super = tile + layout.super_offset + group / 8 * 64;
    parameters.scale[0] = _mm512_mul_ps(load_halves(super), load_unsigned_bytes(record));
    const __m512 min = _mm512_mul_ps(load_halves(super + 32), load_unsigned_bytes(record + 16));
    parameters.min = _mm512_xor_ps(min, _mm512_set1_ps(-0.0f));
  } else if constexpr (F == WeightFormat::kQ6_K) {
    const __m512 super = load_halves(tile + layout.super_offset + group / 8 * 32);
    parameters.scale[0] = _mm512_mul_ps(super, load_signed_bytes(record));
    parameters.scale[1] = _mm512_mul_ps(super, load_signed_bytes(record + 16));
  } else {
    parameters.scale[0] = load_halves(record);
    if constexpr (F == WeightFormat::kQ4_1) parameters.min = load_halves(record + 32);
  }
  return parameters;
}

// The codes of inputs [4j, 4j + 4) of a group. Two neighbouring j share a line of nibbles.
template <WeightFormat F>
inline __attribute__((always_inline)) __m512i load_codes(const std::byte* tile, int64_t group, int j) {
  if constexpr (!is_nibble(F)) return load_line(tile + group * 512 + j * 64);
  const __m512i packed = load_line(tile + group * 256 + j / 2 * 64);
  return _mm512_and_si512(j % 2 ? _mm512_srli_epi16(packed, 4) : packed, _mm512_set1_epi8(0x0f));
}

// Few tokens: one pass over R packed tiles as they lie in memory. Two tiles share each broadcast of an activation and
// give the dots twice as many sums to wait for.
template <WeightFormat F, int R, int T>
void dot_packed_tiles(const TileLayout& layout, const std::byte* tiles, const std::byte* prefetch_end,
                      const std::byte* prepared, int64_t row_bytes, float* sums, int64_t sums_stride) {
  constexpr int kHalves = num_halves(F);
  constexpr int kSteps = 8 / kHalves;
  constexpr int kSums = R * T <= 2 ? 2 : 1;
  // A tile is one stream of kLines lines per group, parameters included, and so is the run of tiles.
  constexpr int kLines = is_nibble(F) ? 5 : 9;
  // From R * T = 14 on the registers hold the dots alone and the sums stay in L1.
  constexpr bool kSumsInMemory = R * T >= 14;
  __m512 acc[T][R];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      acc[t][r] = _mm512_setzero_ps();
      if constexpr (kSumsInMemory) _mm512_storeu_ps(sums + t * sums_stride + r * kTileRows, acc[t][r]);
    }
  const int64_t num_groups = layout.num_groups;
  TilesAhead<R> ahead(tiles, layout.tile_bytes, prefetch_end);
  for (int64_t g = 0; g < num_groups; ++g) {
    ahead.template advance<kLines>();
    Parameters parameters[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) parameters[r] = load_parameters<F>(layout, tiles + r * layout.tile_bytes, g);
    const std::byte* group = prepared + g * sizeof(ActivationGroup);
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) {
      // Neighbouring instructions belong to different sums: a token's own eight dots in a row, at 5 cycles each, fill
      // the scheduler (M = 8 ran at 79 % of this). A lone token has two sums for each tile.
      __m512i dot[kSums][T][R];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          dot[0][t][r] =
              has_min(F) ? _mm512_setzero_si512() : broadcast_i32(group + t * row_bytes + start_offset(F) + 4 * h);
          if constexpr (kSums == 2) dot[1][t][r] = _mm512_setzero_si512();
        }
#pragma GCC unroll 8
      for (int j = h * kSteps; j < (h + 1) * kSteps; ++j) {
        __m512i codes[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) codes[r] = load_codes<F>(tiles + r * layout.tile_bytes, g, j);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const __m512i activation = broadcast_i32(group + t * row_bytes + 4 * j);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r)
            dot[j % kSums][t][r] = _mm512_dpbusd_epi32(dot[j % kSums][t][r], codes[r], activation);
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const auto* record = reinterpret_cast<const ActivationGroup*>(group + t * row_bytes);
        const __m512 activation_scale = broadcast_f32(&record->scale);
        const __m512 scaled_sum = broadcast_f32(&record->scaled_sum);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          float* in_memory = sums + t * sums_stride + r * kTileRows;
          if constexpr (kSumsInMemory) acc[t][r] = _mm512_loadu_ps(in_memory);
          const __m512i sum = kSums == 2 ? _mm512_add_epi32(dot[0][t][r], dot[kSums - 1][t][r]) : dot[0][t][r];
          const __m512 scale = _mm512_mul_ps(parameters[r].scale[h], activation_scale);
          acc[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[t][r]);
          if constexpr (has_min(F)) acc[t][r] = _mm512_fmadd_ps(parameters[r].min, scaled_sum, acc[t][r]);
          if constexpr (kSumsInMemory) _mm512_storeu_ps(in_memory, acc[t][r]);
        }
      }
    }
  }
  if constexpr (kSumsInMemory) return;
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(sums + t * sums_stride + r * kTileRows, acc[t][r]);
}

// An unpacked group of R tiles: [8][R] lines of u8 codes (of nibbles), [halves][R][16] fp32 scales, [R][16] fp32 mins.
template <WeightFormat F>
constexpr int unpacked_group_bytes(int num_tiles) {
  return num_tiles * (512 + 64 * num_halves(F) + (has_min(F) ? 64 : 0));
}

// A K block of R tiles: groups [first, end).
struct WeightBlock {
  const TileLayout* layout;
  const std::byte* tiles;
  int64_t first_group, end_group;
  std::byte* unpacked;
};

// Many tokens: R tiles x T tokens over one K block. The first tokens unpack it on their way, so that the stores of
// unpacking go on beside their dots; the others read what they left.
template <WeightFormat F, int R, int T, bool kUnpacks>
void dot_block(const WeightBlock& block, const std::byte* prepared, int64_t row_bytes, float* sums,
               int64_t sums_stride) {
  constexpr int kHalves = num_halves(F);
  constexpr int kSteps = 8 / kHalves;
  __m512 acc[T][R];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
      acc[t][r] = block.first_group == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + t * sums_stride + r * 16);
  std::byte* unpacked = block.unpacked;
  prepared += block.first_group * sizeof(ActivationGroup);
  for (int64_t g = block.first_group; g < block.end_group; ++g) {
    auto* floats = reinterpret_cast<float*>(unpacked + 512 * R);
    if constexpr (kUnpacks) {
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const Parameters parameters = load_parameters<F>(*block.layout, block.tiles + r * block.layout->tile_bytes, g);
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h) _mm512_store_ps(floats + (h * R + r) * 16, parameters.scale[h]);
        if constexpr (has_min(F)) _mm512_store_ps(floats + (kHalves * R + r) * 16, parameters.min);
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) {
      __m512i dot[T][R];
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) {
        const __m512i start =
            has_min(F) ? _mm512_setzero_si512() : broadcast_i32(prepared + t * row_bytes + start_offset(F) + 4 * h);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) dot[t][r] = start;
      }
#pragma GCC unroll 8
      for (int j = h * kSteps; j < (h + 1) * kSteps; ++j) {
        __m512i codes[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          std::byte* line = unpacked + (j * R + r) * 64;
          // Bytes are dotted where they lie.
          constexpr bool kCopies = is_nibble(F);
          codes[r] =
              kUnpacks || !kCopies ? load_codes<F>(block.tiles + r * block.layout->tile_bytes, g, j) : load_line(line);
          if constexpr (kUnpacks && kCopies) _mm512_store_si512(line, codes[r]);
        }
#pragma GCC unroll 6
        for (int t = 0; t < T; ++t) {
          const __m512i activation = broadcast_i32(prepared + t * row_bytes + 4 * j);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) dot[t][r] = _mm512_dpbusd_epi32(dot[t][r], codes[r], activation);
        }
      }
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) {
        const auto* record = reinterpret_cast<const ActivationGroup*>(prepared + t * row_bytes);
        const __m512 activation_scale = broadcast_f32(&record->scale);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          const __m512 scale = _mm512_mul_ps(_mm512_load_ps(floats + (h * R + r) * 16), activation_scale);
          acc[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t][r]), scale, acc[t][r]);
        }
        if constexpr (has_min(F)) {
          const __m512 scaled_sum = broadcast_f32(&record->scaled_sum);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r)
            acc[t][r] = _mm512_fmadd_ps(_mm512_load_ps(floats + (kHalves * R + r) * 16), scaled_sum, acc[t][r]);
        }
      }
    }
    unpacked += unpacked_group_bytes<F>(R);
    prepared += sizeof(ActivationGroup);
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(sums + t * sums_stride + r * 16, acc[t][r]);
}

template <WeightFormat F, int R>
void multiply_packed(const TileProduct& p, int64_t first_tile) {
  using Dot =
      void (*)(const TileLayout&, const std::byte*, const std::byte*, const std::byte*, int64_t, float*, int64_t);
  static constexpr Dot kDots[kMaxPackedTokens] = {
      dot_packed_tiles<F, R, 1>, dot_packed_tiles<F, R, 2>, dot_packed_tiles<F, R, 3>, dot_packed_tiles<F, R, 4>,
      dot_packed_tiles<F, R, 5>, dot_packed_tiles<F, R, 6>, dot_packed_tiles<F, R, 7>, dot_packed_tiles<F, R, 8>};
  kDots[p.num_tokens - 1](*p.layout, p.tiles + first_tile * p.layout->tile_bytes, p.prefetch_end, p.prepared,
                          p.prepared_row_bytes, p.sums + first_tile * kTileRows, p.sums_stride);
}

template <WeightFormat F, int R>
void multiply_unpacked(const TileProduct& p, int64_t first_tile) {
  using Dot = void (*)(const WeightBlock&, const std::byte*, int64_t, float*, int64_t);
  // Of more than 8 tokens in tiles of up to 6 none has fewer than 4.
  static_assert(kMaxPackedTokens == 8 && kTileTokens == 6, "tiles of 1 to 3 tokens are not compiled");
  static constexpr Dot kDots[2][3] = {{dot_block<F, R, 4, false>, dot_block<F, R, 5, false>, dot_block<F, R, 6, false>},
                                      {dot_block<F, R, 4, true>, dot_block<F, R, 5, true>, dot_block<F, R, 6, true>}};
  static_assert(kBlockGroups * unpacked_group_bytes<F>(2) <= static_cast<int>(kTileScratchBytes), "scratch too small");
  const TileLayout& layout = *p.layout;
  const int64_t num_blocks = (layout.num_groups + kBlockGroups - 1) / kBlockGroups;
  const int64_t num_token_tiles = (p.num_tokens + kTileTokens - 1) / kTileTokens;
  LinesToCome next(p.tiles + (first_tile + R) * layout.tile_bytes, R * layout.tile_bytes, p.prefetch_end,
                   num_blocks * num_token_tiles);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const WeightBlock weights{&layout, p.tiles + first_tile * layout.tile_bytes, layout.num_groups * block / num_blocks,
                              layout.num_groups * (block + 1) / num_blocks, p.scratch};
    for (int64_t i = 0; i < num_token_tiles; ++i) {
      const int64_t token = p.num_tokens * i / num_token_tiles;
      const int64_t tile_tokens = p.num_tokens * (i + 1) / num_token_tiles - token;
      next.step();
      kDots[i == 0][tile_tokens - 4](weights, p.prepared + token * p.prepared_row_bytes, p.prepared_row_bytes,
                                     p.sums + token * p.sums_stride + first_tile * kTileRows, p.sums_stride);
    }
  }
}

template <WeightFormat F>
void multiply(const TileProduct& p) {
  const bool is_few = p.num_tokens <= kMaxPackedTokens;
  int64_t tile = 0;
  for (; tile + 2 <= p.num_tiles; tile += 2) (is_few ? multiply_packed<F, 2> : multiply_unpacked<F, 2>)(p, tile);
  if (tile < p.num_tiles) (is_few ? multiply_packed<F, 1> : multiply_unpacked<F, 1>)(p, tile);
}

}  // namespace

void multiply_int8_avx512(const TileProduct& product) {
  switch (product.layout->format) {
    case WeightFormat::kQ4_0:
      return multiply<WeightFormat::kQ4_0>(product);
    case WeightFormat::kQ4_1:
      return multiply<WeightFormat::kQ4_1>(product);
    case WeightFormat::kQ5_0:
      return multiply<WeightFormat::kQ5_0>(product);
    case WeightFormat::kQ8_0:
      return multiply<WeightFormat::kQ8_0>(product);
    case WeightFormat::kQ4_K:
      return multiply<WeightFormat::kQ4_K>(product);
    case WeightFormat::kQ6_K:
      return multiply<WeightFormat::kQ6_K>(product);
    default:  // select.cpp gives float weights to the bf16 kernels
      return;
  }
}

}  // namespace partita

#endif  // __x86_64__
