// From the largest logit to the token: weights, cuts, draw. Launched twice; the second pass is for top_p alone.
//
// What the blocks of a row do with its splits (RowTask), and what the last of them does then:
//   kSum        weight of each segment                            draw: a segment, then the token in it
//   kCollect    list the logits that reach the bound of top_k     top_k, top_p, draw among the list
//   kHistogram  weights by logit, in bins                         the bin in which top_p cuts -> kSplitBin
//   kSplitBin   list that bin, weight of each segment above it    top_p in the list, then as kSum
//   kWhole      nothing                                           top_k, top_p, draw over the whole row
// A list that is too long for its buffer makes kWhole of kCollect and kSplitBin. Every sum of weights is an exact
// integer: how many blocks a row has changes nothing.
#include <cstdint>

#include "sampling/cuda/row_state.cuh"
#include "sampling/philox.h"
#include "sampling/sampling_kernels.h"

namespace partita {
namespace device {
namespace {

constexpr int kQuadsAhead = 2;

// The least integer that reaches top_p of the total.
__device__ __forceinline__ uint64_t prefix_target(float top_p, uint64_t total) {
  const double wanted = static_cast<double>(top_p) * static_cast<double>(total);
  auto target = static_cast<uint64_t>(wanted);
  if (static_cast<double>(target) < wanted) ++target;
  if (target > total) target = total;
  return target == 0 ? 1 : target;
}

// The token drawn is the first whose cumulated weight reaches this: lies above u * total.
__device__ __forceinline__ uint64_t draw_target(double u, uint64_t total) {
  const auto below = static_cast<uint64_t>(u * static_cast<double>(total));
  return below < total ? below + 1 : total;
}

// The weights of the row by bin, one histogram per split.
__device__ __forceinline__ void write_histogram(CutStorage& storage, const SamplingLaunch& launch, const RowSplit& at,
                                                const SegmentRange& range, const WeightScale& scale) {
  clear_bins(storage);
  __syncthreads();
  const float bins_per_logit = at.params->bins_per_logit;
  uint64_t rest = 0;  // most of a sure model's tokens fall into the last bin: no atomics for these
  for_each_logit<kQuadsAhead>(at.logits, range.begin, range.end, [&](float x, int, bool is_inside) {
    if (!is_inside) return;
    const uint64_t weight = weight_of(x, scale);
    if (weight == 0) return;
    const int bin = bin_of(x, scale.max, bins_per_logit);
    if (bin == kNumSamplingBins - 1)
      rest += weight;
    else
      add_to_bin(storage, bin, weight);
  });
  rest = warp_sum(rest);
  if (lane_idx() == 0) add_to_bin(storage, kNumSamplingBins - 1, rest);
  __syncthreads();
  uint64_t* histogram = launch.workspace.histograms + at.index * kNumSamplingBins;
  for (int bin = threadIdx.x; bin < kNumSamplingBins; bin += kSamplingThreads)
    histogram[bin] = static_cast<uint64_t>(storage.high[bin]) << 32 | storage.low[bin];
}

// By the last block: in which bin top_p cuts.
__device__ __forceinline__ void choose_bin(CutStorage& storage, const SamplingLaunch& launch, const RowSplit& at,
                                           RowProgress progress) {
  const uint64_t* histograms =
      launch.workspace.histograms + static_cast<int64_t>(at.logit_row) * launch.num_splits * kNumSamplingBins;
  uint64_t bins[4] = {};
  for (int split = 0; split < launch.num_splits; ++split)
#pragma unroll
    for (int j = 0; j < 4; ++j) bins[j] += histograms[split * kNumSamplingBins + 4 * threadIdx.x + j];
  const PrefixSum prefix = block_prefix_sum(storage.sums, bins[0] + bins[1] + bins[2] + bins[3]);
  progress.target = prefix_target(at.params->top_p, prefix.total);
  find_bin(storage, bins, prefix.before, progress.target);
  progress.task = RowTask::kSplitBin;
  progress.cut_bin = static_cast<int32_t>(storage.found_bin);
  progress.above = storage.found_above;
  if (threadIdx.x == 0) launch.workspace.progress[at.logit_row] = progress;
}

// By the last block, once the splits are summed or listed: the cuts that are left, and the draw.
__device__ __forceinline__ void settle_row(CutStorage& storage, const SamplingLaunch& launch, const RowSplit& at,
                                           const RowProgress& progress) {
  const GpuSamplingRow& params = *at.params;
  const auto vocab_size = static_cast<int>(launch.call.vocab_size);
  const Candidate* list = launch.workspace.lists + static_cast<int64_t>(at.logit_row) * kListCapacity;
  const uint32_t list_size = launch.workspace.list_sizes[at.logit_row];
  const bool has_list =
      (progress.task == RowTask::kCollect || progress.task == RowTask::kSplitBin) && list_size <= kListCapacity;
  const bool has_bin = progress.task == RowTask::kSplitBin && has_list;
  const bool has_segments = progress.task == RowTask::kSum || has_bin;
  const Elements listed{list, nullptr, 0, static_cast<int>(list_size)};
  const Elements whole{nullptr, at.logits, 0, vocab_size};
  Elements elements = has_list ? listed : whole;

  enum Stage { kTopK, kTopP, kDraw };
  CutSearch search{false, false, 0, 0, kLastOrder, {progress.max, params.inverse_temperature, 0.0f}};
  int token = -1;
  for (int stage = kTopK; stage <= kDraw; ++stage) {
    if (stage == kTopK && (has_segments || params.top_k == 0)) continue;
    if (stage == kTopP && (progress.task == RowTask::kSum || params.top_p >= 1.0f)) continue;
    search.counts = stage == kTopK;
    search.by_id = stage == kDraw;
    search.scale.min_p = stage == kDraw ? params.min_p : 0.0f;
    const double u = uniform_draw(params.seed, static_cast<uint64_t>(launch.call.num_tokens[at.logit_row]));
    if (stage == kTopK) {
      search.target = static_cast<uint64_t>(params.top_k);
    } else if (stage == kTopP && has_bin) {
      search.above = progress.above;
      search.target = progress.target;
    } else if (stage == kDraw && has_segments) {
      // Segment sums, with what the list keeps of the bin that was cut.
      clear_bins(storage);
      __syncthreads();
      const uint64_t* segment_sums =
          launch.workspace.segment_sums + static_cast<int64_t>(at.logit_row) * launch.num_splits * kSamplingWarps;
      for (int segment = threadIdx.x; segment < launch.num_splits * kSamplingWarps; segment += kSamplingThreads)
        add_to_bin(storage, segment, segment_sums[segment]);
      if (has_bin)
        for_each_element(listed, search.last, [&](const Candidate& candidate) {
          add_to_bin(storage, candidate.id / launch.segment_length, weight_of(candidate.logit, search.scale));
        });
      __syncthreads();
      uint64_t bins[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int bin = 4 * static_cast<int>(threadIdx.x) + j;
        bins[j] = static_cast<uint64_t>(storage.high[bin]) << 32 | storage.low[bin];
      }
      const PrefixSum prefix = block_prefix_sum(storage.sums, bins[0] + bins[1] + bins[2] + bins[3]);
      search.target = draw_target(u, prefix.total);
      find_bin(storage, bins, prefix.before, search.target);
      search.above = storage.found_above;
      const SegmentRange range = segment_range(launch, static_cast<int>(storage.found_bin));
      elements = {nullptr, at.logits, range.begin, range.end - range.begin};
    } else {
      const uint64_t total = total_weight(storage, elements, search.last, search.scale);
      search.target = stage == kTopP ? prefix_target(params.top_p, total) : draw_target(u, total);
    }
    const uint64_t found = find_cut(storage, elements, search);
    search.above = 0;
    if (stage == kDraw)
      token = static_cast<int>(found);
    else
      search.last = found;
  }
  if (threadIdx.x == 0) {
    launch.workspace.list_sizes[at.logit_row] = 0;
    launch.workspace.progress[at.logit_row].task = RowTask::kNone;
  }
  finish_row(launch, at, token);
}

__global__ void __launch_bounds__(kSamplingThreads, 2)
    weigh_logits(const __grid_constant__ SamplingLaunch launch, const bool is_second_pass) {
  CutStorage& storage = dynamic_shared<CutStorage>();
  const RowSplit at(launch);
  if (at.row < 0) return;
  const RowProgress progress = launch.workspace.progress[at.logit_row];
  if (progress.task == RowTask::kNone || (progress.task == RowTask::kSplitBin) != is_second_pass) return;

  const SegmentRange range = segment_range(launch, at.segment());
  WeightScale scale{progress.max, at.params->inverse_temperature, 0.0f};
  if (progress.task == RowTask::kHistogram) {
    write_histogram(storage, launch, at, range, scale);
  } else if (progress.task == RowTask::kCollect) {
    for_each_logit<kQuadsAhead>(at.logits, range.begin, range.end, [&](float x, int id, bool is_inside) {
      append_to_list(launch, at.logit_row, is_inside && x >= progress.bound, x, id);
    });
  } else if (progress.task != RowTask::kWhole) {
    scale.min_p = at.params->min_p;
    const bool splits_bin = progress.task == RowTask::kSplitBin;
    const float bins_per_logit = at.params->bins_per_logit;
    uint64_t sum = 0;
    for_each_logit<kQuadsAhead>(at.logits, range.begin, range.end, [&](float x, int id, bool is_inside) {
      const int bin = splits_bin ? bin_of(x, progress.max, bins_per_logit) : -1;
      if (splits_bin) append_to_list(launch, at.logit_row, is_inside && bin == progress.cut_bin, x, id);
      if (is_inside && bin < progress.cut_bin) sum += weight_of(x, scale);
    });
    sum = warp_sum(sum);
    if (lane_idx() == 0) launch.workspace.segment_sums[at.index * kSamplingWarps + threadIdx.x / kWarpSize] = sum;
  }
  if (!is_last_block(launch.workspace.tickets + at.logit_row, launch.num_splits, &storage.is_last)) return;
  if (progress.task == RowTask::kHistogram)
    choose_bin(storage, launch, at, progress);
  else
    settle_row(storage, launch, at, progress);
}

void launch_weigh(const SamplingLaunch& launch, void* stream) {
  for (const bool is_second_pass : {false, true})
    device::launch("weigh_logits", weigh_logits,
                   {static_cast<unsigned>(launch.num_splits), static_cast<unsigned>(launch.call.num_logit_rows)},
                   {kSamplingThreads}, sizeof(CutStorage), stream, launch, is_second_pass);
}

const KernelRegistration<SamplingWeighKernel> kRegistered({{"sampling_weigh", ""}, &launch_weigh});

}  // namespace
}  // namespace device
}  // namespace partita
