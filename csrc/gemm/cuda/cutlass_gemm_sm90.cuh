// What the CUTLASS matmuls of sm_90a share: how sums leave the tensor cores, and the launch.
//
// All of them compute Y^T = W X^T: the weight is operand A (its channels are the M of CUTLASS), the tokens are N. A
// CUTLASS tile is 128 channels x tile_tokens; two warpgroups hold 64 channels each, one warp of a third one loads.
//
// The collectives read through TMA: x must start at a multiple of 16 bytes and its rows must be multiples of 16 bytes
// apart. Tokens and inputs past the end are filled with zeros by the hardware.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cute/tensor.hpp"
#include "cutlass/cuda_host_adapter.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/detail.hpp"
#include "cutlass/gemm/collective/builders/sm90_gmma_builder.inl"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/kernel/gemm_universal_decl.h"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"
#include "cutlass/kernel_launch.h"
#include "gemm/gemm_kernels_gpu.h"

namespace partita::sm90 {

constexpr int kTileChannels = 128;

// Epilogue: scales, bias, gate, residual and the narrowing to the output type, all in registers; every thread stores
// what it holds. A warp's store covers 8 neighbouring channels of 4 tokens: whole 32-byte sectors in fp32, half ones in
// 16 bits. CUTLASS's own epilogues go through shared memory and TMA, but fix the output type at compile time and know
// no gate: one instantiation (some 40 s of nvcc) for each of six combinations.
struct StoreTokensParams {
  void* out = nullptr;
  DType out_type = DType::kF32;
  int64_t out_stride = 0;
  const float* bias = nullptr;           // [N], or of the gate half
  const float* up_bias = nullptr;        // of the up half
  const float* channel_scale = nullptr;  // [padded N] in packed order, or null
  const float* token_scale = nullptr;    // [T] or null
  int32_t num_channels = 0;              // real ones, gate and up
  int32_t num_tokens = 0;
  bool adds_to_out = false;
  GateActivation gate = GateActivation::kNone;
};

class StoreTokens {
 public:
  using EpilogueSchedule = cutlass::gemm::EpilogueDefault;
  using DispatchPolicy = EpilogueSchedule;
  using ElementC = float;  // what the kernel template asks for; no tensor C or D is handed through it
  using ElementD = float;
  using StrideC = cute::Stride<cute::Int<1>, int64_t, int64_t>;
  using StrideD = StrideC;
  using Arguments = StoreTokensParams;
  using Params = StoreTokensParams;
  struct SharedStorage {};

  template <class Problem>
  static Params to_underlying_arguments(const Problem&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }

  CUTLASS_HOST_DEVICE explicit StoreTokens(const Params& params) : params_(params) {}

  template <class Problem, class Block, class Coordinates, class Engine, class Layout, class Mma, class Residue>
  CUTLASS_DEVICE void operator()(const Problem&, Block, Coordinates coordinates,
                                 const cute::Tensor<Engine, Layout>& sums, Mma mma, Residue, int thread, char*) {
    if (params_.out_type == DType::kF32) {
      store_tile<float, Block>(coordinates, sums, mma, thread);
    } else if (params_.out_type == DType::kBF16) {
      store_tile<cutlass::bfloat16_t, Block>(coordinates, sums, mma, thread);
    } else {
      store_tile<cutlass::half_t, Block>(coordinates, sums, mma, thread);
    }
  }

