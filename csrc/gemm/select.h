// Which kernel family serves a linear, as data: every candidate with the reason it was taken or not.
#pragma once

#include <string>
#include <vector>

#include "gemm/gemm.h"
#include "gemm/kernels.h"

namespace partita {

struct KernelChoice {
  const TileKernels* kernels = nullptr;
  std::string name;    // "int8_avx512"
  std::string reason;  // one line per candidate
};

// For the active CPU ISA. Throws ValueError when nothing fits.
KernelChoice select_gemm_kernels(const std::vector<Weight>& segments, ActivationType requested);

}  // namespace partita
