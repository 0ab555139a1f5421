// The body of gated_activation_row, compiled once per instruction set by gated_<isa>.cpp.
#pragma once

#include "core/lanes16.h"
#include "gemm/gemm.h"

namespace partita {
namespace {

// x * up / (1 + e^-z). Past |z| = 87 the quotient is x or (nearly) 0 to fp32; a NaN stays one through x.
PARTITA_INLINE F32Lanes times_sigmoid(const F32Lanes& x, const F32Lanes& z) {
  const F32Lanes clamped = min_lanes(max_lanes(-z, all_lanes(-87.0f)), all_lanes(87.0f));
  return x / (1.0f + exp_in_range(clamped));
}

template <GateActivation kActivation>
PARTITA_INLINE F32Lanes gated(const F32Lanes& gate, const F32Lanes& up) {
  if (kActivation == GateActivation::kSilu) return times_sigmoid(gate, gate) * up;
  const F32Lanes u = 0.7978845608028654f * (gate + 0.044715f * (gate * gate * gate));
  return times_sigmoid(gate, u + u) * up;
}

template <GateActivation kActivation>
PARTITA_INLINE void gated_body(const float* gate, const float* up, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kNumLanes <= n; i += kNumLanes)
    store_lanes(out + i, gated<kActivation>(load_lanes(gate + i), load_lanes(up + i)));
  if (i < n)
    store_first_lanes(
        out + i, gated<kActivation>(load_first_lanes(gate + i, n - i, 0.0f), load_first_lanes(up + i, n - i, 0.0f)),
        n - i);
}

}  // namespace
}  // namespace partita
