// The matmul of gemm_tile.cuh with wgmma in the place of mma.sync: for many tokens on compute capability 9.0, where
// mma.sync reaches some two thirds of the tensor cores. It reads the packed layouts of the sm_80 family as they are,
// because a warp's rows of wgmma's operand A are the fragments of mma.sync: one packed weight serves decode through
// mma.sync and prefill through this.
//
// A CTA has two warpgroups of 64 channels (one packed block each) and 128 tokens or a multiple. A K tile is 128 bytes
// of a token's row, four steps of wgmma. While the tensor cores work on tile i from registers (weights) and shared
// memory (activations), the warps decode tile i + 1 into a second set of registers and copies run for the tiles behind:
//
//   issue wgmma of tile i -> wait for the copies of i + 1, barrier -> start the copies of i + kStages - 1
//   -> decode i + 1 -> wait for wgmma of tile i
//
// The barrier of tile i + 1 comes after every warp's wait for tile i - 1, whose stage the new copies overwrite.
#pragma once

#include <type_traits>

#include "device/ptx_wgmma.cuh"
#include "gemm/cuda/gemm_tile.cuh"

namespace partita::gemm {

constexpr int kWgmmaTokens = 128;  // of one instruction

template <typename DecoderType, int kTokensOfTile, int kNumStages>
struct WgmmaConfig : TileConfig<DecoderType, kTokensOfTile, 2 * kPackedChannels,
                                128 / gpu_activation_bytes(DecoderType::kActivations), 1, 8, 1, kNumStages> {
  using Base = TileConfig<DecoderType, kTokensOfTile, 2 * kPackedChannels,
                          128 / gpu_activation_bytes(DecoderType::kActivations), 1, 8, 1, kNumStages>;
  static constexpr int kTokenBlocks = kTokensOfTile / kWgmmaTokens;
  static_assert(kTokensOfTile % kWgmmaTokens == 0 && kNumStages >= 3);
  static_assert(Base::kRowBytes == 128 && Base::kFragments == 1 && !DecoderType::kMultipliesScale);

  struct Stage {
    alignas(1024) std::byte activations[Base::kActivationBytes];  // the swizzle of wgmma goes by the address
    alignas(128) std::byte codes[Base::kCodeBytes];
    alignas(128) std::byte parameters[Base::kParameterBytes];
  };
  union Buffers {
    Stage stages[kNumStages];
    typename Base::Sum sums[kTokensOfTile * Base::kSumStride];
  };
  struct Storage {
    Buffers buffers;
    uint32_t is_last;
  };
};

template <typename Config>
class WgmmaProduct : public TileProduct<Config> {
 public:
  using Base = TileProduct<Config>;
  using Decoder = typename Config::Decoder;
  using Sum = typename Config::Sum;
  using Base::Base;

  // Sums of one work item, left in storage.buffers.sums. Every thread of the CTA takes part.
  __device__ __forceinline__ void multiply(const WorkItem& item) {
    this->item_ = item;
    Sum sums[Config::kTokenBlocks][16][4];
#pragma unroll
    for (int b = 0; b < Config::kTokenBlocks; ++b)
#pragma unroll
      for (int n = 0; n < 16; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[b][n][i] = 0;

    const int num_k_tiles = item.end_k_tile - item.first_k_tile;
    this->open_sources();
#pragma unroll
    for (int s = 0; s < Config::kStages - 1; ++s) {
      if (s < num_k_tiles) this->copy_stage(item.first_k_tile + s, this->storage_.buffers.stages[s]);
      device::cp_async_commit();  // also when empty: the waits count groups
    }
    device::cp_async_wait<Config::kStages - 2>();
    device::fence_async_proxy();
    __syncthreads();

    Weights even, odd;
    decode_tile(0, even);
    for (int tile = 0; tile < num_k_tiles; tile += 2) {
      multiply_tile(item, tile, num_k_tiles, even, odd, sums);
      if (tile + 1 < num_k_tiles) multiply_tile(item, tile + 1, num_k_tiles, odd, even, sums);
    }
    __syncthreads();  // every warpgroup has read the stages, over which the sums now go
    write_sums(sums);
    __syncthreads();
  }

 private:
  struct Weights {
    uint32_t registers[Config::kSteps][4];
  };

  __device__ __forceinline__ void multiply_tile(const WorkItem& item, int tile, int num_k_tiles, const Weights& now,
                                                Weights& next, Sum (&sums)[Config::kTokenBlocks][16][4]) {
    const auto& stage = this->storage_.buffers.stages[tile % Config::kStages];
    device::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step)
#pragma unroll
      for (int b = 0; b < Config::kTokenBlocks; ++b)
        step_product(
            sums[b], now.registers[step],
            device::wgmma_columns(device::wgmma_matrix(stage.activations + b * kWgmmaTokens * 128), step * 32));
    device::wgmma_commit();
    if (tile + 1 < num_k_tiles) {
      device::cp_async_wait<Config::kStages - 3>();
      device::fence_async_proxy();
      __syncthreads();
      const int ahead = tile + Config::kStages - 1;
      if (ahead < num_k_tiles)
        this->copy_stage(item.first_k_tile + ahead, this->storage_.buffers.stages[ahead % Config::kStages]);
      device::cp_async_commit();
      decode_tile(tile + 1, next);
    }
    device::wgmma_wait<0>();
  }

