// Gated activation over the rows of a step on a GPU, unfused: for where no GEMM epilogue did it, or where its codes are
// the next layer's input. The contract of this folder's GPU half.
#pragma once

#include <cstdint>

#include "activation/activation.h"
#include "core/dtype.h"
#include "core/gpu.h"
#include "norm/norm_gpu.h"

namespace partita {

struct GatedActivationGpuParams {
  int64_t num_tokens = 0;       // T
  int64_t width = 0;            // F
  const void* in = nullptr;     // [T, 2F]: gate, then up
  DType in_type = DType::kF32;  // f32, f16 or bf16
  int64_t in_stride = 0;        // elements between tokens
  // out_type f32: the CPU's bits. Other types are computed with the special function unit's exponential and reciprocal
  // (relative 2^-21 together), so an int8 code may differ from the CPU's by one.
  // Codes, scales, sums, groups and code_scale as PrepareRowsParams has them.
  void* out = nullptr;  // [T, F]
  DType out_type = DType::kF32;
  int64_t out_stride = 0;
  float* out_scale = nullptr;  // [T], or [T, F / group]
  int32_t* out_sum = nullptr;
  int64_t group = 0;
  float code_scale = 0;
  GateActivation activation = GateActivation::kSilu;
};

// Throws ValueError that names the field, and RuntimeError where the device's library lacks the kernel.
void gated_activation_gpu(Gpu& gpu, const GatedActivationGpuParams& params, GpuStream stream);

struct GatedActivationKernel {
  static constexpr const char* kFamily = "gated_activation";
  KernelInfo info;
  void (*launch)(const GatedActivationGpuParams& params, const RowSchedule& schedule, void* stream);
};

}  // namespace partita
