// How GGUF lays a row of weights out in blocks, and the integer codes and group parameters in them.
// value = scale * (code - zero) + min, with the code unsigned; one (scale, min) per group.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gemm/gemm.h"

namespace partita {

struct WeightFormatInfo {
  const char* name;
  int64_t block_values;  // inputs per block (1: not quantised)
  int64_t block_bytes;
  int64_t group_values;  // inputs that share a scale (1: not quantised)
  int zero;              // of the unsigned code
  bool has_min;
};

const WeightFormatInfo& weight_format_info(WeightFormat format);
inline bool is_quantized(WeightFormat format) { return weight_format_info(format).block_values > 1; }

// The unsigned codes of one block, in the order of the inputs.  codes: [block_values]
void unpack_block_codes(WeightFormat format, const std::byte* block, uint8_t* codes);

// The two levels of a K-block's parameters, as stored (Q4_K: unsigned 6 bit scale and min, Q6_K: signed 8 bit scale).
struct SubScale {
  uint8_t scale_bits;
  uint8_t min_bits;
};
SubScale sub_scale(WeightFormat format, const std::byte* block, int group);

// fp16 bits of a block's scale and min (0 where the format has none).
uint16_t block_scale_bits(WeightFormat format, const std::byte* block);
uint16_t block_min_bits(WeightFormat format, const std::byte* block);

}  // namespace partita