  static __device__ __forceinline__ void step_product(Sum (&sums)[16][4], const uint32_t (&a)[4],
                                                      device::WgmmaMatrix tokens) {
    if constexpr (Decoder::kActivations == GpuActivations::kF16)
      device::wgmma_m64n128k16_f16(sums, a, tokens);
    else if constexpr (Decoder::kActivations == GpuActivations::kBF16)
      device::wgmma_m64n128k16_bf16(sums, a, tokens);
    else if constexpr (std::is_same_v<Decoder, Nibbles>)
      device::wgmma_m64n128k32_u8s8(sums, a, tokens);
    else
      device::wgmma_m64n128k32_s8(sums, a, tokens);
  }

  // This warp's 16 channels of a K tile, from its stage.
  __device__ __forceinline__ void decode_tile(int tile, Weights& weights) {
    const auto& stage = this->storage_.buffers.stages[tile % Config::kStages];
    const int channel_block = this->warp_channels_ / kFragmentsPerBlock;
    const int fragment = this->warp_channels_ % kFragmentsPerBlock;
    constexpr int kVectors = vectors_per_block(Decoder::kCodeBits);
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      const int block_k = step / Config::kStepsPerBlock, step_in_block = step % Config::kStepsPerBlock;
      if constexpr (Config::kHasGroups) {
        const int k = step * Config::kStepK;
        if (step == 0 || (k & ((1 << this->group_shift_) - 1)) == 0) {
          const std::byte* entries = stage.parameters +
                                     (channel_block * this->groups_per_tile() + (k >> this->group_shift_)) *
                                         (kPackedChannels * this->entry_bytes_) +
                                     this->lane_ / 4 * (8 * this->entry_bytes_);
          Decoder::template read_parameters<1>(entries, fragment, this->uniform_, this->parameters_);
        }
      }
      const int vector = step_in_block / Config::kStepsPerVector;
      if (step_in_block % Config::kStepsPerVector == 0)
        load_words(stage.codes + (channel_block * Config::kBlocksK + block_k) * Config::kBlockBytes +
                       ((fragment * kVectors + vector) * 32 + this->lane_) * kChunkBytes,
                   this->vectors_[0]);
      Decoder::decode(this->vectors_[0], step_in_block % Config::kStepsPerVector, this->parameters_[0], this->uniform_,
                      weights.registers[step]);
    }
  }

  __device__ __forceinline__ void write_sums(const Sum (&sums)[Config::kTokenBlocks][16][4]) {
    Sum* target = this->storage_.buffers.sums;
#pragma unroll
    for (int b = 0; b < Config::kTokenBlocks; ++b)
#pragma unroll
      for (int n = 0; n < 16; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = this->warp_channels_ * kFragmentChannels + this->lane_ / 4 + i / 2 * 8;
          const int token = b * kWgmmaTokens + n * 8 + this->lane_ % 4 * 2 + i % 2;
          target[token * Config::kSumStride + row] = sums[b][n][i];
        }
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads) gemm_wgmma_kernel(const __grid_constant__ GemmKernelParams params) {
  auto& storage = device::dynamic_shared<typename Config::Storage>();
  const int num_token_tiles = (params.num_tokens + Config::kTokens - 1) / Config::kTokens;
  const int num_channel_tiles =
      static_cast<int>((params.weight.padded_out_features + Config::kChannels - 1) / Config::kChannels);
  const int num_work = num_channel_tiles * num_token_tiles * params.num_splits;
  WgmmaProduct<Config> product(params, storage);
  for (int work_idx = static_cast<int>(blockIdx.x); work_idx < num_work; work_idx += static_cast<int>(gridDim.x)) {
    product.multiply(work_item<Config>(params, work_idx, num_token_tiles));
    product.finish();
  }
}

template <typename Config>
void launch_gemm_wgmma(const char* name, const GemmKernelParams& params, void* stream) {
  device::launch(name, &gemm_wgmma_kernel<Config>, {static_cast<unsigned>(params.num_ctas)}, {Config::kThreads},
                 sizeof(typename Config::Storage), stream, params);
}

template <typename Config>
constexpr GemmKernel wgmma_entry(const char* name, const char* layout, uint32_t groups,
                                 void (*launch)(const GemmKernelParams&, void*)) {
  GemmKernel entry = tile_entry<Config>(name, "", layout, groups, launch);
  entry.min_compute_capability = 90;
  entry.max_compute_capability = 90;
  entry.ctas_per_sm = 1;  // 128 or 256 accumulators, 32 operand registers: more than half of an SM's
  if (entry.accumulation != GemmKernel::kIntegers) entry.accumulation = GemmKernel::kAscendingWgmma;
  return entry;
}

}  // namespace partita::gemm