 private:
  template <class Out, class Block, class Coordinates, class Engine, class Layout, class Mma>
  CUTLASS_DEVICE void store_tile(const Coordinates& coordinates, const cute::Tensor<Engine, Layout>& sums,
                                 const Mma& mma, int thread) {
    using namespace cute;
    static_assert(is_static<Layout>::value && rank(Layout{}) == 3, "sums: ((token, half, eight), channels, tokens)");
    static_assert(size<0, 0>(Layout{}) == 2 && size<0, 1>(Layout{}) == 2, "the sums of a wgmma");
    using Fragment = typename Mma::AtomLayoutC_TV;  // (lane, value) -> channel + 64 * token
    static_assert(stride<1, 0>(Fragment{}) == 64 && stride<1, 1>(Fragment{}) == 8, "next token; eight channels on");
    const Tensor tile = make_identity_tensor(make_shape(size<0>(Block{}), size<1>(Block{})));
    // The place in the tile of each of this thread's sums. In one 16 x 8 piece a thread has channels r and r + 8 of two
    // neighbouring tokens: with gate and up rows interleaved by eight, an output's two sums.
    const Tensor places = mma.get_thread_slice(thread).partition_C(tile);
    const int32_t first_channel = static_cast<int32_t>(get<0>(coordinates)) * size<0>(Block{});
    const int32_t first_token = static_cast<int32_t>(get<1>(coordinates)) * size<1>(Block{});
    const bool is_gated = params_.gate != GateActivation::kNone;

    CUTLASS_PRAGMA_UNROLL
    for (int m = 0; m < size<1>(Layout{}); ++m) {
      const int32_t channel = first_channel + get<0>(places(make_coord(0, 0, 0), m, 0));
      const int32_t output = channel / 16 * 8 + channel % 8;  // of a gated pair
      // The halves of a gated weight are padded to eights apart, so a real row may lie behind a padded one.
      const bool is_first = is_gated ? output < params_.num_channels / 2 : channel < params_.num_channels;
      const bool is_second = is_gated ? is_first : channel + 8 < params_.num_channels;
      float first_scale = 1, second_scale = 1, first_bias = 0, second_bias = 0;
      if (params_.channel_scale) {  // padded: no bounds
        first_scale = params_.channel_scale[channel];
        second_scale = params_.channel_scale[channel + 8];
      }
      if (params_.bias && is_first) {
        first_bias = is_gated ? params_.bias[output] : params_.bias[channel];
        if (is_second) second_bias = is_gated ? params_.up_bias[output] : params_.bias[channel + 8];
      }
      CUTLASS_PRAGMA_UNROLL
      for (int n = 0; n < size<2>(Layout{}); ++n) {
        CUTLASS_PRAGMA_UNROLL
        for (int eight = 0; eight < size<0, 2>(Layout{}); ++eight) {
          CUTLASS_PRAGMA_UNROLL
          for (int odd = 0; odd < 2; ++odd) {
            const int32_t token = first_token + get<1>(places(make_coord(odd, 0, eight), m, n));
            if (token >= params_.num_tokens || !is_first) continue;
            const float token_scale = params_.token_scale ? params_.token_scale[token] : 1.0f;
            const float first = scaled(sums(make_coord(odd, 0, eight), m, n), first_scale, token_scale) + first_bias;
            const float second = scaled(sums(make_coord(odd, 1, eight), m, n), second_scale, token_scale) + second_bias;
            Out* row = static_cast<Out*>(params_.out) + token * params_.out_stride;
            if (is_gated) {
              store_value(row + output, gated(first) * second);
            } else {
              store_value(row + channel, first);
              if (is_second) store_value(row + channel + 8, second);
            }
          }
        }
      }
    }
  }

  // In this order, each product rounded: integer sums give the bits that the kernels of the sm_80 family give.
  template <class Sum>
  CUTLASS_DEVICE static float scaled(Sum sum, float channel_scale, float token_scale) {
    return __fmul_rn(__fmul_rn(static_cast<float>(sum), channel_scale), token_scale);
  }

  // Hardware exponential and division: errors of some 2^-21 of the result, before it is narrowed to 16 bits.
  CUTLASS_DEVICE float gated(float gate) const {
    if (params_.gate == GateActivation::kSilu) return __fdividef(gate, 1.0f + __expf(-gate));
    const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
    return gate * (1.0f - __fdividef(1.0f, 1.0f + __expf(2.0f * inner)));  // 0.5 (1 + tanh(inner))
  }

  template <class Out>
  CUTLASS_DEVICE void store_value(Out* place, float value) const {
    if constexpr (cute::is_same_v<Out, float>) {
      if (params_.adds_to_out) value += *place;
    }
    *place = static_cast<Out>(value);
  }

  Params params_;
};

using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<StoreTokens>;
using Cluster = cute::Shape<cute::Int<1>, cute::Int<1>, cute::Int<1>>;
using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(Epilogue::SharedStorage))>;
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
// Strides of a row-major matrix with the inputs along the rows: (row, input, batch).
using RowStride = cute::Stride<int64_t, cute::Int<1>, int64_t>;

inline RowStride row_stride(int64_t elements) { return {elements, cute::Int<1>{}, 0}; }

// Of x. With a single token there is no next one, and its caller's stride may be anything; TMA still wants a legal one.
inline RowStride token_stride(const GemmKernelParams& params, int element_bytes) {
  const int64_t elements_of_16_bytes = 16 / element_bytes;
  const int64_t row = (params.weight.in_features + elements_of_16_bytes - 1) / elements_of_16_bytes;
  return row_stride(params.num_tokens == 1 ? row * elements_of_16_bytes : params.x_stride);
}

// Persistent; splits K where it is told to and lets the splits of a tile add up one after another in a fixed order, so
// a result does not depend on timing.
template <class Mainloop>
using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
                                                    cutlass::gemm::StreamKScheduler>;

inline StoreTokensParams store_params(const GemmKernelParams& params) {
  StoreTokensParams store;
  store.out = params.out;
  store.out_type = params.out_type;
  store.out_stride = params.out_stride;
  store.bias = params.bias;
  store.up_bias = params.up_bias;
  store.num_channels = static_cast<int32_t>(params.weight.out_features);
  store.num_tokens = params.num_tokens;
  store.adds_to_out = params.add_to_out;
  store.gate = params.gate;
  return store;
}

[[noreturn]] inline void throw_launch_error(const char* name, const std::string& what) {
  throw std::runtime_error(std::string(name) + ": " + what);
}

