// The body of rms_norm_row, compiled once per instruction set by rms_norm_<isa>.cpp.
#pragma once

#include "core/lanes16.h"

namespace partita {
namespace {

PARTITA_INLINE float sum_of_squares(const float* x, int64_t n) {
  F32Lanes even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kNumLanes <= n; i += 2 * kNumLanes) {
    const F32Lanes a = load_lanes(x + i), b = load_lanes(x + i + kNumLanes);
    even += a * a;
    odd += b * b;
  }
  if (i + kNumLanes <= n) {
    const F32Lanes a = load_lanes(x + i);
    even += a * a;
    i += kNumLanes;
  }
  if (i < n) {
    const F32Lanes b = load_first_lanes(x + i, n - i, 0.0f);
    odd += b * b;
  }
  return sum_of_lanes(even + odd);
}

template <bool kAdd>
PARTITA_INLINE void rms_norm_body(const float* x, const float* weight, float eps, int64_t n, float* y) {
  const float r = 1.0f / __builtin_sqrtf(sum_of_squares(x, n) / static_cast<float>(n) + eps);
  int64_t i = 0;
  for (; i + kNumLanes <= n; i += kNumLanes) {
    F32Lanes normed = (load_lanes(x + i) * r) * load_lanes(weight + i);
    if (kAdd) normed = load_lanes(y + i) + normed;
    store_lanes(y + i, normed);
  }
  for (; i < n; ++i) {
    const float normed = (x[i] * r) * weight[i];
    y[i] = kAdd ? y[i] + normed : normed;
  }
}

}  // namespace
}  // namespace partita
