#include "gemm/packed_tile.h"

#include <algorithm>
#include <cstring>

#include "core/float16.h"
#include "gemm/weight_blocks.h"

namespace partita {
namespace {

const std::byte* source_row(const Weight& weight, int64_t row) {
  const WeightFormatInfo& info = weight_format_info(weight.format);
  const int64_t row_bytes = weight.in_features / info.block_values * info.block_bytes;
  return weight.data + (weight.row_order.empty() ? row : weight.row_order[row]) * row_bytes;
}

uint32_t load_u32(const uint8_t* bytes) {
  uint32_t value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

void pack_codes(const Weight& weight, const TileLayout& layout, int64_t first_row, uint8_t* codes, std::byte* tile) {
  const WeightFormatInfo& info = weight_format_info(weight.format);
  const int64_t num_inputs = weight.in_features;
  for (int r = 0; r < kTileRows; ++r) {
    uint8_t* row_codes = codes + r * num_inputs;
    if (first_row + r >= weight.out_features) {
      std::memset(row_codes, 0, num_inputs);
      continue;
    }
    const std::byte* block = source_row(weight, first_row + r);
    for (int64_t k = 0; k < num_inputs; k += info.block_values, block += info.block_bytes)
      unpack_block_codes(weight.format, block, row_codes + k);
  }
  auto* lines = reinterpret_cast<uint32_t*>(tile);
  if (layout.code_bytes == 256) {
    for (int64_t k = 0; k < num_inputs; k += 8, lines += kTileRows)
      for (int r = 0; r < kTileRows; ++r) {
        const uint8_t* row_codes = codes + r * num_inputs + k;
        lines[r] = load_u32(row_codes) | (load_u32(row_codes + 4) << 4);
      }
  } else {
    for (int64_t k = 0; k < num_inputs; k += 4, lines += kTileRows)
      for (int r = 0; r < kTileRows; ++r) lines[r] = load_u32(codes + r * num_inputs + k);
  }
}

void pack_parameters(const Weight& weight, const TileLayout& layout, int64_t first_row, std::byte* tile) {
  const WeightFormatInfo& info = weight_format_info(weight.format);
  const int64_t num_rows = std::min<int64_t>(kTileRows, weight.out_features - first_row);
  std::memset(tile + layout.parameter_offset, 0, layout.tile_bytes - layout.parameter_offset);
  for (int64_t r = 0; r < num_rows; ++r) {
    const std::byte* block = source_row(weight, first_row + r);
    const int64_t num_blocks = weight.in_features / info.block_values;
    for (int64_t b = 0; b < num_blocks; ++b, block += info.block_bytes) {
      const uint16_t scale = block_scale_bits(weight.format, block);
      const uint16_t min = block_min_bits(weight.format, block);
      if (layout.super_bytes == 0) {
        auto* halves = reinterpret_cast<uint16_t*>(tile + layout.parameter_offset + b * layout.parameter_bytes);
        halves[r] = scale;
        if (info.has_min) halves[kTileRows + r] = min;
        continue;
      }
      auto* halves = reinterpret_cast<uint16_t*>(tile + layout.super_offset + b * layout.super_bytes);
      halves[r] = scale;
      if (info.has_min) halves[kTileRows + r] = min;
      for (int g = 0; g < 8; ++g) {
        auto* bytes = reinterpret_cast<uint8_t*>(tile + layout.parameter_offset + (b * 8 + g) * layout.parameter_bytes);
        if (weight.format == WeightFormat::kQ4_K) {
          const SubScale sub = sub_scale(weight.format, block, g);
          bytes[r] = sub.scale_bits;
          bytes[kTileRows + r] = sub.min_bits;
        } else {
          bytes[r] = sub_scale(weight.format, block, 2 * g).scale_bits;
          bytes[kTileRows + r] = sub_scale(weight.format, block, 2 * g + 1).scale_bits;
        }
      }
    }
  }
}

void pack_float(const Weight& weight, int64_t first_row, std::byte* tile) {
  const int64_t element_bytes = weight_format_info(weight.format).block_bytes;
  const int64_t num_rows = std::min<int64_t>(kTileRows, weight.out_features - first_row);
  std::memset(tile, 0, weight.in_features * kTileRows * element_bytes);
  for (int64_t r = 0; r < num_rows; ++r) {
    const std::byte* source = source_row(weight, first_row + r);
    std::byte* target = tile + r * element_bytes;
    if (element_bytes == 2) {
      for (int64_t k = 0; k < weight.in_features; ++k) std::memcpy(target + k * kTileRows * 2, source + k * 2, 2);
    } else {
      for (int64_t k = 0; k < weight.in_features; ++k) std::memcpy(target + k * kTileRows * 4, source + k * 4, 4);
    }
  }
}

// row_values: [in_features]
void pack_rounded_to_bf16(const Weight& weight, int64_t first_row, float* row_values, std::byte* tile) {
  const int64_t num_rows = std::min<int64_t>(kTileRows, weight.out_features - first_row);
  auto* target = reinterpret_cast<uint16_t*>(tile);
  std::memset(tile, 0, weight.in_features * kTileRows * 2);
  for (int64_t r = 0; r < num_rows; ++r) {
    weight.dequantize_row(first_row + r, row_values);
    for (int64_t k = 0; k < weight.in_features; ++k) target[k * kTileRows + r] = float_to_bf16(row_values[k]);
  }
}

}  // namespace

TileLayout tile_layout(WeightFormat format, int64_t in_features) {
  TileLayout layout;
  layout.format = format;
  layout.in_features = in_features;
  const auto whole_lines = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  if (!is_quantized(format)) {
    layout.tile_bytes = whole_lines(in_features * kTileRows * weight_format_info(format).block_bytes);
    return layout;
  }
  layout.num_groups = in_features / kGroupValues;
  const bool is_nibble =
      format == WeightFormat::kQ4_0 || format == WeightFormat::kQ4_1 || format == WeightFormat::kQ4_K;
  layout.code_bytes = is_nibble ? 256 : 512;
  layout.parameter_bytes = format == WeightFormat::kQ4_1 ? 64 : 32;
  layout.parameter_offset = layout.num_groups * layout.code_bytes;
  layout.super_offset = whole_lines(layout.parameter_offset + layout.num_groups * layout.parameter_bytes);
  layout.super_bytes = format == WeightFormat::kQ4_K ? 64 : format == WeightFormat::kQ6_K ? 32 : 0;
  layout.tile_bytes = whole_lines(layout.super_offset + (layout.num_groups + 7) / 8 * layout.super_bytes);
  return layout;
}

void pack_tile(const Weight& weight, const TileLayout& layout, int64_t first_row, std::byte* workspace,
               std::byte* tile) {
  if (layout.format != weight.format)
    return pack_rounded_to_bf16(weight, first_row, reinterpret_cast<float*>(workspace), tile);
  if (layout.num_groups == 0) return pack_float(weight, first_row, tile);
  pack_codes(weight, layout, first_row, reinterpret_cast<uint8_t*>(workspace), tile);
  pack_parameters(weight, layout, first_row, tile);
}

}  // namespace partita
