// The body of LogitScan, compiled once per instruction set by logit_scan_<isa>.cpp.
#pragma once

#include "core/lanes16.h"
#include "sampling/logit_scan.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace partita {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

bool stripe_maxima(const float* x, int64_t n, float* maxima) {
  I32Lanes largest_magnitude{};  // of the bits without sign: above infinity's lies NaN
  const auto fold = [&](F32Lanes& max, const F32Lanes& lanes) __attribute__((always_inline)) {
    max = max_lanes(lanes, max);
    largest_magnitude = max_lanes(bits_of(lanes) & 0x7fffffff, largest_magnitude);
  };
  for (int64_t start = 0; start < n; start += kStripeLength, maxima += kStripeLanes) {
    const int64_t end = start + kStripeLength < n ? start + kStripeLength : n;
    F32Lanes max[4];  // four chains hide the latency
    for (F32Lanes& chain : max) chain = all_lanes(kMinusInfinity);
    int64_t i = start;
    for (; i + 4 * kNumLanes <= end; i += 4 * kNumLanes) {
      fold(max[0], load_lanes(x + i));
      fold(max[1], load_lanes(x + i + kNumLanes));
      fold(max[2], load_lanes(x + i + 2 * kNumLanes));
      fold(max[3], load_lanes(x + i + 3 * kNumLanes));
    }
    for (; i + kNumLanes <= end; i += kNumLanes) fold(max[0], load_lanes(x + i));
    if (i < end) fold(max[0], load_first_lanes(x + i, end - i, kMinusInfinity));
    store_lanes(maxima, max_lanes(max_lanes(max[0], max[1]), max_lanes(max[2], max[3])));
  }
  int32_t magnitudes[kNumLanes];
  __builtin_memcpy(magnitudes, &largest_magnitude, sizeof magnitudes);
  bool has_nan = false;
  for (int i = 0; i < kNumLanes; ++i) has_nan |= magnitudes[i] > 0x7f800000;
  return !has_nan;
}

PARTITA_INLINE F32Lanes weight_of(const F32Lanes& x, float max, float inverse_temperature) {
  const F32Lanes exponent = (x - max) * inverse_temperature;  // <= 0
  const F32Lanes weight = exp_in_range(max_lanes(exponent, all_lanes(-87.0f)));
  return select_lanes(exponent < -87.0f, F32Lanes{}, weight);
}

void stripe_weights(const float* x, int64_t n, float max, float inverse_temperature, float* weights, double* sums) {
  for (int64_t start = 0; start < n; start += kStripeLength) {
    const int64_t end = start + kStripeLength < n ? start + kStripeLength : n;
    F32Lanes sum{};
    int64_t i = start;
    for (; i + kNumLanes <= end; i += kNumLanes) {
      const F32Lanes weight = weight_of(load_lanes(x + i), max, inverse_temperature);
      store_lanes(weights + i, weight);
      sum += weight;
    }
    if (i < end) {
      const F32Lanes weight = weight_of(load_first_lanes(x + i, end - i, kMinusInfinity), max, inverse_temperature);
      store_first_lanes(weights + i, weight, end - i);
      sum += weight;
    }
    *sums++ = sum_of_lanes(sum);
  }
}

int64_t collect_range(const float* x, int64_t n, float low, float high, int32_t* positions) {
  int64_t count = 0;
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512 lows = _mm512_set1_ps(low), highs = _mm512_set1_ps(high);
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= n; i += 16) {
    const __m512 lanes = _mm512_loadu_ps(x + i);
    const __mmask16 mask =
        _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(lanes, lows, _CMP_GE_OQ), lanes, highs, _CMP_LT_OQ);
    if (mask) {
      // In a register and then stored whole: a compressing store is microcoded on Zen 4.
      _mm512_storeu_si512(positions + count, _mm512_maskz_compress_epi32(mask, index));
      count += __builtin_popcount(mask);
    }
    index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
  }
#elif defined(__AVX2__)
  const __m256 lows = _mm256_set1_ps(low), highs = _mm256_set1_ps(high);
  for (; i + 8 <= n; i += 8) {
    const __m256 lanes = _mm256_loadu_ps(x + i);
    const __m256 inside =
        _mm256_and_ps(_mm256_cmp_ps(lanes, lows, _CMP_GE_OQ), _mm256_cmp_ps(lanes, highs, _CMP_LT_OQ));
    unsigned mask = static_cast<unsigned>(_mm256_movemask_ps(inside));
    for (; mask; mask &= mask - 1) positions[count++] = static_cast<int32_t>(i) + __builtin_ctz(mask);
  }
#endif
  for (; i < n; ++i) {
    positions[count] = static_cast<int32_t>(i);
    count += (x[i] >= low) & (x[i] < high);
  }
  return count;
}

int64_t count_greater(const float* x, int64_t n, float threshold) {
  I32Lanes negated_counts{};  // a true comparison is -1; 2^31 vectors do not occur
  int64_t i = 0;
  for (; i + kNumLanes <= n; i += kNumLanes) negated_counts += load_lanes(x + i) > threshold;
  int64_t count = 0;
  int32_t lane_counts[kNumLanes];
  __builtin_memcpy(lane_counts, &negated_counts, sizeof lane_counts);
  for (int lane = 0; lane < kNumLanes; ++lane) count -= lane_counts[lane];
  for (; i < n; ++i) count += x[i] > threshold;
  return count;
}

void measure_at_least(const float* x, const float* weights, int64_t n, const float* thresholds, double* measures) {
  for (int j = 0; j < kNumThresholds; ++j) measures[j] = 0;
  for (int64_t start = 0; start < n; start += kStripeLength) {
    const int64_t end = start + kStripeLength < n ? start + kStripeLength : n;
    // Four thresholds at a time: with eight the sums no longer fit AVX2's registers.
    for (int first = 0; first < kNumThresholds; first += 4) {
      F32Lanes sum[4] = {};
      const auto add = [&](const F32Lanes& lanes, const F32Lanes& weight) __attribute__((always_inline)) {
        for (int j = 0; j < 4; ++j) sum[j] += select_lanes(lanes >= thresholds[first + j], weight, F32Lanes{});
      };
      int64_t i = start;
      for (; i + kNumLanes <= end; i += kNumLanes)
        add(load_lanes(x + i), weights ? load_lanes(weights + i) : all_lanes(1.0f));
      if (i < end)
        add(load_first_lanes(x + i, end - i, kMinusInfinity),
            weights ? load_first_lanes(weights + i, end - i, 0.0f) : all_lanes(1.0f));
      for (int j = 0; j < 4; ++j) measures[first + j] += sum_of_lanes(sum[j]);
    }
  }
}

void keep_at_least(const float* values, int64_t n, float threshold, float* weights, double* sums) {
  for (int64_t start = 0; start < n; start += kStripeLength) {
    const int64_t end = start + kStripeLength < n ? start + kStripeLength : n;
    F32Lanes sum{};
    int64_t i = start;
    for (; i + kNumLanes <= end; i += kNumLanes) {
      const F32Lanes weight = select_lanes(load_lanes(values + i) >= threshold, load_lanes(weights + i), F32Lanes{});
      store_lanes(weights + i, weight);
      sum += weight;
    }
    if (i < end) {
      const F32Lanes weight = select_lanes(load_first_lanes(values + i, end - i, kMinusInfinity) >= threshold,
                                           load_first_lanes(weights + i, end - i, 0.0f), F32Lanes{});
      store_first_lanes(weights + i, weight, end - i);
      sum += weight;
    }
    *sums++ = sum_of_lanes(sum);
  }
}

}  // namespace
}  // namespace partita
