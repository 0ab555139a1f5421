// Where a sum over tokens, taken in some order, reaches a target: top_k, top_p and the draw are this one search.
//
//   top_k   counts in the order of sampling, target k
//   top_p   weights in the order of sampling, target p * total
//   draw    weights in the order of ids, target u * total
//
// One block narrows the range of orders with histograms of kNumSamplingBins until few tokens are left, and finds the
// one among these by comparing all pairs. No sort; the result depends on the tokens alone, not on where they lie.
#pragma once

#include <cstdint>

#include "sampling/cuda/block_sums.cuh"
#include "sampling/cuda/logit_order.cuh"

namespace partita::device {

constexpr int kMaxMembers = 128;  // compared in pairs

struct CutStorage {
  uint32_t counts[kNumSamplingBins];
  uint32_t low[kNumSamplingBins];  // the sums' low words: 64-bit atomics in shared memory are loops
  uint32_t high[kNumSamplingBins];
  BlockSumStorage sums;
  uint64_t member_orders[kMaxMembers];
  uint64_t member_measures[kMaxMembers];
  uint64_t found_above;
  uint64_t found_order;
  uint32_t num_members;
  uint32_t found_bin;
  uint32_t found_count;
  uint32_t is_found;
  uint32_t is_last;
};

__device__ __forceinline__ void add_to_bin(CutStorage& storage, int bin, uint64_t value) {
  const auto low = static_cast<uint32_t>(value);
  const uint32_t before = atomicAdd(&storage.low[bin], low);
  const uint32_t high = static_cast<uint32_t>(value >> 32) + (before + low < before ? 1u : 0u);
  if (high != 0) atomicAdd(&storage.high[bin], high);
}

__device__ __forceinline__ void clear_bins(CutStorage& storage) {
  for (int bin = threadIdx.x; bin < kNumSamplingBins; bin += kSamplingThreads) {
    storage.counts[bin] = 0;
    storage.low[bin] = 0;
    storage.high[bin] = 0;
  }
}

// The tokens to be searched: a list, or the logits [begin, begin + size) of a row.
struct Elements {
  const Candidate* list;
  const float* row;
  int begin;
  int size;

  __device__ __forceinline__ Candidate at(int i) const {
    if (list != nullptr) {
      const uint2 words = load_8(list + i);
      return {__uint_as_float(words.x), static_cast<int32_t>(words.y)};
    }
    return {__uint_as_float(load_4(row + begin + i)), begin + i};
  }
};

struct CutSearch {
  bool counts;      // measure: 1 for each token, else its weight
  bool by_id;       // order
  uint64_t above;   // what was measured of tokens that lie before all elements
  uint64_t target;  // > above
  uint64_t last;    // elements behind this place in the order of sampling do not count
  WeightScale scale;
};

// Calls f(candidate) for each element, by all threads.
template <typename Function>
__device__ __forceinline__ void for_each_element(const Elements& elements, uint64_t last, const Function& f) {
  constexpr int kAhead = 4;  // loads in flight
  for (int start = threadIdx.x; start < elements.size; start += kAhead * kSamplingThreads) {
    Candidate candidates[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = start + j * kSamplingThreads;
      candidates[j] = i < elements.size ? elements.at(i) : Candidate{0.0f, -1};
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (candidates[j].id >= 0 && order_of(candidates[j]) <= last) f(candidates[j]);
  }
}

// The sum of the elements' weights. Storage may be used again after the caller's next barrier.
__device__ __forceinline__ uint64_t total_weight(CutStorage& storage, const Elements& elements, uint64_t last,
                                                 const WeightScale& scale) {
  uint64_t sum = 0;
  for_each_element(elements, last, [&](const Candidate& candidate) { sum += weight_of(candidate.logit, scale); });
  return block_prefix_sum(storage.sums, sum).total;
}

// bins[j]: the measures of bins 4 t + j of thread t. Leaves in storage the bin in which the sum reaches the target, and
// what lies above it; is_found is 0 where it is not reached. Ends with a barrier.
__device__ __forceinline__ void find_bin(CutStorage& storage, const uint64_t (&bins)[4], uint64_t before,
                                         uint64_t target) {
  if (threadIdx.x == 0) storage.is_found = 0;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (before < target && target <= before + bins[j]) {
      storage.is_found = 1;
      storage.found_bin = 4 * threadIdx.x + j;
      storage.found_above = before;
    }
    before += bins[j];
  }
  __syncthreads();
}
static_assert(kNumSamplingBins == 4 * kSamplingThreads, "four bins a thread");

// Of at most kMaxMembers elements in the range of orders: gathered in shared memory, in any order. Ends with a barrier.
template <typename Order, typename Measure>
__device__ __forceinline__ void gather_members(CutStorage& storage, const Elements& elements, uint64_t last,
                                               uint64_t least, uint64_t largest, const Order& order,
                                               const Measure& measure) {
  if (threadIdx.x == 0) storage.num_members = 0;
  __syncthreads();
  for_each_element(elements, last, [&](const Candidate& candidate) {
    const uint64_t place = order(candidate);
    if (place < least || place > largest) return;
    const uint32_t member = atomicAdd(&storage.num_members, 1u);
    if (member >= kMaxMembers) return;
    storage.member_orders[member] = place;
    storage.member_measures[member] = measure(candidate);
  });
  __syncthreads();
}

// The range that the elements' orders lie in: logits of a list rarely use more than a small part of the floats.
template <typename Order>
__device__ __forceinline__ void find_range(CutStorage& storage, const Elements& elements, uint64_t last,
                                           const Order& order, uint64_t* least_order, uint64_t* largest_order) {
  uint64_t least = kLastOrder, largest = 0;
  for_each_element(elements, last, [&](const Candidate& candidate) {
    const uint64_t place = order(candidate);
    if (place < least) least = place;
    if (place > largest) largest = place;
  });
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint64_t other_least = __shfl_xor_sync(kFullWarp, least, distance);
    const uint64_t other_largest = __shfl_xor_sync(kFullWarp, largest, distance);
    if (other_least < least) least = other_least;
    if (other_largest > largest) largest = other_largest;
  }
  const unsigned warp = threadIdx.x / kWarpSize;
  if (lane_idx() == 0) {
    storage.member_orders[warp] = least;
    storage.member_measures[warp] = largest;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kSamplingWarps; ++w) {
    if (storage.member_orders[w] < least) least = storage.member_orders[w];
    if (storage.member_measures[w] > largest) largest = storage.member_measures[w];
  }
  *least_order = least;
  *largest_order = largest;
}