// What TMA and the epilogue above need of a run; gives the sentence for a kernel's why_not, which selection asks before
// there is an x.
inline const char* why_not_run(const GemmKernelParams& params, int element_bytes) {
  if (reinterpret_cast<uintptr_t>(params.x) % 16 != 0 ||
      (params.num_tokens > 1 && params.x_stride * element_bytes % 16 != 0))
    return "TMA wants rows of x at multiples of 16 bytes";
  if (params.weight.is_gate_interleaved != (params.gate != GateActivation::kNone))
    return "wants interleaved gate and up rows for a gated run, and only then";
  if (params.add_to_out && params.out_type != DType::kF32) return "adds to fp32 outputs only";
  return nullptr;
}

template <class Gemm>
void launch_gemm(const char* name, const char* (*why_not)(const GemmKernelParams&), const GemmKernelParams& params,
                 const typename Gemm::MainloopArguments& mainloop, const StoreTokensParams& store, void* stream) {
  using Scheduler = typename Gemm::TileSchedulerArguments;
  using Mode = typename Gemm::TileScheduler::DecompositionMode;
  using Raster = typename Gemm::TileScheduler::RasterOrderOptions;
  if (const char* reason = why_not(params)) throw_launch_error(name, reason);
  typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                     {static_cast<int>(params.weight.padded_out_features), params.num_tokens,
                                      static_cast<int>(params.weight.in_features), 1},
                                     mainloop,
                                     store};
  arguments.hw_info.sm_count = params.num_ctas;
  arguments.scheduler = Scheduler(params.num_splits, /*max_swizzle_size=*/1, Raster::Heuristic,
                                  params.num_splits > 1 ? Mode::SplitK : Mode::DataParallel);
  if (!Gemm::can_implement(arguments)) throw_launch_error(name, "the collective does not take these operands");
  // Sums of a tile (one copy: the splits add into it in turn) and, behind them, its two counters. They lie in
  // `partials`, which has room for a copy per split, and are cleared before each run.
  const size_t workspace_bytes = Gemm::get_workspace_size(arguments);
  const int64_t num_tiles =
      params.weight.padded_out_features / kTileChannels *
      ((params.num_tokens + cute::size<1>(typename Gemm::TileShape{}) - 1) / cute::size<1>(typename Gemm::TileShape{}));
  const size_t partials_bytes =
      params.num_splits > 1 ? sizeof(float) * static_cast<size_t>(num_tiles) * static_cast<size_t>(params.num_splits) *
                                  cute::size<0>(typename Gemm::TileShape{}) * cute::size<1>(typename Gemm::TileShape{})
                            : 0;
  if (workspace_bytes > partials_bytes)
    throw_launch_error(
        name, "needs " + std::to_string(workspace_bytes) + " bytes of partials, has " + std::to_string(partials_bytes));
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  if (Gemm::initialize_workspace(arguments, params.partials, cuda_stream) != cutlass::Status::kSuccess)
    throw_launch_error(name, "cannot clear the counters of its splits");
  const typename Gemm::Params kernel_params = Gemm::to_underlying_arguments(arguments, params.partials);
  if (Gemm::SharedStorageSize >= 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(cutlass::device_kernel<Gemm>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(Gemm::SharedStorageSize));
    if (status != cudaSuccess) {
      (void)cudaGetLastError();  // so that the next call does not report it again
      throw_launch_error(name, std::string("cudaFuncSetAttribute: ") + cudaGetErrorString(status));
    }
  }
  cutlass::device_kernel<Gemm>
      <<<Gemm::get_grid_shape(kernel_params), Gemm::get_block_shape(), Gemm::SharedStorageSize, cuda_stream>>>(
          kernel_params);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) throw_launch_error(name, std::string("launch: ") + cudaGetErrorString(status));
}

// What the registry says of a kernel; the rest comes from its template.
template <class Gemm, class Mainloop>
GemmKernel describe_gemm(const char* name, GpuActivations activations, WeightCodes codes, WeightScaling scaling,
                         uint32_t groups, const char* layout, const char* (*why_not)(const GemmKernelParams& params),
                         void (*launch)(const GemmKernelParams& params, void* stream)) {
  GemmKernel kernel{};
  kernel.info = {name, ""};
  kernel.activations = activations;
  kernel.codes = codes;
  kernel.scaling = scaling;
  kernel.groups = groups;
  kernel.layout = layout;
  kernel.why_not = why_not;
  kernel.min_compute_capability = 90;
  kernel.max_compute_capability = 90;
  kernel.tile_tokens = cute::size<1>(typename Gemm::TileShape{});
  kernel.tile_channels = cute::size<0>(typename Gemm::TileShape{});
  kernel.tile_k = cute::size<2>(typename Gemm::TileShape{});
  kernel.warps_tokens = 1;
  kernel.warps_channels = 8;
  kernel.warps_k = 1;
  kernel.num_stages = Mainloop::DispatchPolicy::Stages;
  kernel.shared_bytes = Gemm::SharedStorageSize;
  kernel.ctas_per_sm = 1;
  kernel.can_split = true;
  // Ascending steps of a wgmma's inputs, at every width of the token tile: test_gpu_gemm_sm90.py compares the bits.
  kernel.accumulation =
      cute::is_same_v<typename Gemm::ElementAccumulator, int32_t> ? GemmKernel::kIntegers : GemmKernel::kAscendingWgmma;
  kernel.launch = launch;
  return kernel;
}

}  // namespace partita::sm90
