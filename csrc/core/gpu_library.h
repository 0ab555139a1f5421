// Finds, opens and checks the device libraries that lie beside the kernel library.
#pragma once

#include <memory>
#include <string>

#include "core/device_library.h"

namespace partita {

struct GpuLibrary {
  std::string world;
  std::string path;                        // of the file that was opened or would be
  const DeviceLibrary* library = nullptr;  // null: not there, or refused
  int num_devices = 0;
  std::string reason;  // why no device can be opened, empty when one can
};

// "cuda" or "simt"; opened on the first call and kept for the life of the process. PARTITA_CUDA_LIBRARY names another
// file for "cuda" (a library built elsewhere). Throws std::invalid_argument for another world only.
const GpuLibrary& gpu_library(const std::string& world);

// Device `ordinal` of a world, shared by all who ask for it. Throws std::runtime_error with the reason where it cannot
// be had.
std::shared_ptr<Gpu> open_gpu(const std::string& world, int ordinal);

// The registry that holds a Gpu's kernels.
const KernelRegistry& kernels_of(const Gpu& gpu);

}  // namespace partita