// The order of the element with which the sum reaches the target; kLastOrder where it does not. When it returns, no
// thread reads elements any more; storage may be used again after the caller's next barrier.
__device__ __forceinline__ uint64_t find_cut(CutStorage& storage, const Elements& elements, const CutSearch& search) {
  const auto order = [&](const Candidate& candidate) {
    return search.by_id ? static_cast<uint64_t>(candidate.id) : order_of(candidate);
  };
  const auto measure = [&](const Candidate& candidate) {
    return search.counts ? uint64_t{1} : weight_of(candidate.logit, search.scale);
  };
  uint64_t above = search.above;
  uint64_t least = 0, largest = kLastOrder;
  if (elements.size > kMaxMembers) {
    if (elements.list == nullptr && search.by_id) {
      least = static_cast<uint64_t>(elements.begin);
      largest = static_cast<uint64_t>(elements.begin + elements.size - 1);
    } else if (elements.list == nullptr) {
      least = 0;
      largest = (uint64_t{1} << kOrderBits) - 1;
    } else {
      find_range(storage, elements, search.last, order, &least, &largest);
      if (least > largest) return kLastOrder;
    }
    for (uint32_t num_left = kMaxMembers + 1; num_left > kMaxMembers;) {
      int shift = 64 - __clzll(static_cast<long long>(largest - least)) - 11;
      if (shift < 0) shift = 0;
      clear_bins(storage);
      __syncthreads();
      for_each_element(elements, search.last, [&](const Candidate& candidate) {
        const uint64_t place = order(candidate);
        if (place < least || place > largest) return;
        const int bin = static_cast<int>((place - least) >> shift);
        atomicAdd(&storage.counts[bin], 1u);
        add_to_bin(storage, bin, measure(candidate));
      });
      __syncthreads();
      uint64_t bins[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int bin = 4 * static_cast<int>(threadIdx.x) + j;
        bins[j] = static_cast<uint64_t>(storage.high[bin]) << 32 | storage.low[bin];
      }
      const PrefixSum prefix = block_prefix_sum(storage.sums, bins[0] + bins[1] + bins[2] + bins[3]);
      find_bin(storage, bins, above + prefix.before, search.target);
      if (storage.is_found == 0) return kLastOrder;
      above = storage.found_above;
      num_left = storage.counts[storage.found_bin];
      least += static_cast<uint64_t>(storage.found_bin) << shift;
      const uint64_t bin_end = least + (uint64_t{1} << shift) - 1;
      if (bin_end < largest) largest = bin_end;
      __syncthreads();
      if (shift == 0) return least;
    }
  }

  if (threadIdx.x == 0) storage.found_order = kLastOrder;
  gather_members(storage, elements, search.last, least, largest, order, measure);
  const uint32_t num_members = storage.num_members < kMaxMembers ? storage.num_members : kMaxMembers;
  if (threadIdx.x < num_members) {
    const uint64_t own_order = storage.member_orders[threadIdx.x];
    const uint64_t own_measure = storage.member_measures[threadIdx.x];
    uint64_t through = above;
    for (uint32_t i = 0; i < num_members; ++i)
      if (storage.member_orders[i] <= own_order) through += storage.member_measures[i];
    if (through >= search.target && through - own_measure < search.target) storage.found_order = own_order;
  }
  __syncthreads();
  return storage.found_order;
}

}  // namespace partita::device
