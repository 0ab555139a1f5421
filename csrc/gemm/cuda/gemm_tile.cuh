// The matmul of the sm_80 family: mma.sync, cp.async, packed weights. One template for every packed layout; a decoder
// (weight_decode.cuh) says what the weight's bits are.
//
// A CTA computes a tile of kChannels x kTokens over a run of K tiles (one split) and loops over such work items.
// Weights are operand A, so that the MMA's eight columns are tokens: a decode batch of eight wastes nothing.
//
//   global -> shared   cp.async, kStages deep: activations with a XOR swizzle of 16-byte chunks, weights and their
//                      parameters as they lie
//   shared -> register one K step ahead: ldmatrix for activations; weights one vector per lane and K block, decoded
//   MMA                on the step before
// so at any moment the tensor cores work on step i, decoding on i + 1 and copies on the stages behind. There is one
// barrier for each K tile, at its last step: by then every warp has read the tile's last fragments into registers, so
// the barrier both publishes the next stage and frees this one.
//
// Sums leave through shared memory, where the warps that divided a K tile among themselves are added in order; then,
// with split-K, through a workspace, where the CTA that arrives last adds all splits in order. No float is added
// atomically: the same launch gives the same bits.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/launch.cuh"
#include "device/ptx_cp_async.cuh"
#include "device/ptx_ldmatrix.cuh"
#include "device/ptx_memory.cuh"
#include "gemm/cuda/gemm_epilogue.cuh"
#include "gemm/cuda/weight_decode.cuh"
#include "gemm/fragment_layout.h"
#include "gemm/gemm_kernels_gpu.h"

namespace partita::gemm {

constexpr int kChunkBytes = 16;
constexpr int kRasterChannelTiles = 8;

template <typename DecoderType, int kTokensOfTile, int kChannelsOfTile, int kTileDepth, int kNumWarpsTokens,
          int kNumWarpsChannels, int kNumWarpsK, int kNumStages>
struct TileConfig {
  using Decoder = DecoderType;
  using Sum = typename Decoder::Sum;
  static constexpr int kTokens = kTokensOfTile, kChannels = kChannelsOfTile, kTileK = kTileDepth;
  static constexpr int kWarpsTokens = kNumWarpsTokens, kWarpsChannels = kNumWarpsChannels, kWarpsK = kNumWarpsK;
  static constexpr int kStages = kNumStages;
  static constexpr int kThreads = 32 * kWarpsTokens * kWarpsChannels * kWarpsK;

  static constexpr int kElementBytes = gpu_activation_bytes(Decoder::kActivations);
  static constexpr int kStepK = fragment_k(kElementBytes);
  static constexpr int kStepsPerVector = steps_per_vector(Decoder::kCodeBits, kElementBytes);
  static constexpr int kStepsPerBlock = kPackedInputs / kStepK;
  static constexpr int kBlocksK = kTileK / kPackedInputs, kBlocksChannels = kChannels / kPackedChannels;
  // Of a warp:
  static constexpr int kFragments = kChannels / kFragmentChannels / kWarpsChannels;
  static constexpr int kTokenTiles = kTokens / 8 / kWarpsTokens;
  static constexpr int kSteps = kBlocksK / kWarpsK * kStepsPerBlock;

  static constexpr bool kHasGroups = Decoder::kScaling == WeightScaling::kGroup ||
                                     Decoder::kScaling == WeightScaling::kGroupSum ||
                                     Decoder::kScaling == WeightScaling::kTwoLevel;
  static constexpr int kSmallestGroup = Decoder::kCodeBits == 8 && kElementBytes == 2 ? 16 : 32;

  static constexpr int kRowBytes = kTileK * kElementBytes;
  static constexpr int kRowChunks = kRowBytes / kChunkBytes;
  static constexpr int kBlockBytes = kPackedChannels * kPackedInputs * Decoder::kCodeBits / 8;
  static constexpr int kActivationBytes = kTokens * kRowBytes;
  static constexpr int kCodeBytes = kBlocksChannels * kBlocksK * kBlockBytes;
  static constexpr int kParameterBytes = kHasGroups ? kTileK / kSmallestGroup * kChannels * 4 : 16;
  static constexpr int kSumStride = kChannels + 4;  // a lane's four rows of tokens fall on different banks

