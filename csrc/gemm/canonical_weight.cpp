#include "gemm/canonical_weight.h"

#include <cmath>
#include <cstring>

#include "core/check.h"
#include "core/float16.h"
#include "core/parallel_for.h"
#include "gemm/weight_blocks.h"

namespace partita {
namespace {

constexpr const char* kCodeNames[] = {"u4", "u8", "s8", "e4m3", "f16", "bf16", "f32"};
constexpr int kNumCodes = sizeof(kCodeNames) / sizeof(kCodeNames[0]);

float e4m3_to_float(uint8_t code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return std::nanf("");
  const float magnitude =
      exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9) : std::ldexp(1.0f + mantissa / 8.0f, exponent - 7);
  return code & 0x80 ? -magnitude : magnitude;
}

// Scale and min of one group of 32 or 16 inputs; the products of the two levels have at most 17 bits.
struct GroupParameters {
  float scale, min;
};
GroupParameters group_parameters(WeightFormat format, const std::byte* block, int group) {
  float scale = fp16_to_float(block_scale_bits(format, block)), min = fp16_to_float(block_min_bits(format, block));
  if (weight_format_info(format).block_values == 256) {
    const SubScale sub = sub_scale(format, block, group);
    scale *= format == WeightFormat::kQ6_K ? static_cast<float>(static_cast<int8_t>(sub.scale_bits))
                                           : static_cast<float>(sub.scale_bits);
    min *= -static_cast<float>(sub.min_bits);
  }
  return {scale, min};
}

WeightCodes plain_codes(WeightFormat format) {
  return format == WeightFormat::kF32   ? WeightCodes::kF32
         : format == WeightFormat::kF16 ? WeightCodes::kF16
                                        : WeightCodes::kBF16;
}

}  // namespace

const char* weight_codes_name(WeightCodes codes) { return kCodeNames[static_cast<int>(codes)]; }

WeightCodes parse_weight_codes(const std::string& name) {
  for (int i = 0; i < kNumCodes; ++i)
    if (name == kCodeNames[i]) return static_cast<WeightCodes>(i);
  throw_value_error("codes: got '", name, "', wanted u4, u8, s8, e4m3, f16, bf16 or f32");
}

void CanonicalWeight::check(const char* name) const {
  constexpr int64_t kMaxFeatures = int64_t{1} << 31;
  PARTITA_CHECK(out_features > 0 && out_features < kMaxFeatures && in_features > 0 && in_features < kMaxFeatures, name,
                ": got shape [", out_features, ", ", in_features, "], wanted two positive numbers below 2^31");
  const size_t num_elements = static_cast<size_t>(out_features) * static_cast<size_t>(in_features);
  PARTITA_CHECK(data.size() == num_elements * weight_code_bytes(codes), name, ".data: got ", data.size(),
                " bytes, wanted ", weight_code_bytes(codes), " for each of [", out_features, ", ", in_features, "]");
  PARTITA_CHECK(group == -1 || group == 16 || group == 32 || group == 64 || group == 128, name, ".group: got ", group,
                ", wanted 16, 32, 64, 128 or -1");
  PARTITA_CHECK(group_rows == 1 || (group_rows == 128 && codes == WeightCodes::kE4M3 && group == 128), name,
                ".group_rows: got ", group_rows, ", wanted 1, or 128 for e4m3 in blocks of 128 x 128");
  const size_t rows = static_cast<size_t>((out_features + group_rows - 1) / group_rows);
  const size_t cells = rows * static_cast<size_t>(num_groups());
  const auto check_count = [&](const char* field, size_t got, size_t wanted) {
    PARTITA_CHECK(got == wanted, name, ".", field, ": got ", got, " values, wanted ", wanted);
  };
  if (has_two_levels()) {
    PARTITA_CHECK(codes == WeightCodes::kU4 && group > 0 && mins.empty(), name,
                  ".sub_scales: wanted u4 codes in groups, without mins");
    check_count("sub_scales", sub_scales.size(), cells);
    check_count("scales", scales.size(), rows);
  } else if (codes >= WeightCodes::kF16) {
    PARTITA_CHECK(scales.empty() && group == -1, name, ".scales: got some for ", weight_codes_name(codes),
                  " elements, wanted none");
  } else {
    check_count("scales", scales.size(), cells);
  }
  if (!zeros.empty()) {
    PARTITA_CHECK(codes == WeightCodes::kU4 || codes == WeightCodes::kU8, name, ".zeros: got some for ",
                  weight_codes_name(codes), " codes, wanted unsigned integers");
    check_count("zeros", zeros.size(), cells);
  }
  if (!mins.empty()) {
    PARTITA_CHECK(is_integer_code(codes), name, ".mins: got some for ", weight_codes_name(codes),
                  " codes, wanted integers");
    check_count("mins", mins.size(), cells);
  }
  if (codes == WeightCodes::kU4)
    for (const uint8_t code : data)
      PARTITA_CHECK(code < 16, name, ".data: got code ", static_cast<int>(code), ", wanted u4 codes below 16");
  PARTITA_CHECK(input_order.empty() || static_cast<int64_t>(input_order.size()) == in_features, name,
                ".input_order: got ", input_order.size(), " entries, wanted none or ", in_features);
  for (const int32_t input : input_order)
    PARTITA_CHECK(input >= 0 && input < in_features, name, ".input_order: got ", input, ", wanted one in [0, ",
                  in_features, ")");
}

