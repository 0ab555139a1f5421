// The gated activation on a GPU.
#pragma once

#include "activation/activation.h"

namespace partita {

// Copies `in` to the first GPU, runs there and copies `out` back; all pointers are host memory. Throws
// std::runtime_error with the reason where no CUDA kernel can run, or with the call that failed.
void run_gated_activation_on_gpu(const GatedActivationParams& params);

// Launches the kernel over device memory on a stream (a cudaStream_t; null: the default one) and returns at once with
// the launch's cudaError_t. In a CUDA build only. (activation/cuda/gated_activation.cu)
int launch_gated_activation(const GatedActivationParams& params, void* stream);

}  // namespace partita
