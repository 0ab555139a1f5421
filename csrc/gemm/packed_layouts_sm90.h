// How weights lie in device memory for the sm_90a kernels: the permutations as functions, shared by the packer (host),
// its tests and the kernels, which assert that they mean the same.
//
//   sm90_w4     codes: int4 (code - 8), fragments of 16 channels x 16 inputs = 128 bytes; fragments of all channels for
//               inputs 0..15, then those for 16..31, ...   group_params: scales [group, channel] in the activation
//               type, then offsets [group, channel]: value = (code - 8) * scale + offset
//   sm90_e4m3   codes: [channel, input] e4m3.   channel_scale [channel], or group_params: fp32 [channel / 128,
//               input / 128]
//   sm90_s8     codes: [channel, input] s8.   channel_scale [channel]
//   sm90_half   codes: [channel, input] fp16 or bf16
#pragma once

#include <cstdint>
#include <vector>

#include "gemm/gemm_kernels_gpu.h"

namespace partita {

constexpr const char* kW4Layout = "sm90_w4";
constexpr const char* kE4M3Layout = "sm90_e4m3";
constexpr const char* kS8Layout = "sm90_s8";
constexpr const char* kHalfLayout = "sm90_half";

// Place of a code in its fragment, in nibbles: lane 4 * (channel % 8) + input % 8 / 2 has one word, and in it the
// codes of a lane's operand-A registers (channel / 8, input / 8) as the low and high half of one 16-bit pair apart by
// four nibbles.
constexpr int w4_fragment_nibble(int channel, int input) {
  const int lane = channel % 8 * 4 + input % 8 / 2;
  const int pair = channel / 8 + input / 8 * 2;
  return lane * 8 + pair + input % 2 * 4;
}

constexpr int64_t w4_nibble(int64_t channel, int64_t input, int64_t padded_channels) {
  return (input / 16 * (padded_channels / 16) + channel / 16) * 256 +
         w4_fragment_nibble(static_cast<int>(channel % 16), static_cast<int>(input % 16));
}

// The rows of packed_layouts_gpu.cpp's table that lie here.
const std::vector<PackedLayout>& packed_layouts_sm90();

}  // namespace partita
