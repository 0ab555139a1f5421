#include "core/cpu_features.h"

#include <atomic>
#include <cstdlib>

#include "core/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace partita {
namespace {

#if defined(__x86_64__)
uint64_t enabled_state_components() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}
#endif

CpuIsa parse_isa(const std::string& name) {
  for (CpuIsa isa : {CpuIsa::kPortable, CpuIsa::kAvx2, CpuIsa::kAvx512})
    if (name == cpu_isa_name(isa)) return isa;
  throw_value_error("PARTITA_CPU_ISA: got '", name, "', wanted portable, avx2 or avx512");
}

CpuIsa checked_isa(const std::string& name) {
  const CpuIsa isa = parse_isa(name);
  PARTITA_CHECK(isa <= detected_cpu_isa(), "PARTITA_CPU_ISA: got '", name, "', but this machine goes up to '",
                cpu_isa_name(detected_cpu_isa()), "'");
  return isa;
}

std::atomic<int> g_active_isa{-1};

}  // namespace

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kPortable:
      return "portable";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
  }
  return "?";
}

CpuFlags cpu_flags() {
  CpuFlags flags{};
#if defined(__x86_64__)
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return flags;
  const bool has_xsave = (c >> 27) & 1;
  const uint64_t state = has_xsave ? enabled_state_components() : 0;
  const bool ymm = (state & 0x6) == 0x6;
  const bool zmm = (state & 0xe6) == 0xe6;
  const bool tile = (state & 0x60000) == 0x60000;
  flags.fma = ymm && ((c >> 12) & 1);
  flags.f16c = ymm && ((c >> 29) & 1);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return flags;
  flags.avx2 = ymm && ((b >> 5) & 1);
  flags.avx512f = zmm && ((b >> 16) & 1);
  flags.avx512dq = zmm && ((b >> 17) & 1);
  flags.avx512bw = zmm && ((b >> 30) & 1);
  flags.avx512vl = zmm && ((b >> 31) & 1);
  flags.avx512vnni = zmm && ((c >> 11) & 1);
  flags.amx_bf16 = tile && ((d >> 22) & 1);
  flags.amx_int8 = tile && ((d >> 25) & 1);
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    flags.avx_vnni = ymm && ((a >> 4) & 1);
    flags.avx512bf16 = zmm && ((a >> 5) & 1);
  }
#endif
  return flags;
}

CpuIsa detected_cpu_isa() {
  static const CpuIsa isa = [] {
    const CpuFlags f = cpu_flags();
    if (f.avx2 && f.fma && f.f16c && f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl && f.avx512vnni &&
        f.avx512bf16)
      return CpuIsa::kAvx512;
    if (f.avx2 && f.fma && f.f16c) return CpuIsa::kAvx2;
    return CpuIsa::kPortable;
  }();
  return isa;
}

CpuIsa active_cpu_isa() {
  int active = g_active_isa.load(std::memory_order_relaxed);
  if (active < 0) {
    const char* forced = std::getenv("PARTITA_CPU_ISA");
    active = static_cast<int>(forced && *forced ? checked_isa(forced) : detected_cpu_isa());
    g_active_isa.store(active, std::memory_order_relaxed);
  }
  return static_cast<CpuIsa>(active);
}

void set_active_cpu_isa(const std::string& name) {
  g_active_isa.store(static_cast<int>(checked_isa(name)), std::memory_order_relaxed);
}

}  // namespace partita
