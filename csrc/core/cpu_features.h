// Which instruction set the CPU kernels use on this machine.
#pragma once

#include <string>

namespace partita {

// Levels, each holding the ones before. One binary carries all; cpuid picks at load.
//   kPortable   plain C++ (the compiler's baseline)
//   kAvx2       AVX2 + FMA + F16C
//   kAvx512     AVX-512 F/BW/DQ/VL + VNNI + BF16 (Cooper Lake, Sapphire Rapids, Zen 4 and later)
enum class CpuIsa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

const char* cpu_isa_name(CpuIsa isa);  // "portable", "avx2", "avx512"

// The best level that this machine executes.
CpuIsa detected_cpu_isa();

// The level in use: the detected one, or the lower one that PARTITA_CPU_ISA names.
// Throws std::invalid_argument when the variable names an unknown level or one the machine lacks.
CpuIsa active_cpu_isa();

// For tests: replaces the active level; throws as above.
void set_active_cpu_isa(const std::string& name);

struct CpuFlags {
  bool avx2, fma, f16c, avx512f, avx512bw, avx512dq, avx512vl, avx512vnni, avx512bf16, avx_vnni, amx_int8, amx_bf16;
};
CpuFlags cpu_flags();

}  // namespace partita
