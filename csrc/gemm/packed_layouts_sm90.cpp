#include "gemm/packed_layouts_sm90.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/float16.h"
#include "core/parallel_for.h"

namespace partita {
namespace {

constexpr int kChannelMultiple = 128;  // rows of a CTA's tile
constexpr int kW4InputMultiple = 64;   // inputs of a K tile
constexpr int kHalfInputMultiple = 64;
constexpr int kByteInputMultiple = 128;
constexpr int kMiddleCode = 8;  // u4 codes are held as int4: code - 8

int64_t padded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

float round_to(GpuActivations type, float value) {
  return type == GpuActivations::kF16 ? fp16_to_float(float_to_fp16(value)) : bf16_to_float(float_to_bf16(value));
}
uint16_t bits_of(GpuActivations type, float value) {
  return type == GpuActivations::kF16 ? float_to_fp16(value) : float_to_bf16(value);
}
float value_of(GpuActivations type, uint16_t bits) {
  return type == GpuActivations::kF16 ? fp16_to_float(bits) : bf16_to_float(bits);
}

bool is_half(GpuActivations activations) {
  return activations == GpuActivations::kF16 || activations == GpuActivations::kBF16;
}

// ---- sm90_w4

// value = (code - 8) * scale + offset; the offset belongs to the scale as it is held, so that a code at the zero point
// comes out as min.
struct GroupTerms {
  float scale, offset;
};
GroupTerms group_terms(const CanonicalWeight& weight, GpuActivations activations, int64_t cell) {
  const int zero = weight.zeros.empty() ? weight.common_zero : weight.zeros[cell];
  const float scale = round_to(activations, weight.scales[cell]);
  const float min = weight.mins.empty() ? 0.0f : weight.mins[cell];
  return {scale, scale * static_cast<float>(kMiddleCode - zero) + min};
}

const char* why_not_w4(const CanonicalWeight& weight, GpuActivations activations) {
  if (!is_half(activations)) return "wants f16 or bf16 activations";
  if (weight.codes != WeightCodes::kU4) return "wants u4 codes";
  if (weight.has_two_levels()) return "has no second level of scales";
  if (weight.group >= 0 && weight.group % kW4InputMultiple != 0) return "wants groups of 64, 128 or the whole row";
  for (size_t cell = 0; cell < weight.scales.size(); ++cell) {
    const GroupTerms terms = group_terms(weight, activations, static_cast<int64_t>(cell));
    if (!std::isfinite(terms.scale) || !std::isfinite(round_to(activations, terms.offset)))
      return "a scale or offset is beyond the activation type";
  }
  return nullptr;
}

PackedLayout::Sizes w4_sizes(const CanonicalWeight& weight, GpuActivations) {
  const size_t channels = static_cast<size_t>(padded(weight.out_features, kChannelMultiple));
  const size_t inputs = static_cast<size_t>(padded(weight.in_features, kW4InputMultiple));
  return {channels * inputs / 2, channels * static_cast<size_t>(weight.num_groups()) * 4, false, false};
}

void pack_w4(const CanonicalWeight& weight, GpuActivations activations, std::byte* codes, std::byte* group_params,
             float*, int32_t*, PackedWeightView* view) {
  view->group = static_cast<int32_t>(weight.group);
  view->num_groups = static_cast<int32_t>(weight.num_groups());
  view->offset = !weight.mins.empty()    ? GroupOffset::kMin
                 : !weight.zeros.empty() ? GroupOffset::kZero
                                         : GroupOffset::kCommonZero;
  view->common_zero = view->offset == GroupOffset::kCommonZero ? weight.common_zero : 0;
  const int64_t channels = padded(weight.out_features, kChannelMultiple);
  const int64_t num_groups = weight.num_groups();
  uint16_t* scales = reinterpret_cast<uint16_t*>(group_params);
  uint16_t* offsets = scales + num_groups * channels;
  const auto pack_params = [&](int64_t n) {
    for (int64_t g = 0; g < num_groups; ++g) {
      const GroupTerms terms = group_terms(weight, activations, n * num_groups + g);
      scales[g * channels + n] = bits_of(activations, terms.scale);
      offsets[g * channels + n] = bits_of(activations, terms.offset);
    }
  };
  // Threads take whole fragments: 16 channels.
  parallel_for((weight.out_features + 15) / 16, 0, [&](int64_t slab, int) {
    const int64_t num_rows = std::min<int64_t>(16, weight.out_features - slab * 16);
    for (int64_t row = 0; row < num_rows; ++row) pack_params(slab * 16 + row);
    for (int64_t first_input = 0; first_input < weight.in_features; first_input += 16) {
      const int num_inputs = static_cast<int>(std::min<int64_t>(16, weight.in_features - first_input));
      std::byte* fragment = codes + w4_nibble(slab * 16, first_input, channels) / 2;
      for (int row = 0; row < num_rows; ++row) {
        const uint8_t* source = weight.data.data() + (slab * 16 + row) * weight.in_features + first_input;
        for (int input = 0; input < num_inputs; ++input) {
          const int nibble = w4_fragment_nibble(row, input);
          fragment[nibble / 2] |= static_cast<std::byte>((source[input] ^ kMiddleCode) << (nibble % 2 * 4));
        }
      }
    }
  });
}

void unpack_w4(const PackedWeightView& view, GpuActivations activations, CanonicalWeight* weight) {
  weight->codes = WeightCodes::kU4;
  weight->group = view.group;
  weight->common_zero = view.common_zero;
  const int64_t num_groups = weight->num_groups();
  const size_t num_cells = static_cast<size_t>(weight->out_features * num_groups);
  weight->scales.assign(num_cells, 0);
  weight->zeros.assign(view.offset == GroupOffset::kZero ? num_cells : 0, 0);
  weight->mins.assign(view.offset == GroupOffset::kMin ? num_cells : 0, 0);
  weight->data.assign(static_cast<size_t>(weight->out_features * weight->in_features), 0);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(view.group_params);
  const uint16_t* offsets = scales + num_groups * view.padded_out_features;
  for (int64_t n = 0; n < weight->out_features; ++n) {
    for (int64_t g = 0; g < num_groups; ++g) {
      const int64_t cell = n * num_groups + g;
      const float scale = value_of(activations, scales[g * view.padded_out_features + n]);
      const float offset = value_of(activations, offsets[g * view.padded_out_features + n]);
      weight->scales[cell] = scale;
      // The zero is an integer: the rounding of the offset does not hide it.
      if (view.offset == GroupOffset::kZero)
        weight->zeros[cell] = static_cast<uint8_t>(scale == 0 ? 0 : std::lround(kMiddleCode - offset / scale));
      if (view.offset == GroupOffset::kMin) weight->mins[cell] = offset - scale * kMiddleCode;
    }
    for (int64_t k = 0; k < weight->in_features; ++k) {
      const int64_t nibble = w4_nibble(n, k, view.padded_out_features);
      const int code = static_cast<int>(view.codes[nibble / 2]) >> (nibble % 2 * 4) & 15;
      weight->data[n * weight->in_features + k] = static_cast<uint8_t>(code ^ kMiddleCode);
    }
  }
}

// ---- sm90_e4m3, sm90_s8, sm90_half: rows as they are, padded

void pack_rows(const CanonicalWeight& weight, int input_multiple, std::byte* codes) {
  const int64_t row_bytes = weight.in_features * static_cast<int64_t>(weight_code_bytes(weight.codes));
  const int64_t padded_bytes =
      padded(weight.in_features, input_multiple) * static_cast<int64_t>(weight_code_bytes(weight.codes));
  for (int64_t n = 0; n < weight.out_features; ++n)
    std::memcpy(codes + n * padded_bytes, weight.data.data() + n * row_bytes, static_cast<size_t>(row_bytes));
}

void unpack_rows(const PackedWeightView& view, CanonicalWeight* weight) {
  const int64_t code_bytes = static_cast<int64_t>(weight_code_bytes(weight->codes));
  const int64_t row_bytes = weight->in_features * code_bytes;
  weight->data.resize(static_cast<size_t>(weight->out_features * row_bytes));
  for (int64_t n = 0; n < weight->out_features; ++n)
    std::memcpy(weight->data.data() + n * row_bytes, view.codes + n * view.padded_in_features * code_bytes,
                static_cast<size_t>(row_bytes));
}

const char* why_not_e4m3(const CanonicalWeight& weight, GpuActivations activations) {
  if (activations != GpuActivations::kE4M3) return "wants e4m3 activations";
  if (weight.codes != WeightCodes::kE4M3) return "wants e4m3 codes";
  if (weight.group_rows == 128 ? weight.group != 128 : weight.group != -1)
    return "wants a scale per row or per block of 128 x 128";
  return nullptr;
}

PackedLayout::Sizes e4m3_sizes(const CanonicalWeight& weight, GpuActivations) {
  const size_t channels = static_cast<size_t>(padded(weight.out_features, kChannelMultiple));
  const size_t inputs = static_cast<size_t>(padded(weight.in_features, kByteInputMultiple));
  const bool has_blocks = weight.group_rows == 128;
  return {channels * inputs, has_blocks ? channels / 128 * (inputs / 128) * sizeof(float) : 0, !has_blocks, false};
}

void pack_e4m3(const CanonicalWeight& weight, GpuActivations, std::byte* codes, std::byte* group_params,
               float* channel_scale, int32_t*, PackedWeightView* view) {
  view->group = static_cast<int32_t>(weight.group);
  view->num_groups = static_cast<int32_t>(weight.num_groups());
  pack_rows(weight, kByteInputMultiple, codes);
  if (weight.group_rows == 1) {
    std::copy(weight.scales.begin(), weight.scales.end(), channel_scale);
  } else {
    // [ceil(N / 128), ceil(K / 128)]: a row of scales is as long as the padded row has blocks.
    std::memcpy(group_params, weight.scales.data(), weight.scales.size() * sizeof(float));
  }
}

void unpack_e4m3(const PackedWeightView& view, GpuActivations, CanonicalWeight* weight) {
  weight->codes = WeightCodes::kE4M3;
  weight->group = view.group;
  weight->group_rows = view.group == 128 ? 128 : 1;
  unpack_rows(view, weight);
  const int64_t num_rows = (weight->out_features + weight->group_rows - 1) / weight->group_rows;
  const float* scales = view.group == 128 ? reinterpret_cast<const float*>(view.group_params) : view.channel_scale;
  weight->scales.assign(scales, scales + num_rows * weight->num_groups());
}

const char* why_not_s8(const CanonicalWeight& weight, GpuActivations activations) {
  if (activations != GpuActivations::kInt8) return "wants int8 activations";
  if (weight.codes != WeightCodes::kS8) return "wants s8 codes";
  if (weight.group != -1) return "wants a scale per row";
  if (weight.common_zero != 0 || !weight.mins.empty()) return "wants neither zero nor min";
  return nullptr;
}

PackedLayout::Sizes s8_sizes(const CanonicalWeight& weight, GpuActivations) {
  return {static_cast<size_t>(padded(weight.out_features, kChannelMultiple) *
                              padded(weight.in_features, kByteInputMultiple)),
          0, true, false};
}

void pack_s8(const CanonicalWeight& weight, GpuActivations, std::byte* codes, std::byte*, float* channel_scale,
             int32_t*, PackedWeightView*) {
  pack_rows(weight, kByteInputMultiple, codes);
  std::copy(weight.scales.begin(), weight.scales.end(), channel_scale);
}

void unpack_s8(const PackedWeightView& view, GpuActivations, CanonicalWeight* weight) {
  weight->codes = WeightCodes::kS8;
  weight->group = -1;
  unpack_rows(view, weight);
  weight->scales.assign(view.channel_scale, view.channel_scale + weight->out_features);
}

const char* why_not_half(const CanonicalWeight& weight, GpuActivations activations) {
  if (!is_half(activations)) return "wants f16 or bf16 activations";
  if (weight.codes != (activations == GpuActivations::kF16 ? WeightCodes::kF16 : WeightCodes::kBF16))
    return "wants elements of the activation type";
  return nullptr;
}

PackedLayout::Sizes half_sizes(const CanonicalWeight& weight, GpuActivations) {
  return {static_cast<size_t>(padded(weight.out_features, kChannelMultiple) *
                              padded(weight.in_features, kHalfInputMultiple) * 2),
          0, false, false};
}

void pack_half(const CanonicalWeight& weight, GpuActivations, std::byte* codes, std::byte*, float*, int32_t*,
               PackedWeightView*) {
  pack_rows(weight, kHalfInputMultiple, codes);
}

void unpack_half(const PackedWeightView& view, GpuActivations activations, CanonicalWeight* weight) {
  weight->codes = activations == GpuActivations::kF16 ? WeightCodes::kF16 : WeightCodes::kBF16;
  unpack_rows(view, weight);
}

}  // namespace

const std::vector<PackedLayout>& packed_layouts_sm90() {
  static const std::vector<PackedLayout> layouts = {
      {kW4Layout, kChannelMultiple, kW4InputMultiple, &why_not_w4, &w4_sizes, &pack_w4, &unpack_w4},
      {kE4M3Layout, kChannelMultiple, kByteInputMultiple, &why_not_e4m3, &e4m3_sizes, &pack_e4m3, &unpack_e4m3},
      {kS8Layout, kChannelMultiple, kByteInputMultiple, &why_not_s8, &s8_sizes, &pack_s8, &unpack_s8},
      {kHalfLayout, kChannelMultiple, kHalfInputMultiple, &why_not_half, &half_sizes, &pack_half, &unpack_half},
  };
  return layouts;
}

}  // namespace partita