  static_assert(kBlocksK % kWarpsK == 0 && kSteps % 2 == 0, "fragments alternate between two registers");
  static_assert(kChannels % kPackedChannels == 0 && kFragmentsPerBlock % kFragments == 0);
  static_assert(kRowBytes % 128 == 0, "the swizzle permutes eight chunks");
  static_assert(kThreads % kRowChunks == 0, "a thread keeps its column of chunks");
  static_assert(kChannels >= 64 && kChannels <= 128, "store_tile sums a row's codes inside a warp");

  struct Stage {
    alignas(128) std::byte activations[kActivationBytes];
    alignas(128) std::byte codes[kCodeBytes];
    alignas(128) std::byte parameters[kParameterBytes];
  };
  union Buffers {
    Stage stages[kStages];
    Sum sums[kWarpsK * kTokens * kSumStride];
  };
  struct Storage {
    Buffers buffers;
    uint32_t is_last;
  };

  // CTAs that an SM holds: by shared memory on the smallest chip (164 KB, 1 KB of it the system's for each), and at
  // most 256 threads, so that each may have all 255 registers. Left to itself the compiler spills to reach an occupancy
  // that shared memory does not allow anyway.
  static constexpr int kCtasPerSm = [] {
    const int by_shared = static_cast<int>((163 * 1024) / (sizeof(Storage) + 1024));
    const int by_registers = 256 / kThreads;
    const int count = by_shared < by_registers ? by_shared : by_registers;
    return count < 1 ? 1 : count;
  }();
};

// One work item: which tile, which part of K.
struct WorkItem {
  int channel_tile, token_tile, tile;
  int split, first_k_tile, end_k_tile;
};

// Tiles in columns of kRasterChannelTiles channel tiles, token tiles in them, so that the CTAs that run at the same
// time share weights and activations in L2; the splits of a tile are neighbours.
template <typename Config>
__device__ __forceinline__ WorkItem work_item(const GemmKernelParams& params, int work_idx, int num_token_tiles) {
  const int num_channel_tiles =
      static_cast<int>((params.weight.padded_out_features + Config::kChannels - 1) / Config::kChannels);
  const int num_k_tiles = static_cast<int>((params.weight.padded_in_features + Config::kTileK - 1) / Config::kTileK);
  WorkItem item;
  item.tile = work_idx / params.num_splits;
  item.split = work_idx % params.num_splits;
  const int column_tiles = kRasterChannelTiles * num_token_tiles;
  const int column = item.tile / column_tiles, rest = item.tile % column_tiles;
  const int left = num_channel_tiles - column * kRasterChannelTiles;
  const int width = left < kRasterChannelTiles ? left : kRasterChannelTiles;
  item.channel_tile = column * kRasterChannelTiles + rest % width;
  item.token_tile = rest / width;
  const int per_split = (num_k_tiles + params.num_splits - 1) / params.num_splits;
  item.first_k_tile = item.split * per_split;
  item.end_k_tile = item.first_k_tile + per_split < num_k_tiles ? item.first_k_tile + per_split : num_k_tiles;
  return item;
}

template <typename Config>
class TileProduct {
 public:
  using Decoder = typename Config::Decoder;
  using Sum = typename Config::Sum;
  using Stage = typename Config::Stage;
  using Parameters = typename Decoder::Parameters;

