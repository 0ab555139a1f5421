// The matmul in plain C++, for any machine and as the reference for the vector versions.
// int8: the same integers and the same fp32 operations as the vector versions, so the same bits.
// fp32 (and bf16, whose values are fp32 by the time they meet): multiply, then add (a machine without FMA would call a
// library function for each).
#include <cmath>
#include <cstring>

#include "core/float16.h"
#include "gemm/kernels.h"
#include "gemm/weight_blocks.h"

namespace partita {
namespace {

struct Parameters {
  float scale[2][kTileRows];  // of each half group
  float min[kTileRows];
};

uint16_t half_at(const std::byte* data, int index) {
  uint16_t bits;
  std::memcpy(&bits, data + 2 * index, sizeof bits);
  return bits;
}

Parameters load_parameters(const TileLayout& layout, const std::byte* tile, int64_t group) {
  Parameters p{};
  const std::byte* record = tile + layout.parameter_offset + group * layout.parameter_bytes;
  const std::byte* super = tile + layout.super_offset + group / 8 * layout.super_bytes;
  for (int r = 0; r < kTileRows; ++r) {
    if (layout.format == WeightFormat::kQ4_K) {
      const float scale = std::to_integer<uint8_t>(record[r]);
      const float min = std::to_integer<uint8_t>(record[kTileRows + r]);
      p.scale[0][r] = p.scale[1][r] = fp16_to_float(half_at(super, r)) * scale;
      p.min[r] = -(fp16_to_float(half_at(super, kTileRows + r)) * min);
    } else if (layout.format == WeightFormat::kQ6_K) {
      const float super_scale = fp16_to_float(half_at(super, r));
      for (int h = 0; h < 2; ++h)
        p.scale[h][r] =
            super_scale * static_cast<float>(static_cast<int8_t>(std::to_integer<uint8_t>(record[h * kTileRows + r])));
    } else {
      p.scale[0][r] = p.scale[1][r] = fp16_to_float(half_at(record, r));
      if (layout.format == WeightFormat::kQ4_1) p.min[r] = fp16_to_float(half_at(record, kTileRows + r));
    }
  }
  return p;
}

// codes: [16 rows][32]
void load_codes(const TileLayout& layout, const std::byte* tile, int64_t group, uint8_t* codes) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(tile + group * layout.code_bytes);
  for (int k = 0; k < kGroupValues; ++k)
    for (int r = 0; r < kTileRows; ++r) {
      if (layout.code_bytes == 256) {
        const uint8_t pair = bytes[k / 8 * 64 + r * 4 + k % 4];
        codes[r * kGroupValues + k] = k % 8 < 4 ? pair & 0x0f : pair >> 4;
      } else {
        codes[r * kGroupValues + k] = bytes[k / 4 * 64 + r * 4 + k % 4];
      }
    }
}

void multiply_int8_tile(const TileProduct& p, int64_t tile_idx) {
  const TileLayout& layout = *p.layout;
  const WeightFormatInfo& info = weight_format_info(layout.format);
  const bool has_halves = layout.format == WeightFormat::kQ6_K;
  const std::byte* tile = p.tiles + tile_idx * layout.tile_bytes;
  uint8_t codes[kTileRows * kGroupValues];
  for (int64_t g = 0; g < layout.num_groups; ++g) {
    load_codes(layout, tile, g, codes);
    const Parameters parameters = load_parameters(layout, tile, g);
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      const auto& a = reinterpret_cast<const ActivationGroup*>(p.prepared + t * p.prepared_row_bytes)[g];
      float* sums = p.sums + t * p.sums_stride + tile_idx * kTileRows;
      for (int r = 0; r < kTileRows; ++r) {
        int32_t dots[2] = {0, 0};
        for (int k = 0; k < kGroupValues; ++k) dots[k / 16] += (codes[r * kGroupValues + k] - info.zero) * a.codes[k];
        float acc = g == 0 ? 0.0f : sums[r];
        if (has_halves) {
          for (int h = 0; h < 2; ++h)
            acc = std::fma(static_cast<float>(dots[h]), parameters.scale[h][r] * a.scale, acc);
        } else {
          acc = std::fma(static_cast<float>(dots[0] + dots[1]), parameters.scale[0][r] * a.scale, acc);
        }
        sums[r] = info.has_min ? std::fma(parameters.min[r], a.scaled_sum, acc) : acc;
      }
    }
  }
}

// Inputs [first, first + count) of one tile, exactly.  out: [count][16]
void expand_inputs(const TileLayout& layout, const std::byte* tile, int64_t first, int64_t count, float* out) {
  if (layout.num_groups == 0) {
    for (int64_t i = 0; i < count * kTileRows; ++i) {
      const int64_t index = first * kTileRows + i;
      if (layout.format == WeightFormat::kF32) {
        std::memcpy(out + i, tile + 4 * index, 4);
      } else {
        uint16_t bits;
        std::memcpy(&bits, tile + 2 * index, sizeof bits);
        out[i] = layout.format == WeightFormat::kF16 ? fp16_to_float(bits) : bf16_to_float(bits);
      }
    }
    return;
  }
  const WeightFormatInfo& info = weight_format_info(layout.format);
  uint8_t codes[kTileRows * kGroupValues];
  for (int64_t begin = 0; begin < count; begin += kGroupValues) {
    const int64_t group = (first + begin) / kGroupValues;
    load_codes(layout, tile, group, codes);
    const Parameters parameters = load_parameters(layout, tile, group);
    for (int k = 0; k < kGroupValues; ++k)
      for (int r = 0; r < kTileRows; ++r) {
        const float product = parameters.scale[k / 16][r] * static_cast<float>(codes[r * kGroupValues + k] - info.zero);
        out[(begin + k) * kTileRows + r] = info.has_min ? product + parameters.min[r] : product;
      }
  }
}

// acc[r] += weights[k][r] * inputs[k], k ascending.
void accumulate(const float* weights, const float* inputs, int64_t count, float* acc) {
  for (int64_t k = 0; k < count; ++k)
    for (int r = 0; r < kTileRows; ++r) acc[r] += weights[k * kTileRows + r] * inputs[k];
}

constexpr int64_t kBlockInputs = 256;

}  // namespace

void multiply_int8_portable(const TileProduct& p) {
  for (int64_t i = 0; i < p.num_tiles; ++i) multiply_int8_tile(p, i);
}

void multiply_f32_portable(const TileProduct& p) {
  static_assert(kBlockInputs * kTileRows * sizeof(float) <= kTileScratchBytes, "scratch too small");
  auto* weights = reinterpret_cast<float*>(p.scratch);
  const int64_t in_features = p.layout->in_features;
  for (int64_t i = 0; i < p.num_tiles; ++i) {
    for (int64_t first = 0; first < in_features; first += kBlockInputs) {
      const int64_t count = in_features - first < kBlockInputs ? in_features - first : kBlockInputs;
      expand_inputs(*p.layout, p.tiles + i * p.layout->tile_bytes, first, count, weights);
      for (int64_t t = 0; t < p.num_tokens; ++t) {
        float* sums = p.sums + t * p.sums_stride + i * kTileRows;
        if (first == 0) std::memset(sums, 0, kTileRows * sizeof(float));
        accumulate(weights, reinterpret_cast<const float*>(p.prepared + t * p.prepared_row_bytes) + first, count, sums);
      }
    }
  }
}

}  // namespace partita
