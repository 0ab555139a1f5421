// The first pass over a row: its largest logit, which is a greedy row's token, and a lower bound of the k-th largest.
//
// Each thread keeps the largest logit it saw. These are logits of different tokens, so the k-th largest of them bounds
// the k-th largest of all from below, and little more than k logits reach the bound.
#include <cstdint>

#include "sampling/cuda/row_state.cuh"
#include "sampling/sampling_kernels.h"

namespace partita {
namespace device {
namespace {

constexpr uint64_t kBrokenRow = ~uint64_t{0};
constexpr int kQuadsAhead = 4;  // loads of 16 bytes in flight per thread

__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

__device__ __forceinline__ uint64_t block_largest(CutStorage& storage, uint64_t value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = larger(value, __shfl_xor_sync(kFullWarp, value, distance));
  if (lane_idx() == 0) storage.sums.warp_sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kSamplingWarps; ++w) value = larger(value, storage.sums.warp_sums[w]);
  return value;
}

// is_raw: of rows that ask for log probabilities, whose token is known; bounds the num_logprobs-th largest logit.
__global__ void __launch_bounds__(kSamplingThreads, 2)
    scan_logits(const __grid_constant__ SamplingLaunch launch, const bool is_raw) {
  CutStorage& storage = dynamic_shared<CutStorage>();
  const RowSplit at(launch);
  if (at.row < 0) return;
  if (is_raw && (at.params->num_logprobs < 0 || launch.call.sampled[at.logit_row] < 0)) return;

  const SegmentRange range = segment_range(launch, at.segment());
  float largest = kMinusInfinity;
  int largest_id = -1;
  bool broken = false;
  for_each_logit<kQuadsAhead>(at.logits, range.begin, range.end, [&](float x, int id, bool) {
    broken |= is_broken(x);
    if (x > largest) {
      largest = x;
      largest_id = id;
    }
  });
  const int64_t vocab_size = launch.call.vocab_size;
  const int num_top = is_raw ? at.params->num_logprobs : at.params->top_k;
  const int num_maxima = launch.num_splits * kSamplingThreads;
  // Beyond half the maxima they bound badly: too much would reach the bound.
  const bool wants_bound = num_top > 0 && vocab_size > kListCapacity && 2 * num_top <= num_maxima;
  if (wants_bound)
    store_8(launch.workspace.maxima + at.index * kSamplingThreads + threadIdx.x,
            make_uint2(__float_as_uint(largest), static_cast<uint32_t>(largest_id)));
  const uint64_t own =
      broken ? kBrokenRow : static_cast<uint64_t>(order_key(largest)) << 32 | ~static_cast<uint32_t>(largest_id);
  const uint64_t of_split = block_largest(storage, own);
  if (threadIdx.x == 0) launch.workspace.best[at.index] = of_split;
  if (!is_last_block(launch.workspace.tickets + at.logit_row, launch.num_splits, &storage.is_last)) return;

  uint64_t of_row = 0;
  for (int split = 0; split < launch.num_splits; ++split)
    of_row = larger(of_row, launch.workspace.best[static_cast<int64_t>(at.logit_row) * launch.num_splits + split]);
  const float max = from_order_key(static_cast<uint32_t>(of_row >> 32));
  RowProgress progress{max, kMinusInfinity, RowTask::kNone, 0, 0, 0};
  if (!is_raw) {
    const bool is_unusable = of_row == kBrokenRow || max == kMinusInfinity;
    if (is_unusable || at.params->is_greedy) {
      if (threadIdx.x == 0) launch.workspace.progress[at.logit_row] = progress;
      finish_row(launch, at, is_unusable ? -1 : static_cast<int>(~static_cast<uint32_t>(of_row)));
      return;
    }
    progress.task = at.params->top_k > 0      ? RowTask::kCollect
                    : at.params->top_p < 1.0f ? RowTask::kHistogram
                                              : RowTask::kSum;
  }
  if (num_top > 0 && vocab_size > kListCapacity) {
    uint64_t cut = kLastOrder;
    if (wants_bound) {
      const Candidate* maxima =
          launch.workspace.maxima + static_cast<int64_t>(at.logit_row) * launch.num_splits * kSamplingThreads;
      cut = find_cut(storage, {maxima, nullptr, 0, num_maxima},
                     {/*counts=*/true, /*by_id=*/false, 0, static_cast<uint64_t>(num_top), kLastOrder, {}});
    }
    if (cut != kLastOrder)
      progress.bound = from_order_key(~static_cast<uint32_t>(cut >> kTokenIdBits));
    else if (!is_raw)
      progress.task = RowTask::kWhole;
  }
  if (threadIdx.x == 0) launch.workspace.progress[at.logit_row] = progress;
}

void launch_scan(const SamplingLaunch& launch, bool is_raw, void* stream) {
  device::launch("scan_logits", scan_logits,
                 {static_cast<unsigned>(launch.num_splits), static_cast<unsigned>(launch.call.num_logit_rows)},
                 {kSamplingThreads}, sizeof(CutStorage), stream, launch, is_raw);
}

const KernelRegistration<SamplingScanKernel> kRegistered({{"sampling_scan", ""}, &launch_scan});

}  // namespace
}  // namespace device
}  // namespace partita
