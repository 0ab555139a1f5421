// A packed tile: 16 output rows over all inputs, laid out as the dot kernels read it.
//
//   quantised   4-bit codes: [K/8] lines of 64 bytes = 16 rows x 4 bytes; byte j of a row holds input j in its low
//               nibble and input j + 4 in its high one. 5- to 8-bit codes: [K/4] lines of 16 rows x 4 unsigned bytes.
//               Then the parameters, one record per group of 32 inputs, rows innermost:
//                 Q4_0 Q5_0 Q8_0  [16] fp16 scale
//                 Q4_1            [2][16] fp16 scale, min
//                 Q4_K            [2][16] u8 scale, min;  Q6_K  [2][16] s8 scale of each half group
//               and for the two-level formats a record per 256 inputs: Q4_K [2][16] fp16, Q6_K [16] fp16.
//   float       [K][16] in the tile's own type: the weight's (exact mode), or bfloat16 (bf16 activations), to which
//               other formats are rounded.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gemm/gemm.h"

namespace partita {

inline constexpr int kTileRows = 16;
inline constexpr int kGroupValues = 32;  // inputs per activation scale

struct TileLayout {
  WeightFormat format = WeightFormat::kF32;
  int64_t in_features = 0;
  int64_t num_groups = 0;        // of 32 inputs (quantised only)
  int64_t code_bytes = 0;        // per group: 256 or 512
  int64_t parameter_bytes = 0;   // per group
  int64_t parameter_offset = 0;  // of the tile
  int64_t super_bytes = 0;       // per 8 groups
  int64_t super_offset = 0;      // of the tile
  int64_t tile_bytes = 0;        // a multiple of 64
};

// `format` is the tile's; the weight's own or kBF16.
TileLayout tile_layout(WeightFormat format, int64_t in_features);

// Packs rows [first_row, first_row + 16) of `weight` (rows past the end as zeros).
// workspace: [16 * in_features * 4] bytes
void pack_tile(const Weight& weight, const TileLayout& layout, int64_t first_row, std::byte* workspace,
               std::byte* tile);

}  // namespace partita
