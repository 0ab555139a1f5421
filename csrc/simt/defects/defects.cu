// Kernels with one fault each, which the host execution must report. Never run on a GPU.
#include "device/ptx_cp_async.cuh"
#include "device/ptx_ldmatrix.cuh"
#include "device/ptx_memory.cuh"
#include "device/ptx_mma.cuh"
#include "simt/tests/device_test.h"

namespace partita {
namespace {

constexpr unsigned kNumThreads = 64;

struct Storage {
  alignas(16) uint32_t words[4 * kNumThreads];
  alignas(16) uint8_t bytes[kNumThreads];
};

struct LargeStorage {
  uint32_t words[32 * kNumThreads];
};

// Each takes the params (inputs[0], output: [256] u32) and the block's storage.
using Params = const DeviceTestParams&;

__device__ void read_before_barrier(Params p, Storage& s) {
  s.words[threadIdx.x] = threadIdx.x;
  static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[threadIdx.x ^ 32];
}
__device__ void write_after_read(Params p, Storage& s) {
  s.words[threadIdx.x] = threadIdx.x;
  __syncthreads();
  static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[threadIdx.x ^ 32];
  s.words[threadIdx.x] = 0;
}
// Two other warps' threads have read the word, the second after the writer's own.
__device__ void write_after_two_reads(Params p, Storage& s) {
  if (threadIdx.x == 0) s.words[0] = 1;
  __syncthreads();
  static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[0];
  if (threadIdx.x == 32) s.words[0] = 2;
}
__device__ void write_twice(Params, Storage& s) { s.words[threadIdx.x % 32] = threadIdx.x; }
__device__ void neighbouring_bytes_in_order(Params p, Storage& s) {
  // No fault: threads write bytes of one word, then one thread reads them all.
  s.bytes[threadIdx.x] = static_cast<uint8_t>(threadIdx.x);
  __syncthreads();
  if (threadIdx.x < 16)
    static_cast<uint32_t*>(p.output)[threadIdx.x] = reinterpret_cast<uint32_t*>(s.bytes)[threadIdx.x];
}
__device__ void same_byte(Params, Storage& s) { s.bytes[threadIdx.x / 2] = 1; }
__device__ void missing_syncwarp(Params p, Storage& s) {
  s.words[threadIdx.x] = threadIdx.x;
  static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[threadIdx.x ^ 1];
}
// A shuffle makes the lanes meet, but orders no memory.
__device__ void shuffle_for_syncwarp(Params p, Storage& s) {
  s.words[threadIdx.x] = threadIdx.x;
  const uint32_t moved = __shfl_xor_sync(device::kFullWarp, threadIdx.x, 1);
  static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[threadIdx.x ^ 1] + moved;
}
__device__ void syncwarp_of_other_half(Params p, Storage& s) {
  s.words[threadIdx.x] = threadIdx.x;
  if (threadIdx.x % 32 < 16)
    __syncwarp(0x0000ffffu);
  else
    __syncwarp(0xffff0000u);
  static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[threadIdx.x ^ 16];
}
__device__ void syncwarp_of_own_half(Params p, Storage& s) {
  // No fault.
  s.words[threadIdx.x] = threadIdx.x;
  if (threadIdx.x % 32 < 16)
    __syncwarp(0x0000ffffu);
  else
    __syncwarp(0xffff0000u);
  static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[threadIdx.x ^ 8];
}
// Warp 0 knows of warp 1's writes only up to where warp 1 arrived.
__device__ void write_after_arrive(Params p, Storage& s) {
  if (threadIdx.x >= 32) {
    device::barrier_arrive(1, 64);
    s.words[threadIdx.x] = threadIdx.x;
  } else {
    device::barrier_sync(1, 64);
    static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[threadIdx.x + 32];
  }
}
__device__ void atomic_and_plain(Params p, Storage& s) {
  if (threadIdx.x == 0) s.words[0] = 0;
  __syncthreads();
  if (threadIdx.x < 32)
    atomicAdd(&s.words[0], 1u);
  else
    static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[0];
}
__device__ void missing_wait(Params p, Storage& s) {
  device::cp_async_16(&s.words[4 * threadIdx.x], static_cast<const uint32_t*>(p.inputs[0]) + 4 * threadIdx.x);
  device::cp_async_commit();
  __syncthreads();
  static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[4 * threadIdx.x];
  device::cp_async_wait<0>();
}
__device__ void weak_wait(Params p, Storage& s) {
  device::cp_async_16(&s.words[4 * threadIdx.x], static_cast<const uint32_t*>(p.inputs[0]) + 4 * threadIdx.x);
  device::cp_async_commit();
  device::cp_async_wait<1>();
  __syncthreads();
  static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[4 * threadIdx.x];
  device::cp_async_wait<0>();
}
__device__ void wait_without_commit(Params p, Storage& s) {
  device::cp_async_16(&s.words[4 * threadIdx.x], static_cast<const uint32_t*>(p.inputs[0]) + 4 * threadIdx.x);
  device::cp_async_wait<0>();
  __syncthreads();
  static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[4 * threadIdx.x];
}
__device__ void wait_without_barrier(Params p, Storage& s) {
  device::cp_async_16(&s.words[4 * threadIdx.x], static_cast<const uint32_t*>(p.inputs[0]) + 4 * threadIdx.x);
  device::cp_async_commit();
  device::cp_async_wait<0>();
  static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[4 * (threadIdx.x ^ 32)];
}
__device__ void never_waits(Params p, Storage& s) {
  device::cp_async_16(&s.words[4 * threadIdx.x], static_cast<const uint32_t*>(p.inputs[0]) + 4 * threadIdx.x);
  device::cp_async_commit();
}
__device__ void copies_to_one_place(Params p, Storage& s) {
  device::cp_async_16(&s.words[4 * (threadIdx.x / 2)], static_cast<const uint32_t*>(p.inputs[0]));
  device::cp_async_commit();
  device::cp_async_wait<0>();
}
__device__ void copy_over_reads(Params p, Storage& s) {
  for (int i = 0; i < 4; ++i) s.words[4 * threadIdx.x + i] = 0;
  __syncthreads();
  static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[4 * (threadIdx.x ^ 32)];
  device::cp_async_16(&s.words[4 * threadIdx.x], static_cast<const uint32_t*>(p.inputs[0]) + 4 * threadIdx.x);
  device::cp_async_commit();
  device::cp_async_wait<0>();
}
__device__ void uninitialised(Params p, Storage& s) {
  if (threadIdx.x != 5) s.words[threadIdx.x] = 0;
  __syncthreads();
  static_cast<uint32_t*>(p.output)[threadIdx.x] = s.words[threadIdx.x];
}
__device__ void uninitialised_row(Params p, Storage& s) {
  if (threadIdx.x != 5) s.words[threadIdx.x] = 0;
  __syncthreads();
  uint32_t r[1];
  device::ldmatrix_x1(r, &s.words[4 * (device::lane_idx() % 8)]);
  static_cast<uint32_t*>(p.output)[threadIdx.x] = r[0];
}
__device__ void row_of_other_warp(Params p, Storage& s) {
  s.words[threadIdx.x] = 0;
  uint32_t r[1];
  __syncwarp();
  device::ldmatrix_x1(r, &s.words[4 * (device::lane_idx() % 8) + 32]);
  static_cast<uint32_t*>(p.output)[threadIdx.x] = r[0];
}
__device__ void read_past_end(Params p, Storage&) {
  static_cast<uint32_t*>(p.output)[threadIdx.x] = static_cast<const uint32_t*>(p.inputs[0])[4 * threadIdx.x + 4];
}
__device__ void write_before_begin(Params p, Storage&) {
  static_cast<uint32_t*>(p.output)[static_cast<int>(threadIdx.x) - 1] = 0;
}
__device__ void load_past_end(Params p, Storage&) {
  const uint4 v = device::load_16(static_cast<const uint32_t*>(p.inputs[0]) + 4 * (threadIdx.x + 1));
  static_cast<uint32_t*>(p.output)[threadIdx.x] = v.x;
}
__device__ void copy_past_end(Params p, Storage& s) {
  device::cp_async_16(&s.words[4 * threadIdx.x], static_cast<const uint32_t*>(p.inputs[0]) + 4 * (threadIdx.x + 1));
  device::cp_async_commit();
  device::cp_async_wait<0>();
}
__device__ void null_pointer(Params p, Storage&) {
  static_cast<uint32_t*>(p.output)[threadIdx.x] = *(static_cast<const uint32_t*>(p.inputs[3]) + threadIdx.x);
}
__device__ void shared_past_end(Params, Storage& s) { s.words[threadIdx.x * 5] = 0; }
__device__ void misaligned_load(Params p, Storage&) {
  const uint4 v = device::load_16(static_cast<const uint32_t*>(p.inputs[0]) + threadIdx.x);
  static_cast<uint32_t*>(p.output)[threadIdx.x] = v.x;
}
__device__ void misaligned_float4(Params p, Storage&) {
  const float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(p.inputs[0]) + threadIdx.x);
  static_cast<float*>(p.output)[threadIdx.x] = v.x + v.y + v.z + v.w;
}
__device__ void misaligned_shared(Params p, Storage& s) {
  s.bytes[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x < 8)
    static_cast<uint32_t*>(p.output)[threadIdx.x] = *reinterpret_cast<uint16_t*>(&s.bytes[threadIdx.x]);
}
__device__ void misaligned_copy(Params p, Storage& s) {
  device::cp_async_8(&s.words[threadIdx.x], static_cast<const uint32_t*>(p.inputs[0]));
  device::cp_async_commit();
  device::cp_async_wait<0>();
}
__device__ void misaligned_row(Params p, Storage& s) {
  for (int i = 0; i < 4; ++i) s.words[4 * threadIdx.x + i] = 0;
  __syncthreads();
  uint32_t r[1];
  device::ldmatrix_x1(r, &s.words[2 * device::lane_idx()]);
  static_cast<uint32_t*>(p.output)[threadIdx.x] = r[0];
}
__device__ void half_warp_barrier(Params, Storage&) {
  if (threadIdx.x % 32 < 16)
    __syncthreads();
  else
    __syncwarp(0xffffffffu);
}
__device__ void two_barriers_in_a_warp(Params, Storage&) {
  if (threadIdx.x % 2 == 0)
    __syncthreads();
  else
    __syncthreads();
}
__device__ void barrier_without_partner(Params, Storage&) {
  if (threadIdx.x < 32) device::barrier_sync(2, 64);
}
__device__ void different_collectives(Params p, Storage&) {
  uint32_t value;
  if (device::lane_idx() < 7)
    value = __shfl_xor_sync(device::kFullWarp, threadIdx.x, 1);
  else
    value = __ballot_sync(device::kFullWarp, 1);
  static_cast<uint32_t*>(p.output)[threadIdx.x] = value;
}
__device__ void shuffle_from_outside(Params p, Storage&) {
  if (device::lane_idx() < 16)
    static_cast<uint32_t*>(p.output)[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, threadIdx.x, 16);
}
__device__ void not_in_mask(Params p, Storage&) {
  static_cast<uint32_t*>(p.output)[threadIdx.x] = __shfl_xor_sync(0x7fffffffu, threadIdx.x, 0);
}
__device__ void part_of_a_warp_mma(Params p, Storage&) {
  if (device::lane_idx() == 31) return;
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  device::mma_m16n8k16_f16(d, a, b);
  static_cast<float*>(p.output)[threadIdx.x] = d[0];
}
__device__ void polls_forever(Params p, Storage&) {
  const uint32_t* flag = static_cast<const uint32_t*>(p.inputs[0]);
  while (device::load_acquire_u32(flag) != 0xdeadbeefu) {
  }
}
__device__ void other_threads_locals(Params p, Storage&) {
  // Publishes the address of a local variable, which on a GPU means another byte in every thread.
  uint32_t local = threadIdx.x;
  uint32_t** slot = static_cast<uint32_t**>(p.output);
  if (threadIdx.x == 0) *slot = &local;
  __syncthreads();
  if (threadIdx.x == 1) **slot = local;
  __syncthreads();
}
__device__ __noinline__ uint32_t deep(uint32_t depth, uint32_t* above) {
  uint32_t frame[64];
  for (int i = 0; i < 64; ++i) frame[i] = above[i] + depth;
  if (depth == 0) return frame[63];
  return deep(depth - 1, frame) + frame[depth % 64];
}
__device__ void deep_recursion(Params p, Storage&) {
  uint32_t frame[64] = {};
  static_cast<uint32_t*>(p.output)[threadIdx.x] = deep(5000, frame);
}

template <void (*kDefect)(Params, Storage&)>
__global__ void defect_kernel(const __grid_constant__ DeviceTestParams params) {
  kDefect(params, device::dynamic_shared<Storage>());
}

__global__ void large_plan_kernel(const __grid_constant__ DeviceTestParams params) {
  LargeStorage& storage = device::dynamic_shared<LargeStorage>();
  storage.words[threadIdx.x] = static_cast<uint32_t>(params.numbers[0]);
}

template <void (*kDefect)(Params, Storage&)>
void launch(const DeviceTestParams& params, void* stream) {
  device::launch("device_test defect", defect_kernel<kDefect>, {1}, {kNumThreads}, sizeof(Storage), stream, params);
}

void launch_large_plan(const DeviceTestParams& params, void* stream) {
  device::launch("device_test defect", large_plan_kernel, {1}, {kNumThreads}, sizeof(Storage), stream, params);
}
void launch_no_blocks(const DeviceTestParams& params, void* stream) {
  device::launch("device_test defect", large_plan_kernel, {0}, {kNumThreads}, sizeof(LargeStorage), stream, params);
}
void launch_many_threads(const DeviceTestParams& params, void* stream) {
  device::launch("device_test defect", large_plan_kernel, {1}, {1025}, sizeof(LargeStorage), stream, params);
}
void launch_much_shared(const DeviceTestParams& params, void* stream) {
  device::launch("device_test defect", large_plan_kernel, {1}, {kNumThreads}, 228 * 1024, stream, params);
}

#define PARTITA_DEFECT(name) const KernelRegistration<DeviceTestKernel> k_##name({{#name, ""}, &launch<name>})
PARTITA_DEFECT(read_before_barrier);
PARTITA_DEFECT(write_after_read);
PARTITA_DEFECT(write_after_two_reads);
PARTITA_DEFECT(write_twice);
PARTITA_DEFECT(neighbouring_bytes_in_order);
PARTITA_DEFECT(same_byte);
PARTITA_DEFECT(missing_syncwarp);
PARTITA_DEFECT(shuffle_for_syncwarp);
PARTITA_DEFECT(syncwarp_of_other_half);
PARTITA_DEFECT(syncwarp_of_own_half);
PARTITA_DEFECT(write_after_arrive);
PARTITA_DEFECT(atomic_and_plain);
PARTITA_DEFECT(missing_wait);
PARTITA_DEFECT(weak_wait);
PARTITA_DEFECT(wait_without_commit);
PARTITA_DEFECT(wait_without_barrier);
PARTITA_DEFECT(never_waits);
PARTITA_DEFECT(copies_to_one_place);
PARTITA_DEFECT(copy_over_reads);
PARTITA_DEFECT(uninitialised);
PARTITA_DEFECT(uninitialised_row);
PARTITA_DEFECT(row_of_other_warp);
PARTITA_DEFECT(read_past_end);
PARTITA_DEFECT(write_before_begin);
PARTITA_DEFECT(load_past_end);
PARTITA_DEFECT(copy_past_end);
PARTITA_DEFECT(null_pointer);
PARTITA_DEFECT(shared_past_end);
PARTITA_DEFECT(misaligned_load);
PARTITA_DEFECT(misaligned_float4);
PARTITA_DEFECT(misaligned_shared);
PARTITA_DEFECT(misaligned_copy);
PARTITA_DEFECT(misaligned_row);
PARTITA_DEFECT(half_warp_barrier);
PARTITA_DEFECT(two_barriers_in_a_warp);
PARTITA_DEFECT(barrier_without_partner);
PARTITA_DEFECT(different_collectives);
PARTITA_DEFECT(shuffle_from_outside);
PARTITA_DEFECT(not_in_mask);
PARTITA_DEFECT(part_of_a_warp_mma);
PARTITA_DEFECT(polls_forever);
PARTITA_DEFECT(other_threads_locals);
PARTITA_DEFECT(deep_recursion);
#undef PARTITA_DEFECT
const KernelRegistration<DeviceTestKernel> kLargePlan({{"large_plan", ""}, &launch_large_plan});
const KernelRegistration<DeviceTestKernel> kNoBlocks({{"no_blocks", ""}, &launch_no_blocks});
const KernelRegistration<DeviceTestKernel> kManyThreads({{"many_threads", ""}, &launch_many_threads});
const KernelRegistration<DeviceTestKernel> kMuchShared({{"much_shared", ""}, &launch_much_shared});

}  // namespace
}  // namespace partita
