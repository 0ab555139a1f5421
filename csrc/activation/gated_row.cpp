#include "activation/gated_row.h"

#include "activation/cpu/gated_kernels.h"
#include "core/check.h"
#include "core/cpu_features.h"

namespace partita {

void gated_activation_row(const float* gate, const float* up, GateActivation activation, int64_t n, float* out) {
  PARTITA_CHECK(activation != GateActivation::kNone, "activation: got none, wanted silu or gelu_tanh");
  const bool silu = activation == GateActivation::kSilu;
  switch (active_cpu_isa()) {
    case CpuIsa::kAvx512:
      return silu ? gated_silu_avx512(gate, up, n, out) : gated_gelu_tanh_avx512(gate, up, n, out);
    case CpuIsa::kAvx2:
      return silu ? gated_silu_avx2(gate, up, n, out) : gated_gelu_tanh_avx2(gate, up, n, out);
    case CpuIsa::kPortable:
      return silu ? gated_silu_portable(gate, up, n, out) : gated_gelu_tanh_portable(gate, up, n, out);
  }
}

}  // namespace partita
