// What threads do together: indices, shuffles, votes, barriers, atomics, memory between blocks.
#include "device/launch.cuh"
#include "device/ptx_cp_async.cuh"
#include "device/ptx_memory.cuh"
#include "simt/tests/device_test.h"

namespace partita {
namespace {

// output [threads of the grid, 7] u32: threadIdx, blockIdx and the lane, in the order of the linear index.
__global__ void indices_kernel(const __grid_constant__ DeviceTestParams params) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  uint32_t* out = static_cast<uint32_t*>(params.output) + 7 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  out[0] = threadIdx.x, out[1] = threadIdx.y, out[2] = threadIdx.z;
  out[3] = blockIdx.x, out[4] = blockIdx.y, out[5] = blockIdx.z;
  out[6] = device::lane_idx();
}

void launch_indices(const DeviceTestParams& params, void* stream) {
  device::launch("device_test indices", indices_kernel, {3, 2, 2}, {5, 3, 4}, 0, stream, params);
}

// inputs: values [32] u32; numbers[0]: lane or delta, numbers[1]: width. output [32, 8] u32.
__global__ void shuffle_kernel(const __grid_constant__ DeviceTestParams params) {
  const unsigned lane = device::lane_idx();
  const uint32_t value = static_cast<const uint32_t*>(params.inputs[0])[lane];
  const int number = static_cast<int>(params.numbers[0]), width = static_cast<int>(params.numbers[1]);
  uint32_t* out = static_cast<uint32_t*>(params.output) + 8 * lane;
  out[0] = __shfl_sync(device::kFullWarp, value, number, width);
  out[1] = __shfl_up_sync(device::kFullWarp, value, static_cast<unsigned>(number), width);
  out[2] = __shfl_down_sync(device::kFullWarp, value, static_cast<unsigned>(number), width);
  out[3] = __shfl_xor_sync(device::kFullWarp, value, number, width);
  // 64 bits, a float, and both halves of the warp on their own.
  const uint64_t wide = static_cast<uint64_t>(value) << 32 | lane;
  const auto moved =
      static_cast<uint64_t>(__shfl_xor_sync(device::kFullWarp, static_cast<unsigned long long>(wide), 1));
  out[4] = static_cast<uint32_t>(moved >> 32) ^ static_cast<uint32_t>(moved);
  out[5] =
      __float_as_uint(__shfl_sync(device::kFullWarp, __uint_as_float(value & 0x7fffffu), static_cast<int>(31 - lane)));
  if (lane < 16)
    out[6] = __shfl_sync(0x0000ffffu, value, static_cast<int>(15 - lane));
  else
    out[6] = __shfl_sync(0xffff0000u, value, static_cast<int>(lane ^ 5));
  uint32_t ballot = __ballot_sync(device::kFullWarp, value & 1);
  if (__any_sync(device::kFullWarp, value == 0)) ballot ^= 0x10000u;
  if (__all_sync(device::kFullWarp, value != 0)) ballot ^= 0x1u;
  out[7] = ballot;
}

void launch_shuffle(const DeviceTestParams& params, void* stream) {
  device::launch("device_test shuffle", shuffle_kernel, {1}, {32}, 0, stream, params);
}

constexpr unsigned kNumThreads = 160;  // 5 warps

struct BlockStorage {
  uint32_t values[kNumThreads];
  uint32_t counter;
  float sum;
  unsigned long long wide;
};

// inputs: values [grid, 160] u32. output [grid, 160] u32: suffix sums of the block, found by pointer jumping: 2
// barriers a round. Then the threads of the first two warps leave early, and the rest meet once more.
__global__ void barriers_kernel(const __grid_constant__ DeviceTestParams params) {
  BlockStorage& storage = device::dynamic_shared<BlockStorage>();
  const unsigned thread = threadIdx.x;
  const uint32_t* in = static_cast<const uint32_t*>(params.inputs[0]) + blockIdx.x * kNumThreads;
  uint32_t* out = static_cast<uint32_t*>(params.output) + blockIdx.x * kNumThreads;
  uint32_t value = in[thread];
  storage.values[thread] = value;
  for (unsigned step = 1; step < kNumThreads; step *= 2) {
    __syncthreads();
    const uint32_t other = thread + step < kNumThreads ? storage.values[thread + step] : 0;
    __syncthreads();
    value += other;
    storage.values[thread] = value;
  }
  if (thread < 64) {
    out[thread] = value;
    return;
  }
  __syncthreads();
  out[thread] = storage.values[thread == 64 ? 159 : thread - 1] + value;
}

void launch_barriers(const DeviceTestParams& params, void* stream) {
  device::launch("device_test barriers", barriers_kernel, {static_cast<unsigned>(params.numbers[0])}, {kNumThreads},
                 sizeof(BlockStorage), stream, params);
}

// output [160, 3] i32: __syncthreads_count, _and, _or of inputs[0] [160] i32.
__global__ void barrier_votes_kernel(const __grid_constant__ DeviceTestParams params) {
  const int value = static_cast<const int32_t*>(params.inputs[0])[threadIdx.x];
  int32_t* out = static_cast<int32_t*>(params.output) + 3 * threadIdx.x;
  out[0] = __syncthreads_count(value);
  out[1] = __syncthreads_and(value) != 0;
  out[2] = __syncthreads_or(value) != 0;
}

void launch_barrier_votes(const DeviceTestParams& params, void* stream) {
  device::launch("device_test barrier votes", barrier_votes_kernel, {1}, {kNumThreads}, 0, stream, params);
}

constexpr int kStages = 2, kStageWords = 64;
struct PipelineStorage {
  uint32_t stages[kStages][kStageWords];
};

// Warps 0 and 1 fill stages that warps 2 and 3 read, through named barriers: full 1 + stage, empty 3 + stage.
// inputs: values [numbers[0], 64] u32; output [64] u32: their sums, each word by the consumer thread of its mirror.
__global__ void named_barriers_kernel(const __grid_constant__ DeviceTestParams params) {
  PipelineStorage& storage = device::dynamic_shared<PipelineStorage>();
  const uint32_t* in = static_cast<const uint32_t*>(params.inputs[0]);
  const int num_rounds = static_cast<int>(params.numbers[0]);
  if (threadIdx.x < 64) {
    for (int round = 0; round < num_rounds; ++round) {
      const int stage = round % kStages;
      if (round >= kStages) device::barrier_sync(3 + stage, 128);
      storage.stages[stage][threadIdx.x] = in[round * kStageWords + threadIdx.x];
      device::barrier_arrive(1 + stage, 128);
    }
  } else {
    uint32_t sum = 0;
    for (int round = 0; round < num_rounds; ++round) {
      const int stage = round % kStages;
      device::barrier_sync(1 + stage, 128);
      sum += storage.stages[stage][127 - threadIdx.x];
      if (round + kStages < num_rounds) device::barrier_arrive(3 + stage, 128);
    }
    static_cast<uint32_t*>(params.output)[127 - threadIdx.x] = sum;
  }
}

void launch_named_barriers(const DeviceTestParams& params, void* stream) {
  device::launch("device_test named barriers", named_barriers_kernel, {1}, {128}, sizeof(PipelineStorage), stream,
                 params);
}

// inputs: values [grid, 160] u32. output [8] u32, zeros before (output[3] all ones): add, max, min of all values, their
// count by atomics of shared memory, the sum of their low bytes as float, exclusive or, 64-bit add of low and high
// word.
__global__ void atomics_kernel(const __grid_constant__ DeviceTestParams params) {
  BlockStorage& storage = device::dynamic_shared<BlockStorage>();
  const uint32_t value = static_cast<const uint32_t*>(params.inputs[0])[blockIdx.x * kNumThreads + threadIdx.x];
  uint32_t* out = static_cast<uint32_t*>(params.output);
  if (threadIdx.x == 0) {
    storage.counter = 0;
    storage.sum = 0.0f;
    storage.wide = 0;
  }
  __syncthreads();
  atomicAdd(&storage.counter, 1u);
  atomicAdd(&storage.sum, static_cast<float>(value & 0xff));
  atomicAdd(&storage.wide, static_cast<unsigned long long>(value) << 8);
  atomicAdd(&out[0], value);
  atomicMax(&out[1], value);
  atomicMin(&out[2], value);
  atomicXor(&out[3], value);
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(&out[4], storage.counter);
    atomicAdd(reinterpret_cast<float*>(&out[5]), storage.sum);
    // A compare-and-swap loop, as a lock or an addition of another type would use it.
    unsigned long long* wide = reinterpret_cast<unsigned long long*>(&out[6]);
    unsigned long long seen = 0, expected;
    do {
      expected = seen;
      seen = atomicCAS(wide, expected, expected + storage.wide);
    } while (seen != expected);
  }
}

