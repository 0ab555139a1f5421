// The packed layouts of the sm_80 family: where each element and parameter goes. fragment_layout.h has the permutation;
// here it is applied to canonical weights, and undone for tests.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <vector>

#include "core/check.h"
#include "core/float16.h"
#include "core/parallel_for.h"
#include "gemm/fragment_layout.h"
#include "gemm/gemm_kernels_gpu.h"
#include "gemm/packed_layouts_sm90.h"

namespace partita {
namespace {

constexpr int kVectorBytes = 16;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t channel_blocks(const CanonicalWeight& w) { return round_up(w.out_features, kPackedChannels) / kPackedChannels; }
int64_t k_blocks(const CanonicalWeight& w) { return round_up(w.in_features, kPackedInputs) / kPackedInputs; }
int64_t padded_groups(const CanonicalWeight& w) {
  return w.group < 0 ? 1 : round_up(round_up(w.in_features, kPackedInputs), w.group) / w.group;
}

bool is_half(GpuActivations activations) {
  return activations == GpuActivations::kF16 || activations == GpuActivations::kBF16;
}

// ---- the permutation

// Visits the lanes' vectors of a channel block in the order of packed memory: visit(byte offset of the vector, first
// channel of its fragment, first k, lane).
template <int kCodeBits, int kActivationBytes, typename Visit>
void for_each_vector(int64_t channel_block, int64_t num_k_blocks, const Visit& visit) {
  constexpr int kVectors = vectors_per_block(kCodeBits);
  int64_t offset = channel_block * num_k_blocks * kFragmentsPerBlock * kVectors * 32 * kVectorBytes;
  for (int64_t k_block = 0; k_block < num_k_blocks; ++k_block)
    for (int f = 0; f < kFragmentsPerBlock; ++f)
      for (int vector = 0; vector < kVectors; ++vector)
        for (int lane = 0; lane < 32; ++lane, offset += kVectorBytes)
          visit(offset, channel_block * kPackedChannels + f * kFragmentChannels,
                k_block * kPackedInputs + vector * (kPackedInputs / kVectors), lane);
}

// Visits the elements of a lane's vector: visit(channel in the fragment, k in the vector, bit offset).
template <int kCodeBits, int kActivationBytes, typename Visit>
void for_each_element(int lane, const Visit& visit) {
  for (int step = 0; step < steps_per_vector(kCodeBits, kActivationBytes); ++step)
    for (int reg = 0; reg < 4; ++reg)
      for (int element = 0; element < 4 / kActivationBytes; ++element) {
        const FragmentElement at = fragment_coordinates(lane, reg, element, kActivationBytes);
        visit(at.channel, step * fragment_k(kActivationBytes) + at.k,
              packed_bit(kCodeBits, kActivationBytes, step, reg, element));
      }
}

// code(n, k) gives the bits of an element, also where n or k is padding.
template <int kCodeBits, int kActivationBytes, typename Code>
void pack_codes(const CanonicalWeight& w, std::byte* out, const Code& code) {
  const int64_t num_k_blocks = k_blocks(w);
  parallel_for(channel_blocks(w), 0, [&](int64_t block, int) {
    for_each_vector<kCodeBits, kActivationBytes>(
        block, num_k_blocks, [&](int64_t offset, int64_t n, int64_t k, int lane) {
          uint64_t words[2] = {0, 0};  // a code straddles no word
          for_each_element<kCodeBits, kActivationBytes>(lane, [&](int channel, int input, int bit) {
            words[bit / 64] |= static_cast<uint64_t>(code(n + channel, k + input)) << (bit % 64);
          });
          std::memcpy(out + offset, words, sizeof words);
        });
  });
}

template <int kCodeBits, int kActivationBytes, typename Store>
void unpack_codes(const CanonicalWeight& w, const std::byte* packed, const Store& store) {
  for (int64_t block = 0; block < channel_blocks(w); ++block)
    for_each_vector<kCodeBits, kActivationBytes>(
        block, k_blocks(w), [&](int64_t offset, int64_t n, int64_t k, int lane) {
          uint64_t words[2];
          std::memcpy(words, packed + offset, sizeof words);
          for_each_element<kCodeBits, kActivationBytes>(lane, [&](int channel, int input, int bit) {
            if (n + channel < w.out_features && k + input < w.in_features)
              store(n + channel, k + input,
                    static_cast<uint16_t>(words[bit / 64] >> (bit % 64) & ((1u << kCodeBits) - 1)));
          });
        });
}

size_t code_bytes(const CanonicalWeight& w, int code_bits) {
  return static_cast<size_t>(channel_blocks(w)) * k_blocks(w) * kPackedChannels * kPackedInputs * code_bits / 8;
}

// Calls visit(n, group, index of the entry) for each channel and group that exists.
template <typename Visit>
void for_each_parameter(const CanonicalWeight& w, const Visit& visit) {
  const int64_t groups = padded_groups(w);
  for (int64_t n = 0; n < w.out_features; ++n)
    for (int64_t g = 0; g < w.num_groups(); ++g)
      visit(n, g,
            (n / kPackedChannels * groups + g) * kPackedChannels +
                packed_parameter_index(static_cast<int>(n % kPackedChannels)));
}
size_t num_parameter_entries(const CanonicalWeight& w) {
  return static_cast<size_t>(channel_blocks(w)) * padded_groups(w) * kPackedChannels;
}

template <typename T>
T read_at(const std::byte* data, int64_t index) {
  T value;
  std::memcpy(&value, data + index * sizeof(T), sizeof(T));
  return value;
}
template <typename T>
void write_at(std::byte* data, int64_t index, T value) {
  std::memcpy(data + index * sizeof(T), &value, sizeof(T));
}

uint16_t to_half(float value, GpuActivations activations) {
  return activations == GpuActivations::kF16 ? float_to_fp16(value) : float_to_bf16(value);
}
float from_half(uint16_t bits, GpuActivations activations) {
  return activations == GpuActivations::kF16 ? fp16_to_float(bits) : bf16_to_float(bits);
}

// ---- 4- and 8-bit codes with 16-bit group parameters, 16-bit activations

GroupOffset offset_of(const CanonicalWeight& w) {
  return !w.mins.empty() ? GroupOffset::kMin : !w.zeros.empty() ? GroupOffset::kZero : GroupOffset::kCommonZero;
}

// s8 codes are stored with their sign bit flipped, as unsigned codes with zero 128.
uint8_t unsigned_code(const CanonicalWeight& w, int64_t n, int64_t k) {
  const uint8_t code = w.data[n * w.in_features + k];
  return w.codes == WeightCodes::kS8 ? code ^ 0x80 : code;
}
int unsigned_zero(const CanonicalWeight& w) { return w.codes == WeightCodes::kS8 ? 128 : w.common_zero; }

// What the kernel's integer-to-float patterns add to the code of this channel (weight_decode.cuh).
int pattern_bias(int code_bits, GpuActivations activations, int64_t n) {
  if (activations == GpuActivations::kBF16) return code_bits == 4 ? 128 : 0;
  return code_bits == 4 && n % 16 >= 8 ? 64 : 1024;
}

template <int kCodeBits>
const char* why_not_group(const CanonicalWeight& w, GpuActivations activations) {
  if (!is_half(activations)) return "wants f16 or bf16 activations";
  if (kCodeBits == 4 ? w.codes != WeightCodes::kU4 : w.codes != WeightCodes::kU8 && w.codes != WeightCodes::kS8)
    return kCodeBits == 4 ? "wants u4 codes" : "wants u8 or s8 codes";
  if (w.has_two_levels()) return "has no second level of scales";
  if (kCodeBits == 4 && w.group == 16) return "wants groups of 32 or more";
  if (activations == GpuActivations::kF16)
    for (const float scale : w.scales)
      if (std::abs(scale) > 65504.0f) return "a scale is beyond fp16";
  return nullptr;
}

template <int kCodeBits>
PackedLayout::Sizes group_sizes(const CanonicalWeight& w, GpuActivations) {
  const size_t entry = offset_of(w) == GroupOffset::kCommonZero ? 2 : 4;
  return {code_bytes(w, kCodeBits), num_parameter_entries(w) * entry, false, false};
}

template <int kCodeBits>
void pack_group(const CanonicalWeight& w, GpuActivations activations, std::byte* codes, std::byte* group_params, float*,
                int32_t*, PackedWeightView* view) {
  const GroupOffset offset = offset_of(w);
  const int common_zero = unsigned_zero(w);
  view->group = static_cast<int32_t>(w.group);
  view->num_groups = static_cast<int32_t>(padded_groups(w));
  view->offset = offset;
  view->common_zero = offset == GroupOffset::kMin ? 0 : common_zero;
  pack_codes<kCodeBits, 2>(w, codes, [&](int64_t n, int64_t k) -> uint8_t {
    return n < w.out_features && k < w.in_features ? unsigned_code(w, n, k) : 0;
  });
  for_each_parameter(w, [&](int64_t n, int64_t g, int64_t index) {
    const int64_t cell = n * w.num_groups() + g;
    const uint16_t scale = to_half(w.scales[cell], activations);
    if (offset == GroupOffset::kCommonZero) return write_at(group_params, index, scale);
    const float zero = w.zeros.empty() ? static_cast<float>(common_zero) : static_cast<float>(w.zeros[cell]);
    // A zero beside a min is folded into it, in fp32.
    const float upper = offset == GroupOffset::kMin
                            ? (zero == 0 ? w.mins[cell] : w.mins[cell] - w.scales[cell] * zero)
                            : -static_cast<float>(pattern_bias(kCodeBits, activations, n)) - zero;
    write_at(group_params, index,
             static_cast<uint32_t>(scale) | static_cast<uint32_t>(to_half(upper, activations)) << 16);
  });
}

template <int kCodeBits>
void unpack_group(const PackedWeightView& view, GpuActivations activations, CanonicalWeight* w) {
  w->codes = kCodeBits == 4 ? WeightCodes::kU4 : WeightCodes::kU8;
  w->data.assign(static_cast<size_t>(w->out_features) * w->in_features, 0);
  w->group = view.group;
  w->common_zero = view.common_zero;
  const size_t cells = static_cast<size_t>(w->out_features) * w->num_groups();
  w->scales.assign(cells, 0);
  w->zeros.assign(view.offset == GroupOffset::kZero ? cells : 0, 0);
  w->mins.assign(view.offset == GroupOffset::kMin ? cells : 0, 0);
  unpack_codes<kCodeBits, 2>(*w, view.codes, [&](int64_t n, int64_t k, uint16_t code) {
    w->data[n * w->in_features + k] = static_cast<uint8_t>(code);
  });
  for_each_parameter(*w, [&](int64_t n, int64_t g, int64_t index) {
    const int64_t cell = n * w->num_groups() + g;
    if (view.offset == GroupOffset::kCommonZero) {
      w->scales[cell] = from_half(read_at<uint16_t>(view.group_params, index), activations);
      return;
    }
    const uint32_t pair = read_at<uint32_t>(view.group_params, index);
    w->scales[cell] = from_half(static_cast<uint16_t>(pair), activations);
    const float upper = from_half(static_cast<uint16_t>(pair >> 16), activations);
    if (view.offset == GroupOffset::kMin)
      w->mins[cell] = upper;
    else
      w->zeros[cell] = static_cast<uint8_t>(-upper - static_cast<float>(pattern_bias(kCodeBits, activations, n)));
  });
}

// ---- plain elements, 16-bit activations

const char* why_not_plain(const CanonicalWeight& w, GpuActivations activations) {
  if (!is_half(activations)) return "wants f16 or bf16 activations";
  if (w.codes < WeightCodes::kF16) return "wants elements without scales";
  return nullptr;
}

PackedLayout::Sizes plain_sizes(const CanonicalWeight& w, GpuActivations) {
  return {code_bytes(w, 16), 0, false, false};
}

uint16_t plain_element(const CanonicalWeight& w, GpuActivations activations, int64_t n, int64_t k) {
  const int64_t index = n * w.in_features + k;
  if (w.codes == WeightCodes::kF32) {
    float value;
    std::memcpy(&value, w.data.data() + 4 * index, 4);
    return to_half(value, activations);
  }
  uint16_t bits;
  std::memcpy(&bits, w.data.data() + 2 * index, 2);
  if ((w.codes == WeightCodes::kF16) == (activations == GpuActivations::kF16)) return bits;
  return to_half(w.codes == WeightCodes::kF16 ? fp16_to_float(bits) : bf16_to_float(bits), activations);
}

void pack_plain(const CanonicalWeight& w, GpuActivations activations, std::byte* codes, std::byte*, float*, int32_t*,
                PackedWeightView*) {
  pack_codes<16, 2>(w, codes, [&](int64_t n, int64_t k) -> uint16_t {
    return n < w.out_features && k < w.in_features ? plain_element(w, activations, n, k) : 0;
  });
}

void unpack_plain(const PackedWeightView& view, GpuActivations activations, CanonicalWeight* w) {
  w->codes = activations == GpuActivations::kF16 ? WeightCodes::kF16 : WeightCodes::kBF16;
  w->data.assign(static_cast<size_t>(w->out_features) * w->in_features * 2, 0);
  unpack_codes<16, 2>(*w, view.codes, [&](int64_t n, int64_t k, uint16_t bits) {
    std::memcpy(w->data.data() + 2 * (n * w->in_features + k), &bits, 2);
  });
}

// ---- int8 activations

// Integer value of a code without a second level, or one that s8 cannot hold.
int centred_code(const CanonicalWeight& w, int64_t n, int64_t k) {
  const int64_t index = n * w.in_features + k;
  if (w.codes == WeightCodes::kS8) return static_cast<int8_t>(w.data[index]);
  const int zero = w.zeros.empty() ? w.common_zero : w.zeros[n * w.num_groups() + (w.group < 0 ? 0 : k / w.group)];
  return static_cast<int>(w.data[index]) - zero;
}

bool fits_signed_bytes(const CanonicalWeight& w) {
  for (int64_t n = 0; n < w.out_features; ++n)
    for (int64_t k = 0; k < w.in_features; ++k) {
      const int value = centred_code(w, n, k);
      if (value < -128 || value > 127) return false;
    }
  return true;
}

const char* why_not_bytes(const CanonicalWeight& w, GpuActivations activations, int64_t group, const char* wanted) {
  if (activations != GpuActivations::kInt8) return "wants int8 activations";
  if (!is_integer_code(w.codes)) return "wants integer codes";
  if (w.has_two_levels()) return "has no second level of scales";
  if (!w.mins.empty()) return "mins would need the sum of each group of the input";
  if (w.group != group) return wanted;
  if (!fits_signed_bytes(w)) return "a code less its zero does not fit a signed byte";
  return nullptr;
}
const char* why_not_byte_channel(const CanonicalWeight& w, GpuActivations activations) {
  if (w.codes == WeightCodes::kU4) return "mma_u4_channel takes half the bytes";
  return why_not_bytes(w, activations, -1, "wants one scale per channel");
}
const char* why_not_byte_group(const CanonicalWeight& w, GpuActivations activations) {
  return why_not_bytes(w, activations, 32, "wants groups of 32");
}

PackedLayout::Sizes byte_channel_sizes(const CanonicalWeight& w, GpuActivations) {
  return {code_bytes(w, 8), 0, true, false};
}
PackedLayout::Sizes byte_group_sizes(const CanonicalWeight& w, GpuActivations) {
  return {code_bytes(w, 8), num_parameter_entries(w) * 4, false, false};
}

void pack_signed_bytes(const CanonicalWeight& w, std::byte* codes) {
  pack_codes<8, 1>(w, codes, [&](int64_t n, int64_t k) -> uint8_t {
    return n < w.out_features && k < w.in_features ? static_cast<uint8_t>(centred_code(w, n, k)) : 0;
  });
}
void pack_byte_channel(const CanonicalWeight& w, GpuActivations, std::byte* codes, std::byte*, float* channel_scale,
                       int32_t*, PackedWeightView*) {
  pack_signed_bytes(w, codes);
  std::copy(w.scales.begin(), w.scales.end(), channel_scale);
}
void pack_byte_group(const CanonicalWeight& w, GpuActivations, std::byte* codes, std::byte* group_params, float*,
                     int32_t*, PackedWeightView* view) {
  view->group = static_cast<int32_t>(w.group);
  view->num_groups = static_cast<int32_t>(padded_groups(w));
  pack_signed_bytes(w, codes);
  for_each_parameter(
      w, [&](int64_t n, int64_t g, int64_t index) { write_at(group_params, index, w.scales[n * w.num_groups() + g]); });
}

void unpack_signed_bytes(const PackedWeightView& view, CanonicalWeight* w) {
  w->codes = WeightCodes::kS8;
  w->group = view.group;
  w->data.assign(static_cast<size_t>(w->out_features) * w->in_features, 0);
  w->scales.assign(static_cast<size_t>(w->out_features) * w->num_groups(), 0);
  unpack_codes<8, 1>(*w, view.codes, [&](int64_t n, int64_t k, uint16_t code) {
    w->data[n * w->in_features + k] = static_cast<uint8_t>(code);
  });
}
void unpack_byte_channel(const PackedWeightView& view, GpuActivations, CanonicalWeight* w) {
  unpack_signed_bytes(view, w);
  std::copy(view.channel_scale, view.channel_scale + w->out_features, w->scales.begin());
}
void unpack_byte_group(const PackedWeightView& view, GpuActivations, CanonicalWeight* w) {
  unpack_signed_bytes(view, w);
  for_each_parameter(*w, [&](int64_t n, int64_t g, int64_t index) {
    w->scales[n * w->num_groups() + g] = read_at<float>(view.group_params, index);
  });
}

const char* why_not_nibble_channel(const CanonicalWeight& w, GpuActivations activations) {
  if (activations != GpuActivations::kInt8) return "wants int8 activations";
  if (w.codes != WeightCodes::kU4) return "wants u4 codes";
  if (w.has_two_levels()) return "has no second level of scales";
  if (!w.mins.empty()) return "wants zeros, not mins";
  if (w.group != -1) return "wants one scale per channel";
  return nullptr;
}
PackedLayout::Sizes nibble_channel_sizes(const CanonicalWeight& w, GpuActivations) {
  return {code_bytes(w, 4), 0, true, true};
}
void pack_nibble_channel(const CanonicalWeight& w, GpuActivations, std::byte* codes, std::byte*, float* channel_scale,
                         int32_t* channel_zero, PackedWeightView*) {
  pack_codes<4, 1>(w, codes, [&](int64_t n, int64_t k) -> uint8_t {
    return n < w.out_features && k < w.in_features ? w.data[n * w.in_features + k] : 0;
  });
  std::copy(w.scales.begin(), w.scales.end(), channel_scale);
  for (int64_t n = 0; n < w.out_features; ++n) channel_zero[n] = w.zeros.empty() ? w.common_zero : w.zeros[n];
}
void unpack_nibbles(const PackedWeightView& view, CanonicalWeight* w) {
  w->codes = WeightCodes::kU4;
  w->data.assign(static_cast<size_t>(w->out_features) * w->in_features, 0);
  unpack_codes<4, 1>(*w, view.codes, [&](int64_t n, int64_t k, uint16_t code) {
    w->data[n * w->in_features + k] = static_cast<uint8_t>(code);
  });
  w->scales.assign(view.channel_scale, view.channel_scale + w->out_features);
}
void unpack_nibble_channel(const PackedWeightView& view, GpuActivations, CanonicalWeight* w) {
  unpack_nibbles(view, w);
  w->zeros.resize(w->out_features);
  for (int64_t n = 0; n < w->out_features; ++n) w->zeros[n] = static_cast<uint8_t>(view.channel_zero[n]);
}

int zero_of_group(const CanonicalWeight& w, int64_t n, int64_t g) {
  return w.zeros.empty() ? w.common_zero : w.zeros[n * w.num_groups() + g];
}

const char* why_not_two_level(const CanonicalWeight& w, GpuActivations activations) {
  if (activations != GpuActivations::kInt8) return "wants int8 activations";
  if (!w.has_two_levels()) return "wants two levels of scales";
  if (w.group < 32) return "wants groups of 32 or more";
  for (int64_t n = 0; n < w.out_features; ++n)
    for (int64_t k = 0; k < w.in_features; ++k) {
      const int64_t g = k / w.group;
      const int value = (static_cast<int>(w.data[n * w.in_features + k]) - zero_of_group(w, n, g)) *
                        w.sub_scales[n * w.num_groups() + g];
      if (value < -128 || value > 127) return "(code - zero) * sub_scale does not fit a signed byte";
    }
  return nullptr;
}
PackedLayout::Sizes two_level_sizes(const CanonicalWeight& w, GpuActivations) {
  return {code_bytes(w, 4), num_parameter_entries(w) * 4, true, false};
}
void pack_two_level(const CanonicalWeight& w, GpuActivations, std::byte* codes, std::byte* group_params,
                    float* channel_scale, int32_t*, PackedWeightView* view) {
  view->group = static_cast<int32_t>(w.group);
  view->num_groups = static_cast<int32_t>(padded_groups(w));
  // Padding takes the group's zero for a code: its byte is then in range, or it would borrow from its neighbours.
  pack_codes<4, 1>(w, codes, [&](int64_t n, int64_t k) -> uint8_t {
    if (n >= w.out_features) return 0;
    if (k < w.in_features) return w.data[n * w.in_features + k];
    const int64_t g = k / w.group;
    return g < w.num_groups() ? static_cast<uint8_t>(zero_of_group(w, n, g)) : 0;
  });
  for_each_parameter(w, [&](int64_t n, int64_t g, int64_t index) {
    const int32_t scale = w.sub_scales[n * w.num_groups() + g];
    const auto addend = static_cast<uint32_t>(128 - zero_of_group(w, n, g) * scale);
    write_at(group_params, index, static_cast<uint32_t>(scale) | addend << 16);
  });
  std::copy(w.scales.begin(), w.scales.end(), channel_scale);
}
void unpack_two_level(const PackedWeightView& view, GpuActivations, CanonicalWeight* w) {
  unpack_nibbles(view, w);
  w->group = view.group;
  const size_t cells = static_cast<size_t>(w->out_features) * w->num_groups();
  w->sub_scales.assign(cells, 0);
  w->zeros.assign(cells, 0);
  for_each_parameter(*w, [&](int64_t n, int64_t g, int64_t index) {
    const auto entry = read_at<uint32_t>(view.group_params, index);
    const int scale = static_cast<int>(entry & 0xffffu);
    const int64_t cell = n * w->num_groups() + g;
    w->sub_scales[cell] = static_cast<uint8_t>(scale);
    w->zeros[cell] = static_cast<uint8_t>(scale ? (128 - (static_cast<int32_t>(entry) >> 16)) / scale : 0);
  });
}

// ---- any weight, dequantised exactly: [K][padded N] fp32, so that neighbouring threads read neighbours

const char* why_not_naive(const CanonicalWeight&, GpuActivations) { return nullptr; }
PackedLayout::Sizes naive_sizes(const CanonicalWeight& w, GpuActivations) {
  return {static_cast<size_t>(w.in_features) * round_up(w.out_features, kPackedChannels) * sizeof(float), 0, false,
          false};
}
void pack_naive(const CanonicalWeight& w, GpuActivations, std::byte* codes, std::byte*, float*, int32_t*,
                PackedWeightView*) {
  const int64_t padded = round_up(w.out_features, kPackedChannels);
  parallel_for(channel_blocks(w), 0, [&](int64_t block, int) {
    std::vector<float> row(w.in_features);
    const int64_t end = std::min(w.out_features, (block + 1) * kPackedChannels);
    for (int64_t n = block * kPackedChannels; n < end; ++n) {
      w.dequantize_row(n, row.data());
      for (int64_t k = 0; k < w.in_features; ++k) write_at(codes, k * padded + n, row[k]);
    }
  });
}
void unpack_naive(const PackedWeightView& view, GpuActivations, CanonicalWeight* w) {
  w->codes = WeightCodes::kF32;
  w->data.assign(static_cast<size_t>(w->out_features) * w->in_features * sizeof(float), 0);
  for (int64_t n = 0; n < w->out_features; ++n)
    for (int64_t k = 0; k < w->in_features; ++k) {
      const float value = read_at<float>(view.codes, k * view.padded_out_features + n);
      std::memcpy(w->data.data() + (n * w->in_features + k) * sizeof(float), &value, sizeof(float));
    }
}

constexpr PackedLayout kLayouts[] = {
    {"mma_u4_group", 64, 64, why_not_group<4>, group_sizes<4>, pack_group<4>, unpack_group<4>},
    {"mma_u8_group", 64, 64, why_not_group<8>, group_sizes<8>, pack_group<8>, unpack_group<8>},
    {"mma_plain16", 64, 64, why_not_plain, plain_sizes, pack_plain, unpack_plain},
    {"mma_s8_channel", 64, 64, why_not_byte_channel, byte_channel_sizes, pack_byte_channel, unpack_byte_channel},
    {"mma_s8_group32", 64, 64, why_not_byte_group, byte_group_sizes, pack_byte_group, unpack_byte_group},
    {"mma_u4_channel", 64, 64, why_not_nibble_channel, nibble_channel_sizes, pack_nibble_channel,
     unpack_nibble_channel},
    {"mma_u4_two_level", 64, 64, why_not_two_level, two_level_sizes, pack_two_level, unpack_two_level},
    {"naive_f32", 64, 1, why_not_naive, naive_sizes, pack_naive, unpack_naive},
};

}  // namespace

std::vector<const PackedLayout*> all_packed_layouts() {
  std::vector<const PackedLayout*> layouts;
  for (const PackedLayout& layout : packed_layouts_sm90()) layouts.push_back(&layout);
  for (const PackedLayout& layout : kLayouts) layouts.push_back(&layout);  // the naive one last
  return layouts;
}

const PackedLayout* find_packed_layout(const std::string& id) {
  for (const PackedLayout* layout : all_packed_layouts())
    if (id == layout->id) return layout;
  return nullptr;
}

}  // namespace partita
