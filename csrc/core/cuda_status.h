// What CUDA offers this process: what lies beside the kernel library, which driver and GPUs the machine has.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace partita {

struct CudaDevice {
  std::string name;
  int compute_capability_major = 0, compute_capability_minor = 0;
  int num_multiprocessors = 0;
  size_t memory_bytes = 0;
};

struct CudaStatus {
  bool is_compiled = false;  // this library holds CUDA kernels
  std::string toolkit;       // "13.0", or empty
  std::string targets;       // "80-virtual,90a-real", or empty
  bool has_driver = false;
  std::string driver;  // highest CUDA version the driver runs, "13.0"; empty without one
  std::string reason;  // why no kernel can run, empty when one can
  std::vector<CudaDevice> devices;

  bool can_run() const { return reason.empty(); }
};

// Asks the driver (libcuda.so.1, opened on the first call; the library does not link it). Never throws for a missing
// driver or GPU, also in a CPU-only build; takes some 0.1 s the first time where there is one.
const CudaStatus& cuda_status();

}  // namespace partita
