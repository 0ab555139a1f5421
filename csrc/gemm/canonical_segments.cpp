#include "gemm/canonical_segments.h"

#include <algorithm>

#include "core/check.h"

namespace partita {
namespace {

// Appends row `row` of `from` (row < 0: zeros) to a matrix of one field of `per_row` values a row.
template <typename T>
void append_row(std::vector<T>* target, const std::vector<T>& from, int64_t row, int64_t per_row) {
  if (from.empty()) return;
  if (row < 0)
    target->insert(target->end(), per_row, T{0});
  else
    target->insert(target->end(), from.begin() + row * per_row, from.begin() + (row + 1) * per_row);
}

CanonicalWeight empty_like(const CanonicalWeight& weight) {
  CanonicalWeight copy;
  copy.codes = weight.codes;
  copy.in_features = weight.in_features;
  copy.group = weight.group;
  copy.group_rows = weight.group_rows;
  copy.common_zero = weight.common_zero;
  copy.input_order = weight.input_order;
  return copy;
}

CanonicalWeight as_fp32(const CanonicalWeight& weight) {
  CanonicalWeight out;
  out.codes = WeightCodes::kF32;
  out.out_features = weight.out_features;
  out.in_features = weight.in_features;
  out.data.resize(static_cast<size_t>(weight.out_features) * weight.in_features * sizeof(float));
  for (int64_t n = 0; n < weight.out_features; ++n)
    weight.dequantize_row(n, reinterpret_cast<float*>(out.data.data()) + n * weight.in_features);
  return out;
}

int unsigned_common_zero(const CanonicalWeight& w) { return w.codes == WeightCodes::kS8 ? 128 : w.common_zero; }

CanonicalWeight as_unsigned_bytes(const CanonicalWeight& weight, int64_t group, bool with_mins) {
  CanonicalWeight out = empty_like(weight);
  out.codes = WeightCodes::kU8;
  out.out_features = weight.out_features;
  out.group = group;
  out.data = weight.data;
  if (weight.codes == WeightCodes::kS8)
    for (uint8_t& code : out.data) code ^= 0x80;
  out.common_zero = with_mins ? 0 : unsigned_common_zero(weight);
  const int64_t groups = out.num_groups();
  for (int64_t n = 0; n < weight.out_features; ++n)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t cell = n * weight.num_groups() + (weight.group < 0 ? 0 : g * group / weight.group);
      const float scale = weight.scales[cell];
      out.scales.push_back(scale);
      if (!with_mins) continue;
      const int zero = weight.zeros.empty() ? unsigned_common_zero(weight) : weight.zeros[cell];
      out.mins.push_back((weight.mins.empty() ? 0.0f : weight.mins[cell]) - scale * static_cast<float>(zero));
    }
  return out;
}

}  // namespace

bool is_same_kind(const CanonicalWeight& a, const CanonicalWeight& b) {
  return a.codes == b.codes && a.in_features == b.in_features && a.group == b.group && a.group_rows == b.group_rows &&
         a.group_rows == 1 && a.zeros.empty() == b.zeros.empty() && a.mins.empty() == b.mins.empty() &&
         (!a.zeros.empty() || a.common_zero == b.common_zero) && a.has_two_levels() == b.has_two_levels() &&
         a.input_order == b.input_order;
}

CanonicalWeight rows_of(const CanonicalWeight& weight, const std::vector<int64_t>& rows) {
  PARTITA_CHECK(weight.group_rows == 1, "weight: got scales of ", weight.group_rows, " rows, wanted of one");
  CanonicalWeight out = empty_like(weight);
  out.out_features = static_cast<int64_t>(rows.size());
  const int64_t groups = weight.num_groups(), scales = weight.has_two_levels() ? 1 : groups;
  const int64_t row_bytes = weight.in_features * static_cast<int64_t>(weight_code_bytes(weight.codes));
  out.data.reserve(rows.size() * row_bytes);
  for (const int64_t row : rows) {
    append_row(&out.data, weight.data, row, row_bytes);
    append_row(&out.scales, weight.scales, row, scales);
    append_row(&out.zeros, weight.zeros, row, groups);
    append_row(&out.mins, weight.mins, row, groups);
    append_row(&out.sub_scales, weight.sub_scales, row, groups);
  }
  return out;
}

CanonicalWeight concatenated(const std::vector<const CanonicalWeight*>& segments) {
  if (segments.size() == 1) return *segments[0];
  CanonicalWeight out = empty_like(*segments[0]);
  const auto append = [](auto* target, const auto& from) { target->insert(target->end(), from.begin(), from.end()); };
  for (const CanonicalWeight* segment : segments) {
    out.out_features += segment->out_features;
    append(&out.data, segment->data);
    append(&out.scales, segment->scales);
    append(&out.zeros, segment->zeros);
    append(&out.mins, segment->mins);
    append(&out.sub_scales, segment->sub_scales);
  }
  return out;
}

CanonicalWeight gate_interleaved(const CanonicalWeight& weight) {
  const int64_t half = weight.out_features / 2;
  std::vector<int64_t> rows;
  for (int64_t first = 0; first < half; first += 8)
    for (const int64_t start : {int64_t{0}, half})
      for (int64_t row = first; row < first + 8; ++row) rows.push_back(row < half ? start + row : -1);
  return rows_of(weight, rows);
}

std::vector<CanonicalWeight> unified(const std::vector<CanonicalWeight>& segments) {
  int64_t group = -1;
  bool is_integer = true, has_offsets = false;
  for (const CanonicalWeight& segment : segments) {
    is_integer =
        is_integer && is_integer_code(segment.codes) && !segment.has_two_levels() && segment.input_order.empty();
    if (segment.group > 0) group = group < 0 ? segment.group : std::min(group, segment.group);
    has_offsets = has_offsets || !segment.zeros.empty() || !segment.mins.empty() ||
                  unsigned_common_zero(segment) != unsigned_common_zero(segments[0]);
  }
  std::vector<CanonicalWeight> out;
  for (const CanonicalWeight& segment : segments)
    out.push_back(is_integer ? as_unsigned_bytes(segment, group, has_offsets) : as_fp32(segment));
  return out;
}

}  // namespace partita
