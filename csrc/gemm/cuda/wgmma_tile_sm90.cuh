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
    prepare_copies(item);
#pragma unroll
    for (int s = 0; s < Config::kStages - 1; ++s) {
      if (s < num_k_tiles) copy_tile(item.first_k_tile + s, s);
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

  // What TileProduct::copy_stage copies, with all that does not change from K tile to K tile worked out once for a work
  // item: there the addresses of a stage take some 570 instructions, which is more than the tensor cores' time for it.
  static constexpr int kRowsAtOnce = Config::kThreads / Config::kRowChunks;
  static constexpr int kBlockChunks = Config::kBlocksK * Config::kBlockBytes / kChunkBytes;  // of a channel block
  static constexpr int kCodeCopies = Config::kBlocksChannels * kBlockChunks / Config::kThreads;
  static constexpr int kBlocksAtOnce = Config::kThreads / kBlockChunks;  // channel blocks; 0: part of one
  static_assert(kRowsAtOnce % 8 == 0 && Config::kBlocksChannels * kBlockChunks % Config::kThreads == 0);

  __device__ __forceinline__ void prepare_copies(const WorkItem& item) {
    const GemmKernelParams& params = this->params_;
    const int thread = this->thread_;
    // Activations: this thread's chunk of rows first_row + i * kRowsAtOnce, all of which have the same swizzle.
    const int chunk = thread % Config::kRowChunks, first_row = thread / Config::kRowChunks;
    const int first_token = item.token_tile * Config::kTokens + first_row;
    const int64_t row_bytes = params.x_stride * Config::kElementBytes;
    row_source_ = static_cast<const std::byte*>(params.x) + first_token * row_bytes + chunk * kChunkBytes;
    row_step_ = kRowsAtOnce * row_bytes;
    row_target_ = first_row * 128 + (chunk ^ (first_row % 8)) * kChunkBytes;
    const int rows_left = params.num_tokens - first_token;
    num_rows_ = rows_left <= 0 ? 0 : (rows_left + kRowsAtOnce - 1) / kRowsAtOnce;
    input_bytes_ = static_cast<int>(params.weight.in_features * Config::kElementBytes) - chunk * kChunkBytes;

    // Codes: chunk thread + i * kThreads of the tile's channel blocks.
    const int64_t num_k_blocks = params.weight.padded_in_features / kPackedInputs;
    const int num_channel_blocks = static_cast<int>(params.weight.padded_out_features / kPackedChannels);
    const int first_block = item.channel_tile * Config::kBlocksChannels;
    block_bytes_ = num_k_blocks * Config::kBlockBytes;
    const int block = first_block + (kBlocksAtOnce > 0 ? thread / kBlockChunks : 0);
    code_source_ = params.weight.codes + block * block_bytes_ + thread % kBlockChunks * kChunkBytes;
    code_block_ = block;
    num_blocks_ = num_channel_blocks;
    num_code_chunks_ = static_cast<int>(block_bytes_ / kChunkBytes) - thread % kBlockChunks;

    // Parameters: one chunk for each of the first threads. Everything about them is a power of two.
    if constexpr (Config::kHasGroups) {
      const int group_chunks = kPackedChannels * this->entry_bytes_ / kChunkBytes;
      const int tile_chunks = this->groups_per_tile() * group_chunks;
      const int own_block = thread / tile_chunks, own_chunk = thread % tile_chunks;
      const bool exists = own_block < Config::kBlocksChannels && first_block + own_block < num_channel_blocks;
      parameter_source_ =
          params.weight.group_params +
          (static_cast<int64_t>(first_block + own_block) * params.weight.num_groups * group_chunks + own_chunk) *
              kChunkBytes;
      copies_parameters_ = own_block < Config::kBlocksChannels;
      num_groups_ = exists ? params.weight.num_groups - own_chunk / group_chunks : 0;
    }
  }

  __device__ __forceinline__ void copy_tile(int k_tile, int stage_idx) {
    auto& stage = this->storage_.buffers.stages[stage_idx];
    const int k_bytes = k_tile * 128;
    const int left = input_bytes_ - k_bytes;
    const int bytes = left <= 0 ? 0 : left < kChunkBytes ? left : kChunkBytes;
    const std::byte* source = row_source_ + k_bytes;
#pragma unroll
    for (int i = 0; i < Config::kTokens / kRowsAtOnce; ++i)
      device::cp_async_16_zfill(stage.activations + row_target_ + i * (kRowsAtOnce * 128), source + i * row_step_,
                                i < num_rows_ ? bytes : 0);

    const int first_chunk = k_tile * kBlockChunks;
    const std::byte* codes = code_source_ + static_cast<int64_t>(first_chunk) * kChunkBytes;
#pragma unroll
    for (int i = 0; i < kCodeCopies; ++i) {
      // Whole channel blocks at once, or several copies for each.
      const int block = kBlocksAtOnce > 0 ? i * kBlocksAtOnce : i * Config::kThreads / kBlockChunks;
      const int chunk = kBlocksAtOnce > 0 ? 0 : i * Config::kThreads % kBlockChunks;
      const bool exists = code_block_ + block < num_blocks_ && first_chunk + chunk < num_code_chunks_;
      device::cp_async_16_zfill(stage.codes + (this->thread_ + i * Config::kThreads) * kChunkBytes,
                                codes + block * block_bytes_ + chunk * kChunkBytes, exists ? kChunkBytes : 0);
    }

    if constexpr (Config::kHasGroups) {
      if (copies_parameters_) {
        const int group = k_tile * Config::kTileK >> this->group_shift_;
        device::cp_async_16_zfill(
            stage.parameters + this->thread_ * kChunkBytes,
            parameter_source_ + static_cast<int64_t>(group) * kPackedChannels * this->entry_bytes_,
            group < num_groups_ ? kChunkBytes : 0);
      }
    }
  }

  const std::byte* row_source_;
  int64_t row_step_;
  int row_target_, num_rows_, input_bytes_;
  const std::byte* code_source_;
  int64_t block_bytes_;
  int code_block_, num_blocks_, num_code_chunks_;
  const std::byte* parameter_source_;
  int num_groups_;
  bool copies_parameters_;

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
      if (ahead < num_k_tiles) copy_tile(item.first_k_tile + ahead, ahead % Config::kStages);
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
