// A matrix product the way kernels here are built: cp.async stages, ldmatrix, mma. Its barriers and waits are switched
// off one by one by the tests, which must notice each.
#include "device/ptx_cp_async.cuh"
#include "device/ptx_ldmatrix.cuh"
#include "device/ptx_mma.cuh"
#include "simt/tests/device_test.h"

namespace partita {
namespace {

constexpr int kTile = 64, kTileK = 32, kNumStages = 3, kNumWarps = 4;
constexpr int kRowStride = kTileK + 8;  // 80 bytes: the 8 rows that ldmatrix reads at once lie in different banks

struct Stages {
  alignas(16) uint16_t a[kNumStages][kTile][kRowStride];
  alignas(16) uint16_t b[kNumStages][kTile][kRowStride];
};
struct Storage {
  union {
    Stages stages;
    float tile[kTile][kTile];  // the result, once the stages are read
  };
};

// inputs: a [M, K], b [N, K] f16; output a b^T [M, N] f32; numbers: M, N, K, multiples of 64, 64, 32.
__global__ void __launch_bounds__(32 * kNumWarps) pipeline_kernel(const __grid_constant__ DeviceTestParams params) {
  Storage& storage = device::dynamic_shared<Storage>();
  const int64_t num_columns = params.numbers[1], depth = params.numbers[2];
  const unsigned thread = threadIdx.x, warp = thread / 32, lane = device::lane_idx();
  const uint16_t* a = static_cast<const uint16_t*>(params.inputs[0]) + blockIdx.y * kTile * depth;
  const uint16_t* b = static_cast<const uint16_t*>(params.inputs[1]) + blockIdx.x * kTile * depth;
  const int num_steps = static_cast<int>(depth / kTileK);

  const auto load_stage = [&](int step) {
    if (step < num_steps) {
      Stages& stages = storage.stages;
      for (unsigned i = thread; i < kTile * 4; i += 32 * kNumWarps) {
        const unsigned row = i / 4, column = i % 4 * 8;
        const int64_t from = row * depth + step * kTileK + column;
        device::cp_async_16(&stages.a[step % kNumStages][row][column], a + from);
        device::cp_async_16_evict_first(&stages.b[step % kNumStages][row][column], b + from);
      }
    }
    device::cp_async_commit();  // an empty group too: the waits below count groups
  };

  float sums[8][4] = {};
  for (int step = 0; step < kNumStages - 1; ++step) load_stage(step);
  for (int step = 0; step < num_steps; ++step) {
    device::cp_async_wait<kNumStages - 2>();
    __syncthreads();
    load_stage(step + kNumStages - 1);
    const int stage = step % kNumStages;
    for (int k = 0; k < kTileK; k += 16) {
      uint32_t fragment_a[4];
      device::ldmatrix_x4(fragment_a, &storage.stages.a[stage][warp * 16 + lane % 16][k + lane / 16 * 8]);
      for (int column = 0; column < 8; column += 2) {
        uint32_t pair_b[4];
        device::ldmatrix_x4(pair_b,
                            &storage.stages.b[stage][column * 8 + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
        const uint32_t first[2] = {pair_b[0], pair_b[1]}, second[2] = {pair_b[2], pair_b[3]};
        device::mma_m16n8k16_f16(sums[column], fragment_a, first);
        device::mma_m16n8k16_f16(sums[column + 1], fragment_a, second);
      }
    }
  }
  __syncthreads();
  const unsigned group = lane / 4, pair = lane % 4;
  for (int column = 0; column < 8; ++column)
    for (int i = 0; i < 4; ++i)
      storage.tile[warp * 16 + group + (i / 2) * 8][column * 8 + pair * 2 + i % 2] = sums[column][i];
  __syncwarp();
  float* out = static_cast<float*>(params.output);
  for (int row = 0; row < 16; ++row)
    for (unsigned column = lane; column < kTile; column += 32)
      out[(blockIdx.y * kTile + warp * 16 + row) * num_columns + blockIdx.x * kTile + column] =
          storage.tile[warp * 16 + row][column];
}

void launch_pipeline(const DeviceTestParams& params, void* stream) {
  device::launch("device_test pipeline", pipeline_kernel,
                 {static_cast<unsigned>(params.numbers[1] / kTile), static_cast<unsigned>(params.numbers[0] / kTile)},
                 {32 * kNumWarps}, sizeof(Storage), stream, params);
}

const KernelRegistration<DeviceTestKernel> kPipeline({{"pipeline", ""}, &launch_pipeline});

}  // namespace
}  // namespace partita
