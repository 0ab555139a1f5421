// The gated activation of one row: shared by the activation op and by GEMM epilogues that want it.
#pragma once

#include <cstdint>

#include "gemm/gemm.h"

namespace partita {

// out_i = f(gate_i) * up_i.  gate, up, out: [n]; out may be gate or up.
//   kSilu      f(x) = x / (1 + e^-x)
//   kGeluTanh  f(x) = x (1 + tanh u) / 2 = x / (1 + e^-2u),  u = sqrt(2/pi) (x + 0.044715 x^3)
// Same bits on every instruction set. kNone is a ValueError.
void gated_activation_row(const float* gate, const float* up, GateActivation activation, int64_t n, float* out);

}  // namespace partita
