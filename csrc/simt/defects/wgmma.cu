// One warpgroup's product with one fault, or none. Never run on a GPU.
#include "device/ptx_wgmma.cuh"
#include "simt/tests/device_test.h"

namespace partita {
namespace {

constexpr unsigned kNumThreads = 128, kNumRows = 128, kRowWords = 32;

struct Storage {
  alignas(1024) uint32_t rows[kNumRows][kRowWords];
};

enum class Fault { kNone, kNoFence, kFenceBeforeWrite, kNoWait, kWeakWait, kWritesBeforeWait, kNoBarrierAfterWait };

template <Fault kFault>
__global__ void wgmma_kernel(const __grid_constant__ DeviceTestParams params) {
  Storage& storage = device::dynamic_shared<Storage>();
  const unsigned thread = threadIdx.x;
  if (kFault == Fault::kFenceBeforeWrite) device::fence_async_proxy();
  for (unsigned i = thread; i < kNumRows * kRowWords; i += kNumThreads) storage.rows[i / kRowWords][i % kRowWords] = 0;
  if (kFault != Fault::kNoFence && kFault != Fault::kFenceBeforeWrite) device::fence_async_proxy();
  __syncthreads();
  float sums[16][4] = {};
  const uint32_t a[4] = {};
  device::wgmma_fence();
  device::wgmma_m64n128k16_f16(sums, a, device::wgmma_matrix(storage.rows));
  device::wgmma_commit();
  if (kFault == Fault::kWritesBeforeWait) {
    __syncthreads();
    storage.rows[thread][0] = 1;
  }
  if (kFault == Fault::kWeakWait)
    device::wgmma_wait<1>();
  else if (kFault != Fault::kNoWait)
    device::wgmma_wait<0>();
  if (kFault != Fault::kNoBarrierAfterWait) __syncthreads();
  storage.rows[thread][0] = 1;
  static_cast<float*>(params.output)[thread] = sums[0][0];
}

template <Fault kFault>
void launch(const DeviceTestParams& params, void* stream) {
  device::launch("device_test defect", wgmma_kernel<kFault>, {1}, {kNumThreads}, sizeof(Storage), stream, params);
}

using Registration = const KernelRegistration<DeviceTestKernel>;
Registration kRight({{"wgmma_right", ""}, &launch<Fault::kNone>});
Registration kNoFence({{"wgmma_no_fence", ""}, &launch<Fault::kNoFence>});
Registration kFenceBeforeWrite({{"wgmma_fence_before_write", ""}, &launch<Fault::kFenceBeforeWrite>});
Registration kNoWait({{"wgmma_no_wait", ""}, &launch<Fault::kNoWait>});
Registration kWeakWait({{"wgmma_weak_wait", ""}, &launch<Fault::kWeakWait>});
Registration kWritesBeforeWait({{"wgmma_writes_before_wait", ""}, &launch<Fault::kWritesBeforeWait>});
Registration kNoBarrierAfterWait({{"wgmma_no_barrier_after_wait", ""}, &launch<Fault::kNoBarrierAfterWait>});

}  // namespace
}  // namespace partita
