#include <cstring>

#include "core/check.h"
#include "core/float16.h"
#include "gemm/gemm.h"
#include "gemm/weight_blocks.h"

namespace partita {
namespace {

constexpr WeightFormatInfo kFormats[] = {
    {"F32", 1, 4, 1, 0, false},       {"F16", 1, 2, 1, 0, false},      {"BF16", 1, 2, 1, 0, false},
    {"Q4_0", 32, 18, 32, 8, false},   {"Q4_1", 32, 20, 32, 0, true},   {"Q5_0", 32, 22, 32, 16, false},
    {"Q8_0", 32, 34, 32, 128, false}, {"Q4_K", 256, 144, 32, 0, true}, {"Q6_K", 256, 210, 16, 32, false},
};
constexpr int kNumFormats = sizeof(kFormats) / sizeof(kFormats[0]);

uint8_t byte_at(const std::byte* data, int64_t index) { return std::to_integer<uint8_t>(data[index]); }

uint16_t half_at(const std::byte* data, int64_t offset) {
  uint16_t bits;
  std::memcpy(&bits, data + offset, sizeof bits);
  return bits;
}

// 16 bytes of nibbles: the low ones are inputs 0..15, the high ones 16..31.
void unpack_nibbles(const std::byte* nibbles, uint8_t* codes) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(nibbles);
  for (int i = 0; i < 16; ++i) {
    codes[i] = bytes[i] & 0x0f;
    codes[i + 16] = bytes[i] >> 4;
  }
}

void unpack_q5_0(const std::byte* block, uint8_t* codes) {
  uint32_t fifth_bits;
  std::memcpy(&fifth_bits, block + 2, sizeof fifth_bits);
  unpack_nibbles(block + 6, codes);
  for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(codes[i] | (((fifth_bits >> i) & 1u) << 4));
}

// Four runs of 32 bytes; each holds 32 inputs in its low nibbles and the next 32 in its high ones.
void unpack_q4_k(const std::byte* block, uint8_t* codes) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(block + 16);
  for (int run = 0; run < 4; ++run, bytes += 32, codes += 64) {
    for (int i = 0; i < 32; ++i) {
      codes[i] = bytes[i] & 0x0f;
      codes[i + 32] = bytes[i] >> 4;
    }
  }
}

// Two halves of 128 inputs: 64 bytes of low nibbles and 32 bytes that each carry the upper two bits of four inputs.
void unpack_q6_k(const std::byte* block, uint8_t* codes) {
  const auto* low = reinterpret_cast<const uint8_t*>(block);
  const auto* high = reinterpret_cast<const uint8_t*>(block + 128);
  for (int half = 0; half < 2; ++half, low += 64, high += 32, codes += 128) {
    for (int i = 0; i < 32; ++i) {
      codes[i] = static_cast<uint8_t>((low[i] & 0x0f) | ((high[i] & 3) << 4));
      codes[i + 32] = static_cast<uint8_t>((low[i + 32] & 0x0f) | (((high[i] >> 2) & 3) << 4));
      codes[i + 64] = static_cast<uint8_t>((low[i] >> 4) | (((high[i] >> 4) & 3) << 4));
      codes[i + 96] = static_cast<uint8_t>((low[i + 32] >> 4) | ((high[i] >> 6) << 4));
    }
  }
}

}  // namespace

const WeightFormatInfo& weight_format_info(WeightFormat format) { return kFormats[static_cast<int>(format)]; }

const char* weight_format_name(WeightFormat format) { return weight_format_info(format).name; }

WeightFormat parse_weight_format(const std::string& name) {
  std::string known;
  for (int i = 0; i < kNumFormats; ++i) {
    if (name == kFormats[i].name) return static_cast<WeightFormat>(i);
    known += (i ? ", " : "") + std::string(kFormats[i].name);
  }
  throw_value_error("format: got '", name, "', wanted one of ", known);
}

ActivationType parse_activation_type(const std::string& name) {
  if (name == "int8") return ActivationType::kInt8;
  if (name == "bf16") return ActivationType::kBF16;
  if (name == "fp32") return ActivationType::kF32;
  throw_value_error("activations: got '", name, "', wanted int8, bf16 or fp32");
}

void unpack_block_codes(WeightFormat format, const std::byte* block, uint8_t* codes) {
  switch (format) {
    case WeightFormat::kQ4_0:
      return unpack_nibbles(block + 2, codes);
    case WeightFormat::kQ4_1:
      return unpack_nibbles(block + 4, codes);
    case WeightFormat::kQ5_0:
      return unpack_q5_0(block, codes);
    case WeightFormat::kQ8_0:
      for (int i = 0; i < 32; ++i) codes[i] = byte_at(block, 2 + i) ^ 0x80;
      return;
    case WeightFormat::kQ4_K:
      return unpack_q4_k(block, codes);
    case WeightFormat::kQ6_K:
      return unpack_q6_k(block, codes);
    case WeightFormat::kF32:
    case WeightFormat::kF16:
    case WeightFormat::kBF16:
      throw_value_error("format: ", weight_format_name(format), " holds no codes");
  }
}

