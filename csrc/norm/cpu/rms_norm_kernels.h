// What norm/cpu/rms_norm_<isa>.cpp define; rms_norm_row.cpp chooses among them.
#pragma once

#include <cstdint>

namespace partita {

using RmsNormRowKernel = void(const float* x, const float* weight, float eps, int64_t n, float* y);

RmsNormRowKernel rms_norm_row_portable, rms_norm_row_avx2, rms_norm_row_avx512;
RmsNormRowKernel rms_norm_add_row_portable, rms_norm_add_row_avx2, rms_norm_add_row_avx512;

}  // namespace partita
