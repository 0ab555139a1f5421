#include "norm/cpu/rms_norm_kernel.h"
#include "norm/cpu/rms_norm_kernels.h"

namespace partita {

void rms_norm_row_avx512(const float* x, const float* weight, float eps, int64_t n, float* y) {
  rms_norm_body<false>(x, weight, eps, n, y);
}

void rms_norm_add_row_avx512(const float* x, const float* weight, float eps, int64_t n, float* y) {
  rms_norm_body<true>(x, weight, eps, n, y);
}

}  // namespace partita
