// Log probabilities of the raw logits: log softmax, rank and the most likely tokens, for rows that ask. Follows
// scan_logits over the raw row, whose largest logit and bound it uses.
#include <cstdint>

#include "sampling/cuda/row_state.cuh"
#include "sampling/sampling_kernels.h"

namespace partita {
namespace device {
namespace {

static_assert(kMaxTopLogprobs <= kMaxMembers, "the most likely tokens are compared in pairs");
constexpr int kQuadsAhead = 2;

__global__ void __launch_bounds__(kSamplingThreads, 2) write_logprobs(const __grid_constant__ SamplingLaunch launch) {
  CutStorage& storage = dynamic_shared<CutStorage>();
  const SampleGpuParams& call = launch.call;
  const RowSplit at(launch);
  if (at.row < 0) return;
  const int num_top = at.params->num_logprobs;
  if (num_top < 0) return;
  const int token = call.sampled[at.logit_row];
  if (token < 0) return;

  const RowProgress progress = launch.workspace.progress[at.logit_row];
  const WeightScale scale{progress.max, 1.0f, 0.0f};
  const float token_logit = at.logits[token];
  const SegmentRange range = segment_range(launch, at.segment());
  uint64_t sum = 0;
  uint32_t num_larger = 0;
  for_each_logit<kQuadsAhead>(at.logits, range.begin, range.end, [&](float x, int id, bool is_inside) {
    if (num_top > 0) append_to_list(launch, at.logit_row, is_inside && x >= progress.bound, x, id);
    if (!is_inside) return;
    sum += weight_of(x, scale);
    num_larger += x > token_logit;
  });
  sum = warp_sum(sum);
  const auto warp_larger = static_cast<uint32_t>(warp_sum(num_larger));
  if (lane_idx() == 0) {
    launch.workspace.segment_sums[at.index * kSamplingWarps + threadIdx.x / kWarpSize] = sum;
    launch.workspace.segment_counts[at.index * kSamplingWarps + threadIdx.x / kWarpSize] = warp_larger;
  }
  if (!is_last_block(launch.workspace.tickets + at.logit_row, launch.num_splits, &storage.is_last)) return;

  const int64_t first_segment = static_cast<int64_t>(at.logit_row) * launch.num_splits * kSamplingWarps;
  uint64_t own_sum = 0, own_larger = 0;
  if (static_cast<int>(threadIdx.x) < launch.num_splits * kSamplingWarps) {
    own_sum = launch.workspace.segment_sums[first_segment + threadIdx.x];
    own_larger = launch.workspace.segment_counts[first_segment + threadIdx.x];
  }
  const uint64_t total = block_prefix_sum(storage.sums, own_sum).total;
  __syncthreads();
  const uint64_t larger = block_prefix_sum(storage.sums, own_larger).total;
  const float log_total = logf(static_cast<float>(total) / kWeightUnits);
  const auto logprob = [&](float logit) { return (logit - progress.max) - log_total; };
  if (threadIdx.x == 0) {
    call.logprobs[at.logit_row] = logprob(token_logit);
    call.ranks[at.logit_row] = 1 + static_cast<int32_t>(larger);
  }
  if (num_top == 0) return;

  const uint32_t list_size = launch.workspace.list_sizes[at.logit_row];
  const Candidate* list = launch.workspace.lists + static_cast<int64_t>(at.logit_row) * kListCapacity;
  const Elements elements = list_size <= kListCapacity
                                ? Elements{list, nullptr, 0, static_cast<int>(list_size)}
                                : Elements{nullptr, at.logits, 0, static_cast<int>(call.vocab_size)};
  uint64_t last = kLastOrder;
  if (elements.size > kMaxMembers)
    last = find_cut(storage, elements,
                    {/*counts=*/true, /*by_id=*/false, 0, static_cast<uint64_t>(num_top), kLastOrder, scale});
  gather_members(
      storage, elements, last, 0, kLastOrder, [](const Candidate& candidate) { return order_of(candidate); },
      [](const Candidate& candidate) { return static_cast<uint64_t>(__float_as_uint(candidate.logit)); });
  const uint32_t num_members = storage.num_members;
  if (threadIdx.x < num_members) {
    const uint64_t own_order = storage.member_orders[threadIdx.x];
    int place = 0;
    for (uint32_t i = 0; i < num_members; ++i) place += storage.member_orders[i] < own_order;
    if (place < num_top) {
      const int64_t at_top = static_cast<int64_t>(at.logit_row) * kMaxTopLogprobs + place;
      call.top_ids[at_top] = static_cast<int32_t>(own_order & ((uint64_t{1} << kTokenIdBits) - 1));
      call.top_logprobs[at_top] = logprob(__uint_as_float(static_cast<uint32_t>(storage.member_measures[threadIdx.x])));
    }
  }
  if (threadIdx.x == 0) launch.workspace.list_sizes[at.logit_row] = 0;
}

void launch_logprobs(const SamplingLaunch& launch, void* stream) {
  device::launch("write_logprobs", write_logprobs,
                 {static_cast<unsigned>(launch.num_splits), static_cast<unsigned>(launch.call.num_logit_rows)},
                 {kSamplingThreads}, sizeof(CutStorage), stream, launch);
}

const KernelRegistration<SamplingLogprobsKernel> kRegistered({{"sampling_logprobs", ""}, &launch_logprobs});

}  // namespace
}  // namespace device
}  // namespace partita
