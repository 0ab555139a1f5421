// The log probability of each scheduled token's successor: one block a row, one pass over its logits with a running
// maximum per thread. Sums are fp32 in a fixed order: the same on every launch.
#include <cstdint>

#include "sampling/cuda/logit_order.cuh"
#include "sampling/sampling_kernels.h"

namespace partita {
namespace device {
namespace {

constexpr int kQuadsAhead = 2;
constexpr float kLeastExponent = -87.0f;

__device__ __forceinline__ float exp_or_zero(float x) { return x < kLeastExponent ? 0.0f : exp_in_range(x); }

// sum e^(x - max) of some logits.
struct ExpSum {
  float max;
  float sum;
};
__device__ __forceinline__ ExpSum merge(const ExpSum& a, const ExpSum& b) {
  const float max = fmaxf(a.max, b.max);
  if (max == kMinusInfinity) return {max, 0.0f};
  return {max, __fadd_rn(__fmul_rn(a.sum, exp_or_zero(a.max - max)), __fmul_rn(b.sum, exp_or_zero(b.max - max)))};
}
__device__ __forceinline__ ExpSum warp_merge(ExpSum value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const ExpSum right{__shfl_down_sync(kFullWarp, value.max, distance),
                       __shfl_down_sync(kFullWarp, value.sum, distance)};
    value = merge(value, right);
  }
  return value;  // of lane 0
}

struct ScoreStorage {
  ExpSum warps[kSamplingWarps];
};

__global__ void __launch_bounds__(kSamplingThreads) score_tokens(const __grid_constant__ ScoreGpuParams params) {
  ScoreStorage& storage = dynamic_shared<ScoreStorage>();
  const int logit_row = static_cast<int>(blockIdx.x);
  const int row = params.logit_rows[logit_row];
  if (row < 0) return;
  const float* logits = params.logits + logit_row * params.logits_stride;
  const auto vocab_size = static_cast<int>(params.vocab_size);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;

  // A segment per warp, as in sampling; NaN and +infinity make the sum NaN.
  const int segment_length =
      (vocab_size + kSamplingWarps * kSegmentUnit - 1) / (kSamplingWarps * kSegmentUnit) * kSegmentUnit;
  const int begin = warp * segment_length;
  const int end = begin + segment_length < vocab_size ? begin + segment_length : vocab_size;
  ExpSum own{kMinusInfinity, 0.0f};
  bool broken = false;
  for_each_logit<kQuadsAhead>(logits, begin, end, [&](float x, int, bool) {
    broken |= is_broken(x);
    if (x > own.max) {
      own.sum = __fmul_rn(own.sum, exp_or_zero(own.max - x));
      own.max = x;
    }
    if (x > kMinusInfinity) own.sum = __fadd_rn(own.sum, exp_or_zero(x - own.max));
  });
  if (broken) own.sum = __uint_as_float(0x7fc00000u);
  own = warp_merge(own);
  if (lane_idx() == 0) storage.warps[warp] = own;
  __syncthreads();
  if (warp != 0) return;
  own = lane_idx() < kSamplingWarps ? storage.warps[lane_idx()] : ExpSum{kMinusInfinity, 0.0f};
  own = warp_merge(own);
  if (lane_idx() != 0) return;
  const int64_t position = params.num_tokens[logit_row];
  const int token =
      position >= 0 && position < params.tokens_stride ? params.tokens[row * params.tokens_stride + position] : -1;
  params.scores[logit_row] =
      token >= 0 && token < vocab_size ? logits[token] - own.max - logf(own.sum) : __uint_as_float(0x7fc00000u);
}

void launch_score(const ScoreGpuParams& params, void* stream) {
  device::launch("score_tokens", score_tokens, {static_cast<unsigned>(params.num_logit_rows)}, {kSamplingThreads},
                 sizeof(ScoreStorage), stream, params);
}

const KernelRegistration<ScoreKernel> kRegistered({{"score", ""}, &launch_score});

}  // namespace
}  // namespace device
}  // namespace partita
