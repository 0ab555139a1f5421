#include "activation/cpu/gated_kernel.h"
#include "activation/cpu/gated_kernels.h"

namespace partita {

void gated_silu_avx2(const float* gate, const float* up, int64_t n, float* out) {
  gated_body<GateActivation::kSilu>(gate, up, n, out);
}

void gated_gelu_tanh_avx2(const float* gate, const float* up, int64_t n, float* out) {
  gated_body<GateActivation::kGeluTanh>(gate, up, n, out);
}

}  // namespace partita
