// Threads that do what a script says, in any order that its barriers allow: the race checks are tried on random
// scripts.
#include "device/launch.cuh"
#include "simt/tests/device_test.h"

namespace partita {
namespace {

constexpr unsigned kNumWarps = 4, kNumWords = 8;

enum Operation : int32_t { kEnd, kRead, kWrite, kAdd, kBlock, kNamed, kArrive, kWarpLanes, kReadBytes, kWriteByte };

struct Storage {
  uint32_t words[kNumWords];
};

// inputs: script [4 warps, numbers[0], 3] i32 of {operation, lane or barrier or mask, word or threads}. output [1] u32.
__global__ void script_kernel(const __grid_constant__ DeviceTestParams params) {
  Storage& storage = device::dynamic_shared<Storage>();
  if (threadIdx.x < kNumWords) storage.words[threadIdx.x] = 0;
  __syncthreads();
  const int32_t* line = static_cast<const int32_t*>(params.inputs[0]) + threadIdx.x / 32 * params.numbers[0] * 3;
  uint32_t sum = 0;
  for (; line[0] != kEnd; line += 3) {
    const int32_t first = line[1], second = line[2];
    const bool is_mine = device::lane_idx() == static_cast<unsigned>(first);
    uint8_t* byte = reinterpret_cast<uint8_t*>(storage.words) + second;
    switch (line[0]) {
      case kRead:
        if (is_mine) sum += storage.words[second];
        break;
      case kWrite:
        if (is_mine) storage.words[second] = sum;
        break;
      case kAdd:
        if (is_mine) atomicAdd(&storage.words[second], 1u);
        break;
      case kReadBytes:
        if (is_mine) sum += *byte;
        break;
      case kWriteByte:
        if (is_mine) *byte = static_cast<uint8_t>(sum);
        break;
      case kBlock:
        __syncthreads();
        break;
      case kNamed:
        device::barrier_sync(first, second);
        break;
      case kArrive:
        device::barrier_arrive(first, second);
        break;
      case kWarpLanes:
        if ((static_cast<uint32_t>(first) >> device::lane_idx() & 1) != 0) __syncwarp(static_cast<uint32_t>(first));
        break;
    }
  }
  if (sum == 0x12345678u) static_cast<uint32_t*>(params.output)[0] = sum;  // or the reads would be left out
}

void launch_script(const DeviceTestParams& params, void* stream) {
  device::launch("device_test script", script_kernel, {1}, {32 * kNumWarps}, sizeof(Storage), stream, params);
}

const KernelRegistration<DeviceTestKernel> kScript({{"script", ""}, &launch_script});

}  // namespace
}  // namespace partita
