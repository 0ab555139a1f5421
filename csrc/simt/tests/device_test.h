// Kernels that exercise csrc/device one wrapper at a time, for tests/kernels/test_device.py. They are compiled in both
// worlds: what the twins compute on the host is what a GPU computes, and a test on a GPU says so. (csrc/simt/defects
// holds kernels with faults, for tests/kernels/test_simt.py, in the host's library alone.)
#pragma once

#include <cstdint>

#include "core/kernel_registry.h"

namespace partita {

struct DeviceTestParams {
  static constexpr int kMaxInputs = 4, kMaxNumbers = 4;
  const void* inputs[kMaxInputs];
  void* output;
  int64_t numbers[kMaxNumbers];  // each kernel says what they are
};

struct DeviceTestKernel {
  static constexpr const char* kFamily = "device_test";
  KernelInfo info;
  void (*launch)(const DeviceTestParams& params, void* stream);
};

}  // namespace partita