void launch_atomics(const DeviceTestParams& params, void* stream) {
  device::launch("device_test atomics", atomics_kernel, {static_cast<unsigned>(params.numbers[0])}, {kNumThreads},
                 sizeof(BlockStorage), stream, params);
}

// Every block waits for its right neighbour's word and adds its own: blocks must be resident together. inputs: none;
// output: words [grid] then flags [grid], u32, zeros before.
__global__ void block_chain_kernel(const __grid_constant__ DeviceTestParams params) {
  uint32_t* words = static_cast<uint32_t*>(params.output);
  uint32_t* flags = words + gridDim.x;
  const unsigned block = blockIdx.x;
  if (block + 1 < gridDim.x && threadIdx.x == 0)
    while (device::load_acquire_u32(&flags[block + 1]) == 0) {
    }
  __syncthreads();
  if (threadIdx.x == 40) {
    words[block] = (block + 1 < gridDim.x ? words[block + 1] : 0u) + block;
    if (block % 2 == 0)
      device::store_release_u32(&flags[block], 1);
    else
      device::add_release_u32(&flags[block], 1);
  }
}

void launch_block_chain(const DeviceTestParams& params, void* stream) {
  device::launch("device_test block chain", block_chain_kernel, {static_cast<unsigned>(params.numbers[0])}, {64}, 0,
                 stream, params);
}

