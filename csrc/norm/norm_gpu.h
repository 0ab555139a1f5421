// Rows between the linear layers on a GPU: RMS norm and conversion to what a GEMM reads, and the norm that is added to
// the residual. The contract of this folder's GPU half.
//
//   y_i = (x_i * r) * w_i,  r = 1 / sqrt(mean(x^2) + eps)     as on the CPU, but the mean is summed in another order:
//                                                             each thread its own values, then a tree over threads
// The order depends on the width alone, so a row gives the same bits whatever rows lie beside it. Everything after the
// norm is the CPU's arithmetic: equal normalised values give equal codes, scales and sums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "core/gpu.h"
#include "core/kernel_registry.h"

namespace partita {

// Rows whose largest magnitude is below this become zeros: as kMinAbsmax of gemm/kernels.h.
constexpr float kMinRowAbsmax = 1e-36f;

struct PrepareRowsParams {
  int64_t num_rows = 0;                // T
  int64_t width = 0;                   // K
  const void* in = nullptr;            // [T, K]
  DType in_type = DType::kF32;         // f32, f16 or bf16
  int64_t in_stride = 0;               // elements between rows
  const float* norm_weight = nullptr;  // [K]; null: no norm
  float norm_eps = 1e-6f;
  // f32, f16, bf16   y, rounded to nearest even
  // int8             round_to_nearest_even(y * (127 / absmax)), scale = absmax / 127
  // float8_e4m3fn    e4m3(y * (448 / absmax)),                  scale = absmax / 448
  // with absmax that of the row, or of each `group` neighbours of it. No absmax above kMinRowAbsmax: codes and scale
  // are 0. A NaN or infinity makes the scale one, and its own int8 code -128.
  void* out = nullptr;  // [T, K]; may be `in` where types and strides are equal
  DType out_type = DType::kF32;
  int64_t out_stride = 0;      // elements
  float* out_scale = nullptr;  // [T], or [T, K / group]; int8 and e4m3
  int32_t* out_sum = nullptr;  // the same shape: sums of the int8 codes; null: not wanted
  int64_t group = 0;           // 0: one scale per row; 32 or 128, a divisor of K
  // > 0: int8 and e4m3 codes of y / code_scale, one number known beforehand (a checkpoint's static scale) in the place
  // of every row's own: round(y * (1 / code_scale)), int8 held to -128..127 (a NaN: -128), e4m3 to +-448. No group.
  // out_scale may then be null; where it is not, it is set to code_scale.
  float code_scale = 0;
};

// Throws ValueError that names the field, and RuntimeError where the device's library lacks the kernel.
void prepare_rows(Gpu& gpu, const PrepareRowsParams& params, GpuStream stream);
// The schedule that prepare_rows chooses, with its reason: for logs and tests.
std::string describe_prepare_rows(const PrepareRowsParams& params);

struct NormAddGpuParams {
  int64_t num_rows = 0;                // T
  int64_t width = 0;                   // H
  const void* branch = nullptr;        // [T, H]
  DType branch_type = DType::kF32;     // f32, f16 or bf16
  int64_t branch_stride = 0;           // elements
  const float* norm_weight = nullptr;  // [H]
  float norm_eps = 1e-6f;
  float* residual = nullptr;    // [T, H], += norm(branch); not `branch`
  int64_t residual_stride = 0;  // elements
};
void norm_add_gpu(Gpu& gpu, const NormAddGpuParams& params, GpuStream stream);

constexpr int kMaxRowThreads = 512;
// How a thread block walks its row: items of eight neighbouring values, item i of thread t at 8 * (i * threads + t).
struct RowSchedule {
  int num_threads = 0;
  int num_items = 0;       // that a thread keeps in registers: 1, 2, 4, 8; 0: the row is read again for each pass
  bool is_vector = false;  // 16-byte accesses; else element by element
  std::string reason;
};
// is_aligned: is_row_aligned() of every array that is read or written by items.
RowSchedule schedule_row(int64_t width, bool is_aligned);
// Items of eight values can be moved by whole vectors in every row.
bool is_row_aligned(const void* rows, int64_t stride, DType type);
// Of an op whose out may be codes: throws ValueError unless group, code_scale, out_scale and out_sum fit out_type and
// width.
void check_row_codes(int64_t width, DType out_type, int64_t group, float code_scale, const float* out_scale,
                     const int32_t* out_sum, bool is_empty);

struct PrepareRowsKernel {
  static constexpr const char* kFamily = "prepare_rows";
  KernelInfo info;
  // adds: out (f32) += y
  void (*launch)(const PrepareRowsParams& params, bool adds, const RowSchedule& schedule, void* stream);
};

}  // namespace partita
