#include "activation/activation.h"

#include <algorithm>

#include "activation/gated_row.h"
#include "core/check.h"

namespace partita {
namespace {

int64_t rows_per_chunk(int64_t width) { return std::max<int64_t>(1, 4096 / width); }

}  // namespace

const char* gate_activation_name(GateActivation activation) {
  switch (activation) {
    case GateActivation::kNone:
      return "none";
    case GateActivation::kSilu:
      return "silu";
    case GateActivation::kGeluTanh:
      return "gelu_tanh";
  }
  return "?";
}

GateActivation parse_gate_activation(const std::string& name) {
  for (GateActivation activation : {GateActivation::kSilu, GateActivation::kGeluTanh})
    if (name == gate_activation_name(activation)) return activation;
  throw_value_error("activation: got '", name, "', wanted silu or gelu_tanh");
}

void activation_check(const GatedActivationParams& params) {
  PARTITA_CHECK(params.num_tokens >= 0, "num_tokens: got ", params.num_tokens, ", wanted at least 0");
  PARTITA_CHECK(params.width > 0, "width: got ", params.width, ", wanted at least 1");
  PARTITA_CHECK(params.activation != GateActivation::kNone, "activation: got none, wanted silu or gelu_tanh");
  if (params.num_tokens == 0) return;
  PARTITA_CHECK(params.in && params.out, "in, out: got a null pointer");
  PARTITA_CHECK(params.in_stride >= 2 * params.width || params.num_tokens == 1, "in_stride: got ", params.in_stride,
                ", wanted at least 2 * width = ", 2 * params.width);
  PARTITA_CHECK(params.out_stride >= params.width || params.num_tokens == 1, "out_stride: got ", params.out_stride,
                ", wanted at least width = ", params.width);
}

int64_t activation_num_chunks(const GatedActivationParams& params) {
  const int64_t rows = rows_per_chunk(params.width);
  return (params.num_tokens + rows - 1) / rows;
}

void activation_run_chunk(const GatedActivationParams& params, int64_t chunk) {
  const int64_t rows = rows_per_chunk(params.width);
  const int64_t end = std::min(params.num_tokens, (chunk + 1) * rows);
  for (int64_t t = chunk * rows; t < end; ++t) {
    const float* gate = params.in + t * params.in_stride;
    gated_activation_row(gate, gate + params.width, params.activation, params.width,
                         params.out + t * params.out_stride);
  }
}

}  // namespace partita