// The last block to come adds up what all have written. output: [grid] u32, then the counter and the sum, zeros before.
__global__ void last_block_kernel(const __grid_constant__ DeviceTestParams params) {
  if (threadIdx.x != 0) return;
  uint32_t* words = static_cast<uint32_t*>(params.output);
  words[blockIdx.x] = blockIdx.x * blockIdx.x;
  if (device::add_acquire_release_u32(&words[gridDim.x], 1) + 1 != gridDim.x) return;
  uint32_t sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += words[i];
  words[gridDim.x + 1] = sum;
}

void launch_last_block(const DeviceTestParams& params, void* stream) {
  device::launch("device_test last block", last_block_kernel, {static_cast<unsigned>(params.numbers[0])}, {32}, 0,
                 stream, params);
}

// inputs: values [32, 4] u32; output [32, 16] u32.
__global__ void memory_kernel(const __grid_constant__ DeviceTestParams params) {
  const unsigned lane = device::lane_idx();
  const uint32_t* in = static_cast<const uint32_t*>(params.inputs[0]) + 4 * lane;
  uint32_t* out = static_cast<uint32_t*>(params.output) + 16 * lane;
  device::prefetch_l2(in);
  const uint4 a = device::load_16(in), b = device::load_nc_16(in), c = device::load_stream_16(in);
  const uint2 d = device::load_8(in + 2);
  const uint32_t e = device::load_4(in + 3);
  device::store_16(out, make_uint4(a.x, b.y, c.z, a.w));
  device::store_8(out + 4, d);
  device::store_4(out + 6, e);
  device::store_4(out + 7, a.y ^ b.z);
  *reinterpret_cast<float4*>(out + 8) = *reinterpret_cast<const float4*>(in);
  *reinterpret_cast<uint4*>(out + 12) = make_uint4(b.w, c.x, d.y, e);
}

