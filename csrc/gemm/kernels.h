// What a kernel family gives: one table of functions per (activation type, instruction set).
// The packed layout is the same on every instruction set; the loops are each set's own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gemm/gemm.h"
#include "gemm/packed_tile.h"

namespace partita {

// One group of a token's int8 input with all that a dot with it needs, in one cache line. The start values turn
// unsigned weight codes into signed ones: sum((w - zero) * a) = sum(w * a) - zero * sum(a).
struct alignas(64) ActivationGroup {
  int8_t codes[kGroupValues];  // round-to-nearest-even(x * 127 / absmax)
  float scale;                 // absmax / 127
  float scaled_sum;            // scale * sum: what a weight's min multiplies
  int32_t start_zero8;         // -8 * sum
  int32_t start_zero16;        // -16 * sum
  int32_t start_zero128;       // -128 * sum
  int32_t start_zero32[2];     // -32 * sum of each half (groups of 16)
  int32_t sum;
};
static_assert(sizeof(ActivationGroup) == 64, "an activation group is one cache line");

// Groups whose absmax is below this count as zero: 127 / absmax would not be finite.
inline constexpr float kMinAbsmax = 1e-36f;

// Room for a block of unpacked weights; every family cuts K so that its block fits.
inline constexpr size_t kTileScratchBytes = 64 * 1024;

// sums[t, 16 * tile + row] = dot of prepared row t with that row of that tile, one fp32 accumulator, K ascending.
struct TileProduct {
  const TileLayout* layout;
  const std::byte* tiles;  // num_tiles tiles, layout->tile_bytes apart
  int64_t num_tiles;
  const std::byte* prefetch_end;  // the caller will probably multiply the tiles up to here next
  const std::byte* prepared;      // num_tokens prepared rows
  int64_t prepared_row_bytes;
  int64_t num_tokens;
  float* sums;  // [num_tokens, sums_stride]; columns [0, 16 * num_tiles) are written
  int64_t sums_stride;
  std::byte* scratch;  // kTileScratchBytes, 64-byte aligned
};

struct SumsStore {
  const float* sums;     // [num_tokens, sums_stride]: the values, or the gate's
  const float* up_sums;  // null unless gated
  int64_t sums_stride;
  int64_t num_tokens;
  int64_t num_rows;
  float* out;  // [num_tokens, out_stride], at the first row
  int64_t out_stride;
  const float* bias;  // at the first row, or null
  const float* up_bias;
  bool add_to_out;
  GateActivation gate;
};

struct TileKernels {
  ActivationType activation_type;
  int64_t max_decode_tokens;  // up to here a call reads packed tiles once and is bound by memory
  int64_t token_block;        // most tokens of one call
  void (*prepare_row)(const float* x, const float* norm_weight, float norm_eps, int64_t in_features,
                      std::byte* prepared);
  void (*multiply)(const TileProduct& product);
  void (*store)(const SumsStore& store);
};

// One prepared row: whole cache lines, an odd number of them so that rows do not meet in one cache set.
inline int64_t prepared_row_bytes(ActivationType type, int64_t in_features) {
  int64_t lines = 0;
  if (type == ActivationType::kInt8) lines = in_features / kGroupValues;
  if (type != ActivationType::kInt8)
    lines = (in_features + 15) / 16;  // bf16 values are held as fp32, ready to multiply
  return (lines | 1) * 64;
}

// The parts that select.cpp puts together; each lies in cpu/<part>_<isa>.cpp.
#define PARTITA_DECLARE_GEMM_PARTS(isa)                                                                      \
  void prepare_int8_row_##isa(const float* x, const float* norm_weight, float norm_eps, int64_t in_features, \
                              std::byte* prepared);                                                          \
  void prepare_bf16_row_##isa(const float* x, const float* norm_weight, float norm_eps, int64_t in_features, \
                              std::byte* prepared);                                                          \
  void prepare_f32_row_##isa(const float* x, const float* norm_weight, float norm_eps, int64_t in_features,  \
                             std::byte* prepared);                                                           \
  void store_sums_##isa(const SumsStore& store);                                                             \
  void multiply_int8_##isa(const TileProduct& product);                                                      \
  void multiply_f32_##isa(const TileProduct& product);
PARTITA_DECLARE_GEMM_PARTS(portable)
PARTITA_DECLARE_GEMM_PARTS(avx2)
PARTITA_DECLARE_GEMM_PARTS(avx512)
#undef PARTITA_DECLARE_GEMM_PARTS

}  // namespace partita
