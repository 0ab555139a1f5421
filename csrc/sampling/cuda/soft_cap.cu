// logits = cap * tanh(logits / cap), in place.
#include <cstdint>

#include "device/launch.cuh"
#include "sampling/sampling_kernels.h"

namespace partita {
namespace device {
namespace {

constexpr int kThreads = 256;
constexpr int kLogitsPerThread = 8;

__global__ void __launch_bounds__(kThreads) soft_cap(const __grid_constant__ SoftCapGpuParams params) {
  float* row = params.logits + blockIdx.y * params.logits_stride;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kLogitsPerThread + threadIdx.x;
  float x[kLogitsPerThread];
#pragma unroll
  for (int j = 0; j < kLogitsPerThread; ++j)
    if (first + j * kThreads < params.vocab_size) x[j] = row[first + j * kThreads];
#pragma unroll
  for (int j = 0; j < kLogitsPerThread; ++j)
    if (first + j * kThreads < params.vocab_size) row[first + j * kThreads] = params.cap * tanhf(x[j] / params.cap);
}

void launch_soft_cap(const SoftCapGpuParams& params, void* stream) {
  constexpr int64_t kPerBlock = kThreads * kLogitsPerThread;
  device::launch("soft_cap", soft_cap,
                 {static_cast<unsigned>((params.vocab_size + kPerBlock - 1) / kPerBlock),
                  static_cast<unsigned>(params.num_logit_rows)},
                 {kThreads}, 0, stream, params);
}

const KernelRegistration<SoftCapKernel> kRegistered({{"soft_cap", ""}, &launch_soft_cap});

}  // namespace
}  // namespace device
}  // namespace partita
