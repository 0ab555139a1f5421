// What a device library (libpartita_cuda.so, libpartita_simt.so) exports: one C function that gives this table.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/gpu.h"
#include "core/kernel_registry.h"

namespace partita {

// Raised whenever Gpu, this struct or a kernel family's entry type changes shape: a library that was carried here from
// another build must not be opened by a kernel library that sees it differently.
constexpr int kDeviceLibraryVersion = 2;

// What the host execution offers beside: see csrc/simt/README.md. Null in a CUDA library.
struct SimtControls {
  // Order in which warps run, from the next launch on; 0: ascending.
  void (*set_seed)(uint64_t seed);
  // "gemm.cu:120": this barrier or wait does nothing, to see that a test notices; "" switches all on again.
  void (*set_disabled_site)(const std::string& site);
  // Barriers and waits that ran since the last call.
  std::vector<std::string> (*take_visited_sites)();
  // Launches, CUDA threads run, loads and stores checked, reports made; since the process began.
  struct Statistics {
    uint64_t num_launches, num_threads, num_checked_accesses, num_reports;
  };
  Statistics (*statistics)();
};

struct DeviceLibrary {
  int version;
  const char* world;    // "cuda", "simt"
  const char* toolkit;  // "13.0"; simt: the host compiler
  const char* targets;  // "80-real,89-real,90a-real,120-real"
  const KernelRegistry* registry;
  // Devices that can run; 0 with the reason where there is none. Never throws.
  int (*num_devices)(std::string* reason);
  // Throws std::runtime_error when the device cannot be opened.
  Gpu* (*open)(int ordinal);
  const SimtControls* simt;
};

using DeviceLibraryFunction = const DeviceLibrary* (*)();
constexpr const char* kDeviceLibrarySymbol = "partita_device_library";

}  // namespace partita