void launch_memory(const DeviceTestParams& params, void* stream) {
  device::launch("device_test memory", memory_kernel, {1}, {32}, 0, stream, params);
}

struct CopyStorage {
  alignas(16) uint32_t bytes[7][64][4];
};

// inputs: source [64, 4] u32. output [7, 64, 4] u32: each kind of copy; zfill of 16 takes thread % 17 bytes, of 8
// thread % 9 and then all.
__global__ void copies_kernel(const __grid_constant__ DeviceTestParams params) {
  CopyStorage& storage = device::dynamic_shared<CopyStorage>();
  const unsigned thread = threadIdx.x;
  const uint32_t* in = static_cast<const uint32_t*>(params.inputs[0]) + 4 * thread;
  for (int i = 0; i < 4; ++i) device::cp_async_4(&storage.bytes[0][thread][i], in + i);
  device::cp_async_8(&storage.bytes[1][thread][0], in);
  device::cp_async_8(&storage.bytes[1][thread][2], in + 2);
  device::cp_async_commit();
  device::cp_async_16(storage.bytes[2][thread], in);
  device::cp_async_16_evict_first(storage.bytes[3][thread], in);
  device::cp_async_commit();
  const int bytes = static_cast<int>(thread % 17);
  device::cp_async_16_zfill(storage.bytes[4][thread], bytes == 0 ? nullptr : in, bytes);
  device::cp_async_16_zfill(storage.bytes[5][thread], in, 16);
  const int few_bytes = static_cast<int>(thread % 9);
  device::cp_async_8_zfill(&storage.bytes[6][thread][0], few_bytes == 0 ? nullptr : in, few_bytes);
  device::cp_async_8_zfill(&storage.bytes[6][thread][2], in + 2, 8);
  device::cp_async_commit();
  uint32_t* out = static_cast<uint32_t*>(params.output);
  device::cp_async_wait<1>();
  __syncthreads();
  const unsigned mirror = 63 - thread;
  for (int copy = 0; copy < 4; ++copy)
    for (int i = 0; i < 4; ++i) out[(copy * 64 + mirror) * 4 + i] = storage.bytes[copy][mirror][i];
  device::cp_async_wait<0>();
  __syncthreads();
  for (int copy = 4; copy < 7; ++copy)
    for (int i = 0; i < 4; ++i) out[(copy * 64 + mirror) * 4 + i] = storage.bytes[copy][mirror][i];
}

void launch_copies(const DeviceTestParams& params, void* stream) {
  device::launch("device_test copies", copies_kernel, {1}, {64}, sizeof(CopyStorage), stream, params);
}

using Registration = const KernelRegistration<DeviceTestKernel>;
Registration kIndices({{"indices", ""}, &launch_indices});
Registration kShuffle({{"shuffle", ""}, &launch_shuffle});
Registration kBarriers({{"barriers", ""}, &launch_barriers});
Registration kBarrierVotes({{"barrier_votes", ""}, &launch_barrier_votes});
Registration kNamedBarriers({{"named_barriers", ""}, &launch_named_barriers});
Registration kAtomics({{"atomics", ""}, &launch_atomics});
Registration kBlockChain({{"block_chain", ""}, &launch_block_chain});
Registration kLastBlock({{"last_block", ""}, &launch_last_block});
Registration kMemory({{"memory", ""}, &launch_memory});
Registration kCopies({{"copies", ""}, &launch_copies});

}  // namespace
}  // namespace partita
