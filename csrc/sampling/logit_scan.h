// Whole-vocabulary passes over one row of logits; one body, compiled per instruction set, the same bits on each.
//
// A *stripe* is 1024 consecutive logits seen as 64 vectors of 16 lanes. Per stripe the passes keep 16 lane results
// (the maximum of the 64 logits i, i + 16, i + 32 ...): no horizontal reduction in the loop, and the lane maxima are
// also what bounds the k-th largest logit from below.
#pragma once

#include <cstdint>

namespace partita {

constexpr int64_t kStripeLanes = 16;
constexpr int64_t kStripeLength = 1024;
constexpr int64_t num_stripes(int64_t n) { return (n + kStripeLength - 1) / kStripeLength; }
constexpr int64_t kCollectSlack = 16;  // entries past the last one that collect_range may overwrite

constexpr int kNumThresholds = 8;

struct LogitScan {
  // maxima: [num_stripes, 16], -infinity where a lane has no logit. False when the row holds a NaN.  x: [n]
  bool (*stripe_maxima)(const float* x, int64_t n, float* maxima);
  // weights_i = e^((x_i - max) * inverse_temperature), 0 below e^-87; sums: [num_stripes].  x, weights: [n]
  void (*stripe_weights)(const float* x, int64_t n, float max, float inverse_temperature, float* weights, double* sums);
  // The positions where low <= x_i < high, ascending; returns how many.  positions: [n + kCollectSlack]
  int64_t (*collect_range)(const float* x, int64_t n, float low, float high, int32_t* positions);
  int64_t (*count_greater)(const float* x, int64_t n, float threshold);
  // measures_j = the sum of weights_i over x_i >= thresholds_j; their number where weights is null.
  // thresholds, measures: [kNumThresholds]
  void (*measure_at_least)(const float* x, const float* weights, int64_t n, const float* thresholds, double* measures);
  // Zeroes weights_i where values_i < threshold and sums the stripes anew.  values may be weights.
  void (*keep_at_least)(const float* values, int64_t n, float threshold, float* weights, double* sums);
};

const LogitScan& active_logit_scan();  // of the active CPU ISA

}  // namespace partita
