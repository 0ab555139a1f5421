// Gated activation over the rows of a step, unfused: the contract of this folder. (Inside a model the GEMM epilogue
// does it; this op serves where gate and up come from elsewhere, and as the epilogue's reference.)
#pragma once

#include <cstdint>
#include <string>

#include "gemm/gemm.h"

namespace partita {

const char* gate_activation_name(GateActivation activation);    // "none", "silu", "gelu_tanh"
GateActivation parse_gate_activation(const std::string& name);  // "silu" or "gelu_tanh"; else ValueError

struct GatedActivationParams {
  int64_t num_tokens = 0;     // T
  int64_t width = 0;          // F
  const float* in = nullptr;  // [T, 2F]: gate, then up
  int64_t in_stride = 0;      // floats between tokens
  float* out = nullptr;       // [T, F]
  int64_t out_stride = 0;     // floats
  GateActivation activation = GateActivation::kSilu;
};

// Throws ValueError that names the field.
void activation_check(const GatedActivationParams& params);

// Chunks are runs of whole rows, of a length that depends on `width` alone; any order, any worker.
int64_t activation_num_chunks(const GatedActivationParams& params);
void activation_run_chunk(const GatedActivationParams& params, int64_t chunk);

}  // namespace partita
