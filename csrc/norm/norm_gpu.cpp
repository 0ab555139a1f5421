#include "norm/norm_gpu.h"

#include <cmath>
#include <stdexcept>

#include "core/check.h"
#include "core/gpu_library.h"
#include "gemm/kernels.h"

namespace partita {
namespace {

static_assert(kMinRowAbsmax == kMinAbsmax, "equal codes on CPU and GPU");

bool is_real(DType type) { return type == DType::kF32 || type == DType::kF16 || type == DType::kBF16; }
bool is_coded(DType type) { return type == DType::kI8 || type == DType::kE4M3; }

RowSchedule schedule_of(const PrepareRowsParams& params) {
  return schedule_row(params.width, is_row_aligned(params.in, params.in_stride, params.in_type) &&
                                        is_row_aligned(params.out, params.out_stride, params.out_type) &&
                                        reinterpret_cast<uintptr_t>(params.norm_weight) % 16 == 0);
}

void check(const PrepareRowsParams& params, const char* in, const char* out) {
  PARTITA_CHECK(params.num_rows >= 0 && params.num_rows < (int64_t{1} << 31), "num_rows: got ", params.num_rows,
                ", wanted 0 to 2^31 - 1");
  PARTITA_CHECK(params.width > 0, "width: got ", params.width, ", wanted at least 1");
  PARTITA_CHECK(is_real(params.in_type), in, ": got dtype ", dtype_name(params.in_type),
                ", wanted float32, float16 or bfloat16");
  PARTITA_CHECK(is_real(params.out_type) || is_coded(params.out_type), out, ": got dtype ", dtype_name(params.out_type),
                ", wanted float32, float16, bfloat16, int8 or float8_e4m3fn");
  PARTITA_CHECK(std::isfinite(params.norm_eps) && params.norm_eps >= 0, "norm_eps: got ", params.norm_eps,
                ", wanted a finite number of at least 0");
  check_row_codes(params.width, params.out_type, params.group, params.code_scale, params.out_scale, params.out_sum,
                  params.num_rows == 0);
  if (params.num_rows == 0) return;
  PARTITA_CHECK(params.in && params.out, in, ", ", out, ": got a null pointer");
  PARTITA_CHECK(params.in_stride >= params.width || params.num_rows == 1, in, ": got a stride of ", params.in_stride,
                ", wanted at least width = ", params.width);
  PARTITA_CHECK(params.out_stride >= params.width || params.num_rows == 1, out, ": got a stride of ", params.out_stride,
                ", wanted at least width = ", params.width);
}

void launch(Gpu& gpu, const PrepareRowsParams& params, bool adds, GpuStream stream) {
  if (params.num_rows == 0) return;
  const auto* kernel = kernels_of(gpu).only<PrepareRowsKernel>();
  if (!kernel) throw std::runtime_error("prepare_rows: this device library was built without the kernel");
  kernel->launch(params, adds, schedule_of(params), stream);
}

}  // namespace

bool is_row_aligned(const void* rows, int64_t stride, DType type) {
  const auto item_bytes = static_cast<int64_t>(8 * dtype_bytes(type));
  const int64_t vector_bytes = item_bytes < 16 ? item_bytes : 16;
  return reinterpret_cast<uintptr_t>(rows) % vector_bytes == 0 &&
         stride * static_cast<int64_t>(dtype_bytes(type)) % vector_bytes == 0;
}

void check_row_codes(int64_t width, DType out_type, int64_t group, float code_scale, const float* out_scale,
                     const int32_t* out_sum, bool is_empty) {
  PARTITA_CHECK(
      std::isfinite(code_scale) && code_scale >= 0 && std::isfinite(1.0f / (code_scale > 0 ? code_scale : 1.0f)),
      "code_scale: got ", code_scale, ", wanted 0 (each row's own) or a normal positive number");
  PARTITA_CHECK(code_scale == 0 || (is_coded(out_type) && group == 0), "code_scale: got ", code_scale, " with dtype ",
                dtype_name(out_type), " and group ", group, ", wanted int8 or float8_e4m3fn and no group");
  PARTITA_CHECK(group == 0 || group == 32 || group == 128, "group: got ", group,
                ", wanted 0 (one scale per row), 32 or 128");
  PARTITA_CHECK(group == 0 || is_coded(out_type), "group: got ", group, " with dtype ", dtype_name(out_type),
                ", wanted 0: only int8 and float8_e4m3fn have scales");
  PARTITA_CHECK(group == 0 || width % group == 0, "width: got ", width, ", wanted a multiple of group = ", group);
  PARTITA_CHECK(!out_sum || out_type == DType::kI8, "out_sum: given with dtype ", dtype_name(out_type),
                ", wanted none: only int8 codes have sums");
  PARTITA_CHECK(!out_scale || is_coded(out_type), "out_scale: given with dtype ", dtype_name(out_type),
                ", wanted none: only int8 and float8_e4m3fn have scales");
  PARTITA_CHECK(!is_coded(out_type) || out_scale || code_scale > 0 || is_empty,
                "out_scale: got none, wanted an array for dtype ", dtype_name(out_type));
}

RowSchedule schedule_row(int64_t width, bool is_aligned) {
  constexpr int64_t kItemValues = 8;
  RowSchedule schedule;
  schedule.is_vector = is_aligned && width % kItemValues == 0;
  const int64_t items = (width + kItemValues - 1) / kItemValues;
  // Few items a thread, for the latency of a step of few rows; kMaxRowThreads let three blocks or more share an SM.
  const auto threads_for = [&](int64_t num_items) {
    return static_cast<int>(((items + num_items - 1) / num_items + 31) / 32 * 32);
  };
  for (const int num_items : {1, 2, 4, 8}) {
    if (threads_for(num_items) > kMaxRowThreads) continue;
    schedule.num_items = num_items;
    schedule.num_threads = threads_for(num_items);
    break;
  }
  if (schedule.num_items == 0) schedule.num_threads = kMaxRowThreads;
  schedule.reason = concat(
      schedule.num_threads, " threads a row, ",
      schedule.num_items ? concat(schedule.num_items, " x 8 values each in registers")
                         : concat("wider than 32768 values: read again for each pass"),
      schedule.is_vector ? ", vectors of 16 bytes" : ", element by element (width, stride or address not aligned)");
  return schedule;
}

void prepare_rows(Gpu& gpu, const PrepareRowsParams& params, GpuStream stream) {
  check(params, "in", "out");
  launch(gpu, params, false, stream);
}

std::string describe_prepare_rows(const PrepareRowsParams& params) {
  check(params, "in", "out");
  return schedule_of(params).reason;
}

void norm_add_gpu(Gpu& gpu, const NormAddGpuParams& params, GpuStream stream) {
  PARTITA_CHECK(params.norm_weight || params.num_rows == 0, "norm_weight: got a null pointer");
  PARTITA_CHECK(params.residual != params.branch || params.num_rows == 0,
                "residual: is `branch`, wanted another array");
  PrepareRowsParams rows;
  rows.num_rows = params.num_rows;
  rows.width = params.width;
  rows.in = params.branch;
  rows.in_type = params.branch_type;
  rows.in_stride = params.branch_stride;
  rows.norm_weight = params.norm_weight;
  rows.norm_eps = params.norm_eps;
  rows.out = params.residual;
  rows.out_type = DType::kF32;
  rows.out_stride = params.residual_stride;
  check(rows, "branch", "residual");
  launch(gpu, rows, true, stream);
}

}  // namespace partita
