// RMS norm of one row: shared by the norm op and by PackedLinear::prepare_row.
#pragma once

#include <cstdint>

namespace partita {

// y_i = (x_i * r) * weight_i,  r = 1 / sqrt(mean(x^2) + eps).  x, weight, y: [n]; y may be x.
// The mean is summed in 32 fixed partial sums without fused multiply-add, so a row gives the same bits on every
// instruction set and whatever rows lie beside it.
void rms_norm_row(const float* x, const float* weight, float eps, int64_t n, float* y);

// y_i += the same ("norm after, then add", Gemma's post-norms).  y must not be x.
void rms_norm_add_row(const float* x, const float* weight, float eps, int64_t n, float* y);

}  // namespace partita