  __device__ __forceinline__ TileProduct(const GemmKernelParams& params, typename Config::Storage& storage)
      : params_(params),
        storage_(storage),
        uniform_(Decoder::make_uniform(params.weight)),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % 32) {
    const int warp = thread_ / 32;
    warp_channels_ = warp % Config::kWarpsChannels;
    warp_tokens_ = warp / Config::kWarpsChannels % Config::kWarpsTokens;
    warp_k_ = warp / (Config::kWarpsChannels * Config::kWarpsTokens);
    group_shift_ = 31;
    if (params.weight.group > 0) group_shift_ = __ffs(params.weight.group) - 1;
    entry_bytes_ = 4;
    if constexpr (Decoder::kScaling == WeightScaling::kGroup) entry_bytes_ = uniform_.has_pairs ? 4 : 2;
  }

  // Sums of one work item, left in storage.buffers.sums. Every thread of the CTA takes part.
  __device__ __forceinline__ void multiply(const WorkItem& item) {
    item_ = item;
    open_sources();
    Sum sums[Config::kFragments][Config::kTokenTiles][4];
#pragma unroll
    for (int f = 0; f < Config::kFragments; ++f)
#pragma unroll
      for (int n = 0; n < Config::kTokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[f][n][i] = 0;

    const int num_k_tiles = item.end_k_tile - item.first_k_tile;
    Stage* const stages = storage_.buffers.stages;
#pragma unroll
    for (int s = 0; s < Config::kStages - 1; ++s) {
      if (s < num_k_tiles) copy_stage(item.first_k_tile + s, stages[s]);
      device::cp_async_commit();  // also when empty: the waits count groups
    }
    device::cp_async_wait<Config::kStages - 2>();
    __syncthreads();

    Fragments fragments[2];
    load_fragments(stages[0], 0, fragments[0]);
    int stage = 0;
#pragma unroll 1
    for (int tile = 0; tile < num_k_tiles; ++tile) {
      const int next_stage = stage + 1 == Config::kStages ? 0 : stage + 1;
#pragma unroll
      for (int step = 0; step < Config::kSteps; ++step) {
        if (step + 1 < Config::kSteps) {
          load_fragments(stages[stage], step + 1, fragments[(step + 1) % 2]);
        } else {
          device::cp_async_wait<Config::kStages - 2>();
          __syncthreads();
          if (tile + 1 < num_k_tiles) load_fragments(stages[next_stage], 0, fragments[0]);
        }
        if (step == 0) {
          // Into the stage of the tile before, which the barrier at that tile's end has freed.
          const int ahead = tile + Config::kStages - 1;
          if (ahead < num_k_tiles)
            copy_stage(item.first_k_tile + ahead, stages[stage == 0 ? Config::kStages - 1 : stage - 1]);
          device::cp_async_commit();
        }
        const Fragments& now = fragments[step % 2];
#pragma unroll
        for (int f = 0; f < Config::kFragments; ++f)
#pragma unroll
          for (int n = 0; n < Config::kTokenTiles; ++n)
            Decoder::multiply(sums[f][n], now.weights[f], now.activations[n], parameters(now, f));
      }
      stage = next_stage;
    }
    // The last tile's barrier has let every warp finish reading the stages, over which the sums now go.
    write_sums(sums);
    __syncthreads();
  }

  // Adds the warps' shares of K and stores outputs, or this split's partial; then frees shared memory.
  __device__ __forceinline__ void finish() {
    const int64_t first_row = static_cast<int64_t>(item_.channel_tile) * Config::kChannels;
    if (params_.num_splits == 1) {
      store_tile(first_row, [this](int token, int row) { return sum_of_warps(token, row); });
      __syncthreads();  // the next work item's copies go over the sums
    } else {
      float* partial = partial_of(item_.split);
      for (int v = thread_; v < Config::kTokens * Config::kChannels / kVector; v += Config::kThreads) {
        const int token = v / (Config::kChannels / kVector), row = v % (Config::kChannels / kVector) * kVector;
        const SumVector<Sum> sum = sum_of_warps(token, row);
        *reinterpret_cast<SumVector<Sum>*>(partial + token * Config::kChannels + row) = sum;
      }
      __threadfence();
      __syncthreads();  // counted only when all of it is there for other CTAs (simt runs one at a time)
      if (thread_ == 0) {
        const uint32_t arrived = atomicAdd(params_.counters + item_.tile, 1u);
        storage_.is_last = arrived + 1 == static_cast<uint32_t>(params_.num_splits);
      }
      __syncthreads();
      if (storage_.is_last) {
        __threadfence();
        store_tile(first_row, [this](int token, int row) { return sum_of_splits(token, row); });
        if (thread_ == 0) params_.counters[item_.tile] = 0;
      }
    }
  }

 protected:  // the rest is wgmma_tile_sm90.cuh's too
  struct Fragments {
    uint32_t weights[Config::kFragments][4];
    uint32_t activations[Config::kTokenTiles][2];
    Parameters own_parameters[Decoder::kMultipliesScale ? Config::kFragments : 1][2];
  };
  static __device__ __forceinline__ const Parameters (&parameters(const Fragments& fragments, int f))[2] {
    return fragments.own_parameters[Decoder::kMultipliesScale ? f : 0];
  }

  // ---- global -> shared

  // Where this thread's copies of the item's first K tile begin; they move on by a tile with each copy_stage().
  __device__ __forceinline__ void open_sources() {
    const int first_token = item_.token_tile * Config::kTokens + thread_ / Config::kRowChunks;
    activations_left_ = static_cast<int>(params_.weight.in_features * Config::kElementBytes) -
                        item_.first_k_tile * Config::kRowBytes - thread_ % Config::kRowChunks * kChunkBytes;
    tokens_left_ = params_.num_tokens - first_token;
    activation_source_ = static_cast<const std::byte*>(params_.x) +
                         first_token * params_.x_stride * Config::kElementBytes +
                         item_.first_k_tile * Config::kRowBytes + thread_ % Config::kRowChunks * kChunkBytes;
    num_k_blocks_ = static_cast<int>(params_.weight.padded_in_features / kPackedInputs);
    num_channel_blocks_ = static_cast<int>(params_.weight.padded_out_features / kPackedChannels);
    const int64_t first_block = static_cast<int64_t>(item_.channel_tile) * Config::kBlocksChannels;
    code_source_ = params_.weight.codes +
                   (first_block * num_k_blocks_ + item_.first_k_tile * Config::kBlocksK) * Config::kBlockBytes +
                   thread_ * kChunkBytes;
    if constexpr (Config::kHasGroups)
      parameter_source_ =
          params_.weight.group_params + first_block * params_.weight.num_groups * (kPackedChannels * entry_bytes_);
  }

  __device__ __forceinline__ void copy_stage(int k_tile, Stage& stage) {
    copy_activations(stage);
    // Residual tiles go a way of their own, so that the usual one has no test and a register for its address only.
    const bool is_whole = (k_tile + 1) * Config::kBlocksK <= num_k_blocks_ &&
                          (item_.channel_tile + 1) * Config::kBlocksChannels <= num_channel_blocks_;
    if (is_whole)
      copy_codes(stage);
    else
      copy_residual_codes(k_tile, stage);
    code_source_ += Config::kBlocksK * Config::kBlockBytes;
    if constexpr (Config::kHasGroups) copy_parameters(k_tile, stage);
  }

  // [kTokens][kRowChunks] chunks; chunk c of row r lies at c ^ (r % 8). Rows past T and inputs past K are zeros.
  __device__ __forceinline__ void copy_activations(Stage& stage) {
    constexpr int kRowsAtOnce = Config::kThreads / Config::kRowChunks;
    static_assert(kRowsAtOnce % 8 == 0 || 8 % kRowsAtOnce == 0);
    const int chunk = thread_ % Config::kRowChunks, row = thread_ / Config::kRowChunks;
    const int row_bytes = activations_left_ <= 0            ? 0
                          : activations_left_ < kChunkBytes ? activations_left_
                                                            : kChunkBytes;
    const std::byte* source = activation_source_;
#pragma unroll
    for (int i = 0; i < (Config::kTokens + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
      if (Config::kTokens % kRowsAtOnce != 0 && row + i * kRowsAtOnce >= Config::kTokens) break;
      // (row + i * kRowsAtOnce) % 8 is the exclusive or of both parts: they share no bit below 8.
      std::byte* target = stage.activations + row * Config::kRowBytes +
                          (chunk ^ (row % 8) ^ (i * kRowsAtOnce % 8)) * kChunkBytes +
                          i * kRowsAtOnce * Config::kRowBytes;
      device::cp_async_16_zfill(target, source, i * kRowsAtOnce < tokens_left_ ? row_bytes : 0);
      source += kRowsAtOnce * Config::kElementBytes * params_.x_stride;
    }
    activation_source_ += Config::kRowBytes;
    activations_left_ -= Config::kRowBytes;
  }

  // The K blocks of a tile are neighbours in memory.
  __device__ __forceinline__ void copy_codes(Stage& stage) {
    constexpr int kBlockChunks = Config::kBlocksK * Config::kBlockBytes / kChunkBytes;  // of one channel block
    const int64_t block_stride = static_cast<int64_t>(num_k_blocks_) * Config::kBlockBytes;
    std::byte* target = stage.codes + thread_ * kChunkBytes;
    const std::byte* source = code_source_;
    if constexpr (kBlockChunks % Config::kThreads == 0) {
#pragma unroll
      for (int block = 0; block < Config::kBlocksChannels; ++block) {
#pragma unroll
        for (int i = 0; i < kBlockChunks / Config::kThreads; ++i)
          copy_code_chunk(target + (block * kBlockChunks + i * Config::kThreads) * kChunkBytes,
                          source + i * Config::kThreads * kChunkBytes);
        source += block_stride;
      }
    } else {
      constexpr int kBlocksAtOnce = Config::kThreads / kBlockChunks;
      static_assert(Config::kThreads % kBlockChunks == 0 && Config::kBlocksChannels % kBlocksAtOnce == 0);
      source += thread_ / kBlockChunks * (block_stride - kBlockChunks * kChunkBytes);
#pragma unroll
      for (int i = 0; i < Config::kBlocksChannels / kBlocksAtOnce; ++i)
        copy_code_chunk(target + i * Config::kThreads * kChunkBytes, source + i * kBlocksAtOnce * block_stride);
    }
  }

  static __device__ __forceinline__ void copy_code_chunk(std::byte* target, const std::byte* source) {
    // With few tokens each weight is read once; with many, other CTAs want it from L2.
    if constexpr (Config::kTokens <= 32)
      device::cp_async_16_evict_first(target, source);
    else
      device::cp_async_16(target, source);
  }

  // Blocks of K or of channels that do not exist are zeros.
  __device__ __forceinline__ void copy_residual_codes(int k_tile, Stage& stage) {
    constexpr int kBlockChunks = Config::kBlocksK * Config::kBlockBytes / kChunkBytes;
    const int chunks_left = (num_k_blocks_ - k_tile * Config::kBlocksK) * (Config::kBlockBytes / kChunkBytes);
    const int blocks_left = num_channel_blocks_ - item_.channel_tile * Config::kBlocksChannels;
    const int64_t block_stride = static_cast<int64_t>(num_k_blocks_) * Config::kBlockBytes;
#pragma unroll 1
    for (int index = thread_; index < Config::kBlocksChannels * kBlockChunks; index += Config::kThreads) {
      const int block = index / kBlockChunks, chunk = index % kBlockChunks;
      device::cp_async_16_zfill(stage.codes + index * kChunkBytes,
                                code_source_ + block * block_stride + (chunk - thread_) * kChunkBytes,
                                chunk < chunks_left && block < blocks_left ? kChunkBytes : 0);
    }
  }

  // [channel blocks][groups of the tile][64] entries.
  __device__ __forceinline__ void copy_parameters(int k_tile, Stage& stage) {
    const int group_bytes = kPackedChannels * entry_bytes_;
    const int first_group = k_tile * Config::kTileK >> group_shift_;
    const int block_bytes = groups_per_tile() * group_bytes;
    const int bytes_left = (params_.weight.num_groups - first_group) * group_bytes;
    const std::byte* source = parameter_source_ + static_cast<int64_t>(first_group) * group_bytes;
#pragma unroll
    for (int block = 0; block < Config::kBlocksChannels; ++block) {
      const bool exists = item_.channel_tile * Config::kBlocksChannels + block < num_channel_blocks_;
#pragma unroll 1
      for (int offset = thread_ * kChunkBytes; offset < block_bytes; offset += Config::kThreads * kChunkBytes)
        device::cp_async_16_zfill(stage.parameters + block * block_bytes + offset, source + offset,
                                  exists && offset < bytes_left ? kChunkBytes : 0);
      source += static_cast<int64_t>(params_.weight.num_groups) * group_bytes;
    }
  }

  __device__ __forceinline__ int groups_per_tile() const {
    const int groups = Config::kTileK >> group_shift_;
    return groups < 1 ? 1 : groups;
  }

  // ---- shared -> registers

  // Step `step` (a constant after unrolling) of this warp's share of a K tile.
  __device__ __forceinline__ void load_fragments(const Stage& stage, int step, Fragments& fragments) {
    const int block_k = warp_k_ * (Config::kBlocksK / Config::kWarpsK) + step / Config::kStepsPerBlock;
    const int step_in_block = step % Config::kStepsPerBlock;
    const int first_fragment = warp_channels_ * Config::kFragments;
    const int channel_block = first_fragment / kFragmentsPerBlock, in_block = first_fragment % kFragmentsPerBlock;

    const int k = block_k * kPackedInputs + step_in_block * Config::kStepK;  // in the tile
    if constexpr (Config::kHasGroups) {
      // A group is a power of two: one begins at its multiples, and whatever the stage holds at its first step. Steps
      // at which the smallest group cannot begin have no test.
      const bool may_begin = step_in_block * Config::kStepK % Config::kSmallestGroup == 0;
      if (step == 0 || (may_begin && (k & ((1 << group_shift_) - 1)) == 0)) {
        const int group = k >> group_shift_;
        const std::byte* entries = stage.parameters +
                                   (channel_block * groups_per_tile() + group) * (kPackedChannels * entry_bytes_) +
                                   lane_ / 4 * (8 * entry_bytes_);
        if constexpr (Decoder::kMultipliesScale)
          Decoder::template read_parameters<Config::kFragments>(entries, in_block, uniform_, fragments.own_parameters);
        else
          Decoder::template read_parameters<Config::kFragments>(entries, in_block, uniform_, parameters_);
      }
    }
    constexpr int kVectors = vectors_per_block(Decoder::kCodeBits);
    const int vector = step_in_block / Config::kStepsPerVector,
              step_in_vector = step_in_block % Config::kStepsPerVector;
#pragma unroll
    for (int f = 0; f < Config::kFragments; ++f) {
      if (step_in_vector == 0) {
        const std::byte* source = stage.codes + (channel_block * Config::kBlocksK + block_k) * Config::kBlockBytes +
                                  (((in_block + f) * kVectors + vector) * 32 + lane_) * kChunkBytes;
        load_words(source, vectors_[f]);
      }
      Decoder::decode(vectors_[f], step_in_vector, parameters_[Config::kHasGroups ? f : 0], uniform_,
                      fragments.weights[f]);
    }
    load_activations(stage, (k * Config::kElementBytes) / kChunkBytes, fragments);
  }

  // The two 16-byte chunks of a K step, for each eight tokens.
  __device__ __forceinline__ void load_activations(const Stage& stage, int first_chunk, Fragments& fragments) {
    const int first_row = warp_tokens_ * Config::kTokenTiles * 8;
    if constexpr (Config::kTokenTiles == 1) {
      const int row = first_row + lane_ % 8, chunk = first_chunk + lane_ / 8 % 2;
      device::ldmatrix_x2(fragments.activations[0],
                          stage.activations + row * Config::kRowBytes + (chunk ^ (row % 8)) * kChunkBytes);
    } else {
      static_assert(Config::kTokenTiles % 2 == 0 || Config::kTokenTiles == 1);
#pragma unroll
      for (int n = 0; n < Config::kTokenTiles; n += 2) {
        const int row = first_row + n * 8 + lane_ / 16 * 8 + lane_ % 8, chunk = first_chunk + lane_ / 8 % 2;
        uint32_t r[4];
        device::ldmatrix_x4(r, stage.activations + row * Config::kRowBytes + (chunk ^ (row % 8)) * kChunkBytes);
        fragments.activations[n][0] = r[0], fragments.activations[n][1] = r[1];
        fragments.activations[n + 1][0] = r[2], fragments.activations[n + 1][1] = r[3];
      }
    }
  }

  // ---- sums

  __device__ __forceinline__ void write_sums(const Sum (&sums)[Config::kFragments][Config::kTokenTiles][4]) {
    Sum* target = storage_.buffers.sums + warp_k_ * (Config::kTokens * Config::kSumStride);
#pragma unroll
    for (int f = 0; f < Config::kFragments; ++f)
#pragma unroll
      for (int n = 0; n < Config::kTokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = (warp_channels_ * Config::kFragments + f) * kFragmentChannels + lane_ / 4 + i / 2 * 8;
          const int token = (warp_tokens_ * Config::kTokenTiles + n) * 8 + lane_ % 4 * 2 + i % 2;
          target[token * Config::kSumStride + row] = sums[f][n][i];
        }
  }

  __device__ __forceinline__ SumVector<Sum> sum_of_warps(int token, int row) const {
    const Sum* source = storage_.buffers.sums + token * Config::kSumStride + row;
    SumVector<Sum> total = *reinterpret_cast<const SumVector<Sum>*>(source);
#pragma unroll
    for (int w = 1; w < Config::kWarpsK; ++w) {
      const auto part = *reinterpret_cast<const SumVector<Sum>*>(source + w * (Config::kTokens * Config::kSumStride));
#pragma unroll
      for (int i = 0; i < kVector; ++i) total.values[i] += part.values[i];
    }
    return total;
  }

  __device__ __forceinline__ float* partial_of(int split) const {
    return params_.partials +
           (static_cast<int64_t>(item_.tile) * params_.num_splits + split) * (Config::kTokens * Config::kChannels);
  }

  __device__ __forceinline__ SumVector<Sum> sum_of_splits(int token, int row) const {
    const int offset = token * Config::kChannels + row;
    SumVector<Sum> total = *reinterpret_cast<const SumVector<Sum>*>(partial_of(0) + offset);
    for (int s = 1; s < params_.num_splits; ++s) {
      const auto part = *reinterpret_cast<const SumVector<Sum>*>(partial_of(s) + offset);
#pragma unroll
      for (int i = 0; i < kVector; ++i) total.values[i] += part.values[i];
    }
    return total;
  }

  template <typename SumOf>
  __device__ __forceinline__ void store_tile(int64_t first_row, const SumOf& sum_of) {
    const int vectors = params_.gate == GateActivation::kNone ? Config::kChannels / kVector : Config::kChannels / 8;
    for (int v = thread_; v < Config::kTokens * vectors; v += Config::kThreads) {
      const int row = v / vectors;
      const int64_t token = static_cast<int64_t>(item_.token_tile) * Config::kTokens + row;
      if (token >= params_.num_tokens) break;
      int32_t code_sum = finish_outputs<Decoder::kScaling>(params_, first_row, v % vectors, token,
                                                           [&](int channel) { return sum_of(row, channel); });
      if (!params_.out_sum) continue;
      // A row's vectors are neighbouring lanes of one warp, 8, 16 or 32 of them: all come here or none.
      const unsigned mask = vectors == 32 ? device::kFullWarp : ((1u << vectors) - 1u) << (lane_ & ~(vectors - 1));
      for (int distance = 1; distance < vectors; distance *= 2) code_sum += __shfl_xor_sync(mask, code_sum, distance);
      if (v % vectors == 0) atomicAdd(params_.out_sum + token, code_sum);
    }
  }

  const GemmKernelParams& params_;
  typename Config::Storage& storage_;
  typename Decoder::Uniform uniform_;
  int thread_, lane_, warp_channels_, warp_tokens_, warp_k_;
  int group_shift_, entry_bytes_;
  WorkItem item_;
  int num_k_blocks_, num_channel_blocks_;
  // Of this thread's copies (open_sources); `left` counts what exists from there on, in bytes and rows.
  const std::byte *activation_source_, *code_source_, *parameter_source_;
  int activations_left_, tokens_left_;
  // Of the step that is being decoded: a vector serves several steps, parameters a whole group.
  uint32_t vectors_[Config::kFragments][4];
  Parameters parameters_[Config::kHasGroups ? Config::kFragments : 1][2];
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    gemm_tile_kernel(const __grid_constant__ GemmKernelParams params) {
  auto& storage = device::dynamic_shared<typename Config::Storage>();
  const int num_token_tiles = (params.num_tokens + Config::kTokens - 1) / Config::kTokens;
  const int num_channel_tiles =
      static_cast<int>((params.weight.padded_out_features + Config::kChannels - 1) / Config::kChannels);
  const int num_work = num_channel_tiles * num_token_tiles * params.num_splits;
  TileProduct<Config> product(params, storage);
  for (int work_idx = static_cast<int>(blockIdx.x); work_idx < num_work; work_idx += static_cast<int>(gridDim.x)) {
    product.multiply(work_item<Config>(params, work_idx, num_token_tiles));
    product.finish();
  }
}

template <typename Config>
void launch_gemm_tile(const char* name, const GemmKernelParams& params, void* stream) {
  device::launch(name, &gemm_tile_kernel<Config>, {static_cast<unsigned>(params.num_ctas)}, {Config::kThreads},
                 sizeof(typename Config::Storage), stream, params);
}

// Registry entry of an instance.
template <typename Config>
constexpr GemmKernel tile_entry(const char* name, const char* verified_on, const char* layout, uint32_t groups,
                                void (*launch)(const GemmKernelParams&, void*)) {
  using Decoder = typename Config::Decoder;
  GemmKernel entry{};
  entry.info = {name, verified_on};
  entry.activations = Decoder::kActivations;
  entry.codes = Decoder::kCodeBits == 4 ? WeightCodes::kU4
                : Decoder::kCodeBits == 8
                    ? (Config::kElementBytes == 1 ? WeightCodes::kS8 : WeightCodes::kU8)
                    : (Decoder::kActivations == GpuActivations::kF16 ? WeightCodes::kF16 : WeightCodes::kBF16);
  entry.scaling = Decoder::kScaling;
  entry.groups = groups;
  entry.layout = layout;
  entry.why_not = nullptr;
  entry.min_compute_capability = 80;
  entry.max_compute_capability = 0;
  entry.tile_tokens = Config::kTokens, entry.tile_channels = Config::kChannels, entry.tile_k = Config::kTileK;
  entry.warps_tokens = Config::kWarpsTokens, entry.warps_channels = Config::kWarpsChannels;
  entry.warps_k = Config::kWarpsK;
  entry.num_stages = Config::kStages;
  entry.shared_bytes = sizeof(typename Config::Storage);
  entry.ctas_per_sm = Config::kCtasPerSm;
  entry.can_split = true;
  entry.stores_codes = true;
  entry.accumulation = std::is_same_v<typename Config::Sum, int32_t> ? GemmKernel::kIntegers
                       : Config::kWarpsK == 1                        ? GemmKernel::kAscendingMma
                                                                     : GemmKernel::kOwn;
  entry.launch = launch;
  return entry;
}

}  // namespace partita::gemm
