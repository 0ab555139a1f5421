// A packed linear of a GPU as Python holds it.
#pragma once

#include <memory>

#include "core/gpu.h"
#include "gemm/gemm_gpu.h"

namespace partita::bindings {

// A linear and the device it lives on, which its arguments must share.
struct BoundLinear {
  std::shared_ptr<Gpu> gpu;
  std::shared_ptr<GpuPackedLinear> linear;
};

}  // namespace partita::bindings