void CanonicalWeight::dequantize_row(int64_t row, float* out) const {
  PARTITA_CHECK(row >= 0 && row < out_features, "row: got ", row, ", wanted one in [0, ", out_features, ")");
  const uint8_t* source = data.data() + static_cast<size_t>(row) * in_features * weight_code_bytes(codes);
  const int64_t groups = num_groups();
  const int64_t parameter_row = row / group_rows * groups;
  for (int64_t k = 0; k < in_features; ++k) {
    float value = 0;
    if (codes >= WeightCodes::kF16) {
      uint16_t half = 0;
      if (codes != WeightCodes::kF32) std::memcpy(&half, source + 2 * k, 2);
      if (codes == WeightCodes::kF32)
        std::memcpy(&value, source + 4 * k, 4);
      else
        value = codes == WeightCodes::kF16 ? fp16_to_float(half) : bf16_to_float(half);
    } else {
      const int64_t cell = parameter_row + (group < 0 ? 0 : k / group);
      // The inner product is an integer (or an e4m3 number); one rounding in the multiplication, one in the addition.
      const float zero = zeros.empty() ? static_cast<float>(common_zero) : static_cast<float>(zeros[cell]);
      float code = codes == WeightCodes::kE4M3 ? e4m3_to_float(source[k])
                   : codes == WeightCodes::kS8 ? static_cast<float>(static_cast<int8_t>(source[k]))
                                               : static_cast<float>(source[k]);
      code -= zero;
      if (has_two_levels()) code *= static_cast<float>(sub_scales[cell]);
      const float product = scales[has_two_levels() ? row : cell] * code;
      value = mins.empty() ? product : product + mins[cell];
    }
    out[input_order.empty() ? k : input_order[k]] = value;
  }
}

CanonicalWeight canonical_from(const Weight& weight) {
  weight.check("weight");
  CanonicalWeight canonical;
  canonical.out_features = weight.out_features;
  canonical.in_features = weight.in_features;
  const WeightFormatInfo& info = weight_format_info(weight.format);
  const int64_t row_bytes = weight.in_features / info.block_values * info.block_bytes;
  const auto source_row = [&](int64_t row) {
    return weight.data + (weight.row_order.empty() ? row : weight.row_order[row]) * row_bytes;
  };
  if (!is_quantized(weight.format)) {
    canonical.codes = plain_codes(weight.format);
    canonical.data.resize(static_cast<size_t>(weight.out_features) * row_bytes);
    for (int64_t row = 0; row < weight.out_features; ++row)
      std::memcpy(canonical.data.data() + row * row_bytes, source_row(row), row_bytes);
    return canonical;
  }
  const bool is_nibble = weight.format == WeightFormat::kQ4_0 || weight.format == WeightFormat::kQ4_1 ||
                         weight.format == WeightFormat::kQ4_K;
  canonical.codes = is_nibble ? WeightCodes::kU4 : WeightCodes::kU8;
  canonical.group = info.group_values;
  canonical.common_zero = info.zero;
  const int64_t num_groups = canonical.num_groups();
  canonical.data.resize(static_cast<size_t>(weight.out_features) * weight.in_features);
  canonical.scales.resize(static_cast<size_t>(weight.out_features) * num_groups);
  if (info.has_min) canonical.mins.resize(canonical.scales.size());
  const int groups_per_block = static_cast<int>(info.block_values / info.group_values);
  parallel_for((weight.out_features + 63) / 64, 0, [&](int64_t chunk, int) {
    for (int64_t row = chunk * 64; row < std::min(weight.out_features, chunk * 64 + 64); ++row) {
      const std::byte* block = source_row(row);
      uint8_t* codes = canonical.data.data() + row * weight.in_features;
      for (int64_t cell = row * num_groups; cell < (row + 1) * num_groups; cell += groups_per_block) {
        unpack_block_codes(weight.format, block, codes);
        for (int g = 0; g < groups_per_block; ++g) {
          const GroupParameters parameters = group_parameters(weight.format, block, g);
          canonical.scales[cell + g] = parameters.scale;
          if (info.has_min) canonical.mins[cell + g] = parameters.min;
        }
        block += info.block_bytes;
        codes += info.block_values;
      }
    }
  });
  return canonical;
}

}  // namespace partita