SubScale sub_scale(WeightFormat format, const std::byte* block, int group) {
  if (format == WeightFormat::kQ6_K) return {byte_at(block, 192 + group), 0};
  // Q4_K: eight 6-bit scales and eight 6-bit mins in 12 bytes; the upper four borrow the first eight bytes' top bits.
  const std::byte* bytes = block + 4;
  if (group < 4)
    return {static_cast<uint8_t>(byte_at(bytes, group) & 63), static_cast<uint8_t>(byte_at(bytes, group + 4) & 63)};
  return {static_cast<uint8_t>((byte_at(bytes, group + 4) & 0x0f) | ((byte_at(bytes, group - 4) >> 6) << 4)),
          static_cast<uint8_t>((byte_at(bytes, group + 4) >> 4) | ((byte_at(bytes, group) >> 6) << 4))};
}

uint16_t block_scale_bits(WeightFormat format, const std::byte* block) {
  return half_at(block, format == WeightFormat::kQ6_K ? 208 : 0);
}

uint16_t block_min_bits(WeightFormat format, const std::byte* block) {
  return weight_format_info(format).has_min ? half_at(block, 2) : 0;
}

void Weight::check(const char* name) const {
  PARTITA_CHECK(static_cast<int>(format) < kNumFormats, name, ": got format number ", static_cast<int>(format),
                ", wanted one below ", kNumFormats);
  const WeightFormatInfo& info = weight_format_info(format);
  constexpr int64_t kMaxFeatures = int64_t{1} << 31;
  PARTITA_CHECK(out_features > 0 && out_features < kMaxFeatures, name, ": got out_features ", out_features,
                ", wanted a positive number below 2^31");
  PARTITA_CHECK(in_features > 0 && in_features < kMaxFeatures, name, ": got in_features ", in_features,
                ", wanted a positive number below 2^31");
  PARTITA_CHECK(in_features % info.block_values == 0, name, ": got in_features ", in_features,
                ", wanted a multiple of ", info.block_values, " for ", info.name);
  PARTITA_CHECK(data != nullptr, name, ": got no data");
  // Both factors are below 2^31 and a value takes at most 4 bytes; the division keeps the product from overflowing.
  const int64_t row_bytes = in_features / info.block_values * info.block_bytes;
  PARTITA_CHECK(num_bytes / static_cast<size_t>(row_bytes) == static_cast<size_t>(out_features) &&
                    num_bytes % static_cast<size_t>(row_bytes) == 0,
                name, ": got ", num_bytes, " bytes, wanted ", row_bytes, " for each of ", out_features, " rows (",
                info.name, ", [", out_features, ", ", in_features, "])");
  PARTITA_CHECK(row_order.empty() || static_cast<int64_t>(row_order.size()) == out_features, name,
                ": got a row_order of ", row_order.size(), " entries, wanted none or ", out_features);
  for (const int32_t row : row_order)
    PARTITA_CHECK(row >= 0 && row < out_features, name, ": got row_order entry ", row, ", wanted one in [0, ",
                  out_features, ")");
}

void Weight::dequantize_row(int64_t row, float* out) const {
  PARTITA_CHECK(row >= 0 && row < out_features, "row: got ", row, ", wanted one in [0, ", out_features, ")");
  const WeightFormatInfo& info = weight_format_info(format);
  const int64_t row_bytes = in_features / info.block_values * info.block_bytes;
  const std::byte* source = data + (row_order.empty() ? row : row_order[row]) * row_bytes;
  switch (format) {
    case WeightFormat::kF32:
      std::memcpy(out, source, row_bytes);
      return;
    case WeightFormat::kF16:
      for (int64_t i = 0; i < in_features; ++i) out[i] = fp16_to_float(half_at(source, 2 * i));
      return;
    case WeightFormat::kBF16:
      for (int64_t i = 0; i < in_features; ++i) out[i] = bf16_to_float(half_at(source, 2 * i));
      return;
    default:
      break;
  }
  uint8_t codes[256];
  const int groups_per_block = static_cast<int>(info.block_values / info.group_values);
  for (int64_t begin = 0; begin < in_features; begin += info.block_values, source += info.block_bytes) {
    unpack_block_codes(format, source, codes);
    const float block_scale = fp16_to_float(block_scale_bits(format, source));
    const float block_min = fp16_to_float(block_min_bits(format, source));
    for (int group = 0; group < groups_per_block; ++group) {
      float scale = block_scale, min = block_min;
      if (info.block_values == 256) {  // two levels; the products of the levels are exact in fp32
        const SubScale sub = sub_scale(format, source, group);
        scale *= format == WeightFormat::kQ6_K ? static_cast<float>(static_cast<int8_t>(sub.scale_bits))
                                               : static_cast<float>(sub.scale_bits);
        min *= -static_cast<float>(sub.min_bits);
      }
      for (int64_t i = group * info.group_values; i < (group + 1) * info.group_values; ++i) {
        const float product = scale * static_cast<float>(codes[i] - info.zero);
        out[begin + i] = info.has_min ? product + min : product;
      }
    }
  }
}

}  // namespace partita
