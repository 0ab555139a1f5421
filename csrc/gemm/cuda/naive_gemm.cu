// The matmul for what no other kernel takes, and the exact mode: the weight dequantised to fp32, [K][padded N]; one
// fp32 accumulator for each output, one fused multiply-add per input, K ascending, as the CPU's exact mode. A thread
// has one output (gated: its gate and its up row) of a few tokens, so that neighbouring threads read neighbouring
// weights and a weight is read once for those tokens.
#include "device/launch.cuh"
#include "device/ptx_convert.cuh"
#include "gemm/cuda/gemm_epilogue.cuh"
#include "gemm/gemm_kernels_gpu.h"

namespace partita::gemm {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = 4;
constexpr int kScaleInputs = 128;  // of one x_scale, where a token has several

template <GpuActivations kActivations>
__device__ __forceinline__ float input_at(const GemmKernelParams& params, int64_t token, int64_t k) {
  const int64_t index = token * params.x_stride + k;
  if constexpr (kActivations == GpuActivations::kF32) return static_cast<const float*>(params.x)[index];
  if constexpr (kActivations == GpuActivations::kF16)
    return device::f16_to_f32(static_cast<const uint16_t*>(params.x)[index]);
  if constexpr (kActivations == GpuActivations::kBF16)
    return device::bf16_to_f32(static_cast<const uint16_t*>(params.x)[index]);
  if constexpr (kActivations == GpuActivations::kInt8)
    return static_cast<float>(static_cast<const int8_t*>(params.x)[index]);
  if constexpr (kActivations == GpuActivations::kE4M3) {
    const float value = device::f16_to_f32(
        static_cast<uint16_t>(device::e4m3x2_to_f16x2(static_cast<const uint8_t*>(params.x)[index]) & 0xffffu));
    return params.x_scale_groups == 1 ? value
                                      : value * params.x_scale[token * params.x_scale_groups + k / kScaleInputs];
  }
  return 0.0f;
}

template <GpuActivations kActivations>
__device__ __forceinline__ float token_scale(const GemmKernelParams& params, int64_t token) {
  if constexpr (kActivations == GpuActivations::kInt8 || kActivations == GpuActivations::kE4M3)
    return params.x_scale_groups == 1 ? params.x_scale[token] : 1.0f;
  return 1.0f;
}

// One output of one token.
__device__ __forceinline__ void store_output(const GemmKernelParams& params, float value, int64_t output,
                                             int64_t token) {
  const int64_t index = token * params.out_stride + output;
  if (is_code_type(params.out_type)) {
    const float values[4] = {value, 0.0f, 0.0f, 0.0f};
    int32_t codes[4];
    static_cast<uint8_t*>(params.out)[index] =
        static_cast<uint8_t>(four_codes(values, params.out_inverse_scale, params.out_type, codes));
    if (output == 0 && params.out_scale) params.out_scale[token] = params.out_code_scale;
    if (params.out_sum) atomicAdd(params.out_sum + token, codes[0]);
  } else if (params.out_type == DType::kF32) {
    float* out = static_cast<float*>(params.out) + index;
    *out = params.add_to_out ? *out + value : value;
  } else {
    static_cast<uint16_t*>(params.out)[index] =
        params.out_type == DType::kF16 ? device::f32_to_f16(value) : device::f32_to_bf16(value);
  }
}

template <GpuActivations kActivations>
__global__ void __launch_bounds__(kThreads) naive_gemm_kernel(const __grid_constant__ GemmKernelParams params) {
  const bool is_gated = params.gate != GateActivation::kNone;
  const int64_t num_outputs = is_gated ? params.weight.out_features / 2 : params.weight.out_features;
  const int64_t output_tiles = (num_outputs + kThreads - 1) / kThreads;
  const int64_t num_tiles = output_tiles * ((params.num_tokens + kTokens - 1) / kTokens);
  const auto* weight = reinterpret_cast<const float*>(params.weight.codes);
  const int64_t stride = params.weight.padded_out_features;
  for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int64_t output = tile % output_tiles * kThreads + threadIdx.x;
    const int64_t first_token = tile / output_tiles * kTokens;
    if (output >= num_outputs) continue;
    const int64_t row = is_gated ? interleaved_row(output) : output;
    float sums[kTokens] = {}, up_sums[kTokens] = {};
    for (int64_t k = 0; k < params.weight.in_features; ++k) {
      const float w = weight[k * stride + row], up = is_gated ? weight[k * stride + row + 8] : 0.0f;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (first_token + t >= params.num_tokens) continue;
        const float x = input_at<kActivations>(params, first_token + t, k);
        sums[t] = fmaf(w, x, sums[t]);
        if (is_gated) up_sums[t] = fmaf(up, x, up_sums[t]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int64_t token = first_token + t;
      if (token >= params.num_tokens) continue;
      const float scale = token_scale<kActivations>(params, token);
      float value = sums[t] * scale;
      if (params.bias) value += params.bias[output];
      if (is_gated) {
        float up = up_sums[t] * scale;
        if (params.bias) up += params.up_bias[output];
        value = gated(params.gate, value, up);
      }
      store_output(params, value, output, token);
    }
  }
}

template <GpuActivations kActivations>
void launch_naive(const GemmKernelParams& params, void* stream) {
  device::launch("naive_gemm", &naive_gemm_kernel<kActivations>, {static_cast<unsigned>(params.num_ctas)}, {kThreads},
                 0, stream, params);
}

template <GpuActivations kActivations>
constexpr GemmKernel naive_entry(const char* name) {
  GemmKernel entry{};
  entry.info = {name, ""};
  entry.activations = kActivations;
  entry.codes = WeightCodes::kF32;
  entry.scaling = WeightScaling::kNone;
  entry.groups = GemmKernel::kWholeRow;
  entry.layout = kNaiveLayout;
  entry.min_compute_capability = 80;
  entry.tile_tokens = kTokens, entry.tile_channels = kThreads, entry.tile_k = 1;
  entry.warps_tokens = 1, entry.warps_channels = kThreads / 32, entry.warps_k = 1;
  entry.num_stages = 1;
  entry.ctas_per_sm = 8;
  entry.stores_codes = true;
  entry.accumulation = GemmKernel::kAscendingFma;
  entry.launch = &launch_naive<kActivations>;
  return entry;
}

const KernelRegistration<GemmKernel> kF32(naive_entry<GpuActivations::kF32>("naive_f32"));
const KernelRegistration<GemmKernel> kF16(naive_entry<GpuActivations::kF16>("naive_f16"));
const KernelRegistration<GemmKernel> kBF16(naive_entry<GpuActivations::kBF16>("naive_bf16"));
const KernelRegistration<GemmKernel> kInt8(naive_entry<GpuActivations::kInt8>("naive_int8"));
const KernelRegistration<GemmKernel> kE4M3(naive_entry<GpuActivations::kE4M3>("naive_e4m3"));

// ---- act-order: the input's columns in the order of the packed weight's

template <typename Element>
__global__ void __launch_bounds__(kThreads) gather_inputs_kernel(const __grid_constant__ GatherInputsParams params) {
  const int64_t total = params.num_tokens * params.in_features;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t token = i / params.in_features, k = i % params.in_features;
    static_cast<Element*>(params.out)[token * params.out_stride + k] =
        static_cast<const Element*>(params.x)[token * params.x_stride + params.input_order[k]];
  }
}

void launch_gather(const GatherInputsParams& params, void* stream) {
  const int64_t blocks = (params.num_tokens * params.in_features + kThreads - 1) / kThreads;
  const device::Dim3 grid{static_cast<unsigned>(blocks < params.num_ctas ? blocks : params.num_ctas)};
  if (params.element_bytes == 1)
    device::launch("gather_inputs", &gather_inputs_kernel<uint8_t>, grid, {kThreads}, 0, stream, params);
  else
    device::launch("gather_inputs", &gather_inputs_kernel<uint16_t>, grid, {kThreads}, 0, stream, params);
}

const KernelRegistration<GatherInputsKernel> kGather({{"gather_inputs", ""}, &launch_gather});

}  // namespace
}  // namespace partita::gemm
