// What a GPU matmul kernel is: the registry entry of the family "gemm", the params that its launch receives, and the
// packed layouts. Selection (select_gpu.h) sees only this; a further architecture adds entries and layouts.
//
// Names of the tile: channels are outputs (rows of the weight, operand A of the MMA), tokens the other side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/gpu.h"
#include "core/kernel_registry.h"
#include "gemm/canonical_weight.h"
#include "gemm/gemm.h"
#include "gemm/gemm_gpu.h"

namespace partita {

// Where the weight's scales are applied.
enum class WeightScaling : uint8_t {
  kNone,      // plain 16-bit or fp32 elements
  kGroup,     // to each element before the MMA, in the activation type: scale and, maybe, zero or min of a group
  kChannel,   // in the epilogue, fp32: scale and, maybe, zero (through the token's x_sum) of an output
  kGroupSum,  // to the exact integer sum of each group of 32, fp32 (int8 activations)
  kTwoLevel,  // integer sub-scale and zero of a group before the MMA, fp32 scale of an output in the epilogue (QoQ)
  kBlock128,  // FP8 in 128 x 128 blocks: to the sum of each 128 inputs, fp32
};
const char* weight_scaling_name(WeightScaling scaling);

// The second 16-bit number beside a group's scale (kGroup).
enum class GroupOffset : uint8_t { kCommonZero, kZero, kMin };

// One packed matrix in device memory: what a layout's pack() fills and kernels read. Null where the layout has none.
struct PackedWeightView {
  const std::byte* codes = nullptr;         // elements in the layout's order
  const std::byte* group_params = nullptr;  // per (group, channel), in the layout's order
  const float* channel_scale = nullptr;     // [padded N]
  const int32_t* channel_zero = nullptr;    // [padded N] or null
  int64_t out_features = 0, padded_out_features = 0;
  int64_t in_features = 0, padded_in_features = 0;
  int32_t group = -1;       // inputs per scale; -1: the row
  int32_t num_groups = 1;   // of a row, padding included
  int32_t common_zero = 0;  // GroupOffset::kCommonZero
  GroupOffset offset = GroupOffset::kCommonZero;
  bool is_gate_interleaved = false;  // packed row 16 i + r is gate row 8 i + r for r < 8, else up row 8 i + r - 8
};

// One launch. Pointers are device memory; everything is checked before.
struct GemmKernelParams {
  PackedWeightView weight;
  const void* x = nullptr;  // [T, K], rows 16-byte aligned
  int64_t x_stride = 0;     // elements
  const float* x_scale = nullptr;
  const int32_t* x_sum = nullptr;
  int32_t x_scale_groups = 1;  // 1: x_scale is [T]; else [T, groups], each of 128 inputs
  int32_t num_tokens = 0;
  void* out = nullptr;  // first column of this matrix
  DType out_type = DType::kF32;
  int64_t out_stride = 0;          // elements
  const float* bias = nullptr;     // [out_features] of this matrix, or null (gated: gate half)
  const float* up_bias = nullptr;  // gated: up half
  bool add_to_out = false;
  GateActivation gate = GateActivation::kNone;
  // int8 and e4m3 as out_type. out_sum is zero before the launch; the launch that has output 0 sets out_scale, others
  // have null there.
  float out_code_scale = 0, out_inverse_scale = 0;
  float* out_scale = nullptr;
  int32_t* out_sum = nullptr;
  // Schedule, chosen on the host. Split s of a tile covers K tiles [s, s + 1) * ceil(num K tiles / num_splits).
  int32_t num_splits = 1;
  float* partials = nullptr;     // [num tiles, num_splits, tile tokens, tile channels] fp32
  uint32_t* counters = nullptr;  // [num tiles], zero before and after
  int32_t num_ctas = 1;          // grid; each CTA loops over work items
};

struct GemmKernel {
  static constexpr const char* kFamily = "gemm";
  KernelInfo info;

  // What it takes.
  GpuActivations activations;
  WeightCodes codes;
  WeightScaling scaling;
  uint32_t groups;     // sum of the group sizes it takes (16 | 32 | 64 | 128), kWholeRow for -1
  const char* layout;  // id of the packed layout that it reads: a row of packed_layouts_gpu.cpp
  // Further needs of a kernel on N, K or the epilogue: null, or gives a sentence why not (or null).
  const char* (*why_not)(const GemmKernelParams& params);
  int min_compute_capability, max_compute_capability;  // 80 and 0 (no limit); 90 and 90 for sm_90a code

  // Its tile and schedule.
  int tile_tokens, tile_channels, tile_k;
  int warps_tokens, warps_channels, warps_k;  // warps of a CTA along each; consumers only where producers are apart
  int num_stages;
  size_t shared_bytes;
  int ctas_per_sm;  // that registers and shared memory allow, for the cost model
  bool can_split;
  bool stores_codes;  // takes int8 and e4m3 as out_type
  // How an output is summed. Kernels of the same class other than kOwn give it the same bits: kIntegers at any number
  // of splits, the others at one.
  enum Accumulation : int { kOwn, kIntegers, kAscendingFma, kAscendingMma, kAscendingWgmma };
  Accumulation accumulation;

  void (*launch)(const GemmKernelParams& params, void* stream);

  static constexpr uint32_t kWholeRow = 1;
};

// A packed layout, host side: the permutation between canonical elements and packed bytes. Rows are added in
// packed_layouts_gpu.cpp; kernels name the id.
struct PackedLayout {
  const char* id;
  int channel_multiple, k_multiple;  // what N and K are padded to, with weights of value zero
  // Null when this layout holds such a weight for such activations, else a sentence why not.
  const char* (*why_not)(const CanonicalWeight& weight, GpuActivations activations);
  // Sizes of the pieces of PackedWeightView, then their bytes. `weight` has rows already concatenated and, where asked
  // for, interleaved; out pointers are host memory of the sizes asked for, zeroed.
  struct Sizes {
    size_t codes, group_params;
    bool has_channel_scale, has_channel_zero;
  };
  Sizes (*sizes)(const CanonicalWeight& weight, GpuActivations activations);
  // Also fills group, num_groups, common_zero and offset of the view.
  void (*pack)(const CanonicalWeight& weight, GpuActivations activations, std::byte* codes, std::byte* group_params,
               float* channel_scale, int32_t* channel_zero, PackedWeightView* view);
  // The inverse over the same bytes; `weight` gives shape and kind, its data, scales, zeros and mins are filled.
  void (*unpack)(const PackedWeightView& host_view, GpuActivations activations, CanonicalWeight* weight);
};
constexpr const char* kNaiveLayout = "naive_f32";  // any weight, dequantised exactly
const PackedLayout* find_packed_layout(const std::string& id);
std::vector<const PackedLayout*> all_packed_layouts();

// Columns of x in the order of a packed weight with an input_order: before the matmul, into the workspace.
struct GatherInputsParams {
  const void* x;  // [T, K]
  int64_t x_stride;
  void* out;  // [T, K]: out[t, i] = x[t, input_order[i]]
  int64_t out_stride;
  const int32_t* input_order;
  int64_t num_tokens, in_features;
  int32_t element_bytes;  // 1 or 2
  int32_t num_ctas;
};
struct GatherInputsKernel {
  static constexpr const char* kFamily = "gather_inputs";
  KernelInfo info;
  void (*launch)(const GatherInputsParams& params, void* stream);
};

}  // namespace partita
