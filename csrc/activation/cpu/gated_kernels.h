// What activation/cpu/gated_<isa>.cpp define; gated_row.cpp chooses among them.
#pragma once

#include <cstdint>

namespace partita {

using GatedRowKernel = void(const float* gate, const float* up, int64_t n, float* out);

GatedRowKernel gated_silu_portable, gated_silu_avx2, gated_silu_avx512;
GatedRowKernel gated_gelu_tanh_portable, gated_gelu_tanh_avx2, gated_gelu_tanh_avx512;

}  // namespace partita
