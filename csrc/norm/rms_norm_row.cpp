#include "norm/rms_norm_row.h"

#include "core/cpu_features.h"
#include "norm/cpu/rms_norm_kernels.h"

namespace partita {

void rms_norm_row(const float* x, const float* weight, float eps, int64_t n, float* y) {
  switch (active_cpu_isa()) {
    case CpuIsa::kAvx512:
      return rms_norm_row_avx512(x, weight, eps, n, y);
    case CpuIsa::kAvx2:
      return rms_norm_row_avx2(x, weight, eps, n, y);
    case CpuIsa::kPortable:
      return rms_norm_row_portable(x, weight, eps, n, y);
  }
}

void rms_norm_add_row(const float* x, const float* weight, float eps, int64_t n, float* y) {
  switch (active_cpu_isa()) {
    case CpuIsa::kAvx512:
      return rms_norm_add_row_avx512(x, weight, eps, n, y);
    case CpuIsa::kAvx2:
      return rms_norm_add_row_avx2(x, weight, eps, n, y);
    case CpuIsa::kPortable:
      return rms_norm_add_row_portable(x, weight, eps, n, y);
  }
}

}  // namespace partita
