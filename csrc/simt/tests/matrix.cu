// mma and ldmatrix, one warp.
#include "device/ptx_ldmatrix.cuh"
#include "device/ptx_mma.cuh"
#include "simt/tests/device_test.h"

namespace partita {
namespace {

enum class MatrixType { kF16, kBf16, kS8, kU8S8, kS8U8 };

// inputs: a [16, K], b [8, K] (16 or 8 bits wide), d [16, 8] (32 bits); output: d + a b^T. K is 16 or 32: one mma.
template <MatrixType kType>
__global__ void mma_kernel(const __grid_constant__ DeviceTestParams params) {
  constexpr bool kIsFloat = kType == MatrixType::kF16 || kType == MatrixType::kBf16;
  // Both kinds read 4 bytes of k at a time, and rows are 32 bytes long.
  const uint32_t* a_words = static_cast<const uint32_t*>(params.inputs[0]);  // [16, 8]
  const uint32_t* b_words = static_cast<const uint32_t*>(params.inputs[1]);  // [8, 8]
  const unsigned group = device::lane_idx() / 4, pair = device::lane_idx() % 4;
  const uint32_t a[4] = {a_words[group * 8 + pair], a_words[(group + 8) * 8 + pair], a_words[group * 8 + pair + 4],
                         a_words[(group + 8) * 8 + pair + 4]};
  const uint32_t b[2] = {b_words[group * 8 + pair], b_words[group * 8 + pair + 4]};
  const unsigned at[4] = {group * 8 + 2 * pair, group * 8 + 2 * pair + 1, (group + 8) * 8 + 2 * pair,
                          (group + 8) * 8 + 2 * pair + 1};
  if constexpr (kIsFloat) {
    const float* in = static_cast<const float*>(params.inputs[2]);
    float d[4] = {in[at[0]], in[at[1]], in[at[2]], in[at[3]]};
    if constexpr (kType == MatrixType::kF16)
      device::mma_m16n8k16_f16(d, a, b);
    else
      device::mma_m16n8k16_bf16(d, a, b);
    for (int i = 0; i < 4; ++i) static_cast<float*>(params.output)[at[i]] = d[i];
  } else {
    const int32_t* in = static_cast<const int32_t*>(params.inputs[2]);
    int32_t d[4] = {in[at[0]], in[at[1]], in[at[2]], in[at[3]]};
    if constexpr (kType == MatrixType::kS8) device::mma_m16n8k32_s8(d, a, b);
    if constexpr (kType == MatrixType::kU8S8) device::mma_m16n8k32_u8s8(d, a, b);
    if constexpr (kType == MatrixType::kS8U8) device::mma_m16n8k32_s8u8(d, a, b);
    for (int i = 0; i < 4; ++i) static_cast<int32_t*>(params.output)[at[i]] = d[i];
  }
}

struct MatrixStorage {
  alignas(16) uint16_t rows[32][8];
};

// inputs: rows [32, 8] u16, order [32] i32: lane l names row order[l]. output [32, kCount] u32.
template <int kCount, bool kIsTransposed>
__global__ void ldmatrix_kernel(const __grid_constant__ DeviceTestParams params) {
  MatrixStorage& storage = device::dynamic_shared<MatrixStorage>();
  const unsigned lane = device::lane_idx();
  for (int i = 0; i < 8; ++i) storage.rows[lane][i] = static_cast<const uint16_t*>(params.inputs[0])[lane * 8 + i];
  __syncwarp();
  const void* row = storage.rows[static_cast<const int32_t*>(params.inputs[1])[lane]];
  uint32_t r[kCount];
  if constexpr (kCount == 1) kIsTransposed ? device::ldmatrix_x1_trans(r, row) : device::ldmatrix_x1(r, row);
  if constexpr (kCount == 2) kIsTransposed ? device::ldmatrix_x2_trans(r, row) : device::ldmatrix_x2(r, row);
  if constexpr (kCount == 4) kIsTransposed ? device::ldmatrix_x4_trans(r, row) : device::ldmatrix_x4(r, row);
  for (int i = 0; i < kCount; ++i) static_cast<uint32_t*>(params.output)[lane * kCount + i] = r[i];
}

template <void (*kKernel)(DeviceTestParams)>
void launch(const DeviceTestParams& params, void* stream) {
  device::launch("device_test matrix", kKernel, {1}, {32}, sizeof(MatrixStorage), stream, params);
}

using Registration = const KernelRegistration<DeviceTestKernel>;
Registration kMmaF16({{"mma_f16", ""}, &launch<mma_kernel<MatrixType::kF16>>});
Registration kMmaBf16({{"mma_bf16", ""}, &launch<mma_kernel<MatrixType::kBf16>>});
Registration kMmaS8({{"mma_s8", ""}, &launch<mma_kernel<MatrixType::kS8>>});
Registration kMmaU8S8({{"mma_u8s8", ""}, &launch<mma_kernel<MatrixType::kU8S8>>});
Registration kMmaS8U8({{"mma_s8u8", ""}, &launch<mma_kernel<MatrixType::kS8U8>>});
Registration kX1({{"ldmatrix_x1", ""}, &launch<ldmatrix_kernel<1, false>>});
Registration kX2({{"ldmatrix_x2", ""}, &launch<ldmatrix_kernel<2, false>>});
Registration kX4({{"ldmatrix_x4", ""}, &launch<ldmatrix_kernel<4, false>>});
Registration kX1Trans({{"ldmatrix_x1_trans", ""}, &launch<ldmatrix_kernel<1, true>>});
Registration kX2Trans({{"ldmatrix_x2_trans", ""}, &launch<ldmatrix_kernel<2, true>>});
Registration kX4Trans({{"ldmatrix_x4_trans", ""}, &launch<ldmatrix_kernel<4, true>>});

}  // namespace
}  // namespace partita
