// PARTITA_CUDA_CHECK(cudaMalloc(...)): throws std::runtime_error (RuntimeError in Python) with the call and the
// runtime's words. For host code that is compiled with the CUDA toolkit only.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "core/check.h"

#define PARTITA_CUDA_CHECK(call)                                                                             \
  do {                                                                                                       \
    const cudaError_t error = (call);                                                                        \
    if (error != cudaSuccess)                                                                                \
      throw std::runtime_error(::partita::concat(#call, ": ", cudaGetErrorString(error), " (", error, ")")); \
  } while (0)
