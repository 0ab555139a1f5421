#include "activation/activation_gpu.h"

#include <stdexcept>

#include "core/check.h"
#include "core/gpu_library.h"

namespace partita {
namespace {

bool is_real(DType type) { return type == DType::kF32 || type == DType::kF16 || type == DType::kBF16; }
bool is_coded(DType type) { return type == DType::kI8 || type == DType::kE4M3; }

void check(const GatedActivationGpuParams& params) {
  PARTITA_CHECK(params.num_tokens >= 0 && params.num_tokens < (int64_t{1} << 31), "num_tokens: got ", params.num_tokens,
                ", wanted 0 to 2^31 - 1");
  PARTITA_CHECK(params.width > 0, "width: got ", params.width, ", wanted at least 1");
  PARTITA_CHECK(params.activation != GateActivation::kNone, "activation: got none, wanted silu or gelu_tanh");
  PARTITA_CHECK(is_real(params.in_type), "in: got dtype ", dtype_name(params.in_type),
                ", wanted float32, float16 or bfloat16");
  PARTITA_CHECK(is_real(params.out_type) || is_coded(params.out_type), "out: got dtype ", dtype_name(params.out_type),
                ", wanted float32, float16, bfloat16, int8 or float8_e4m3fn");
  check_row_codes(params.width, params.out_type, params.group, params.code_scale, params.out_scale, params.out_sum,
                  params.num_tokens == 0);
  if (params.num_tokens == 0) return;
  PARTITA_CHECK(params.in && params.out, "in, out: got a null pointer");
  PARTITA_CHECK(params.in_stride >= 2 * params.width || params.num_tokens == 1, "in: got a stride of ",
                params.in_stride, ", wanted at least 2 * width = ", 2 * params.width);
  PARTITA_CHECK(params.out_stride >= params.width || params.num_tokens == 1, "out: got a stride of ", params.out_stride,
                ", wanted at least width = ", params.width);
}

}  // namespace

void gated_activation_gpu(Gpu& gpu, const GatedActivationGpuParams& params, GpuStream stream) {
  check(params);
  if (params.num_tokens == 0) return;
  const auto* kernel = kernels_of(gpu).only<GatedActivationKernel>();
  if (!kernel) throw std::runtime_error("gated_activation: this device library was built without the kernel");
  // A width that is a multiple of 8 puts the up half at a multiple of a vector too.
  const RowSchedule schedule =
      schedule_row(params.width, is_row_aligned(params.in, params.in_stride, params.in_type) &&
                                     is_row_aligned(params.out, params.out_stride, params.out_type));
  kernel->launch(params, schedule, stream);
}

}  // namespace partita
