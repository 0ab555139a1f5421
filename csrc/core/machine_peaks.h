// What this machine reaches at most: the yardstick of every kernel bench and of `partita doctor`.
#pragma once

namespace partita {

struct MachinePeaks {
  double int8_gops = 0;           // 1e9 int8 multiply or add per second (u8 x s8 dots, register operands)
  double bf16_gflops = 0;         // 1e9 bf16 multiply or add per second; 0 where the ISA in use has no bf16 dot
  double fp32_gflops = 0;         // 1e9 fp32 multiply or add per second
  double read_gb_per_second = 0;  // 1e9 bytes per second read from a buffer larger than the caches
};

// Measures on num_threads threads (<= 0: all usable cores) with the active CPU ISA's instructions, in about `seconds`.
// The best of several short windows, so that a moment's other load does not lower a peak.
MachinePeaks measure_machine_peaks(int num_threads, double seconds);

}  // namespace partita
