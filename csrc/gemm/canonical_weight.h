// The canonical form of a quantised or plain matrix: what it *is*, exactly, before any machine's packing (DESIGN 3).
//
//   value[n, k] = scale * (code[n, k] - zero) + min            scale, zero and min of the group that holds (n, k)
//   two levels (QoQ): scale = channel_scale[n] * sub_scale[n, k / group], min absent
//
// A Weight (gemm.h) is read into it without re-rounding; hosts build it from AWQ, GPTQ, compressed-tensors, QoQ and FP8
// checkpoints. Codes lie unpacked, one element each: this form is a stop on the way to the device and short-lived.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "gemm/gemm.h"

namespace partita {

enum class WeightCodes : uint8_t { kU4, kU8, kS8, kE4M3, kF16, kBF16, kF32 };
const char* weight_codes_name(WeightCodes codes);  // "u4", "u8", "s8", "e4m3", "f16", "bf16", "f32"
WeightCodes parse_weight_codes(const std::string& name);
constexpr size_t weight_code_bytes(WeightCodes codes) {  // in this form: nibbles take a byte
  return codes == WeightCodes::kF32 ? 4 : codes == WeightCodes::kF16 || codes == WeightCodes::kBF16 ? 2 : 1;
}
constexpr bool is_integer_code(WeightCodes codes) { return codes <= WeightCodes::kS8; }

struct CanonicalWeight {
  WeightCodes codes = WeightCodes::kF32;
  int64_t out_features = 0;
  int64_t in_features = 0;
  std::vector<uint8_t> data;  // [N, K] elements of weight_code_bytes

  // Inputs that share a scale: 16, 32, 64, 128, or -1: the whole row. Codes without scales (plain 16-bit and fp32
  // matrices) have group -1 and empty `scales`.
  int64_t group = -1;
  int64_t group_rows = 1;  // outputs that share a scale: 1, or 128 (FP8 in blocks of 128 x 128)
  // G = ceil(K / group), R = ceil(N / group_rows). fp32 holds every fp16, bf16 and two-level product exactly.
  std::vector<float> scales;   // [R, G]
  std::vector<uint8_t> zeros;  // [R, G] of unsigned codes, or empty: common_zero
  int common_zero = 0;         // of all groups when `zeros` is empty
  std::vector<float> mins;     // [R, G], or empty
  // Two levels: scales is [N, 1] per channel and these are [N, G]; group is theirs.
  std::vector<uint8_t> sub_scales;
  // Column i of this matrix meets input input_order[i] (GPTQ act-order); empty: input i.
  std::vector<int32_t> input_order;

  bool has_two_levels() const { return !sub_scales.empty(); }
  int64_t num_groups() const { return group < 0 ? 1 : (in_features + group - 1) / group; }

  // Throws ValueError naming `name` and the field.
  void check(const char* name) const;
  // The exact value of each element of one row, rounded once to fp32 where the formula needs more.  out: [in_features]
  void dequantize_row(int64_t row, float* out) const;
};

// Exact: Q4_0 u4, zero 8, groups of 32; Q4_1 u4 with mins; Q4_K u4 with fp32 scales and mins (the products of its two
// levels need up to 17 bits); Q5_0, Q8_0 u8 with zero 16 and 128, groups of 32; Q6_K u8, zero 32, groups of 16; F32,
// F16 and BF16 as they are. Rows in the order of weight.row_order.
CanonicalWeight canonical_from(const Weight& weight);

}  // namespace partita
