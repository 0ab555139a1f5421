#include "device/launch.cuh"
#include "program/token_ids_gpu.h"

namespace partita {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) token_ids_kernel(const __grid_constant__ TokenIdsParams p) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= p.num_tokens) return;
  const int32_t row = p.token_rows[t], position = p.token_positions[t];
  p.token_ids[t] = row < 0 || position < 0 ? -1 : p.tokens[row * p.tokens_stride + position];
}

void launch_token_ids(const TokenIdsParams& params, void* stream) {
  const auto num_blocks = static_cast<unsigned>((params.num_tokens + kThreads - 1) / kThreads);
  device::launch("token_ids", token_ids_kernel, {num_blocks}, {kThreads}, 0, stream, params);
}

const KernelRegistration<TokenIdsKernel> kRegistered({{"token_ids", ""}, &launch_token_ids});

}  // namespace
}  // namespace partita
