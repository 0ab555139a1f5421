// One thread block a row: f(gate) * up stays in registers until the row's largest magnitude is known, or goes straight
// out as floats.
#include "activation/activation_gpu.h"
#include "device/ptx_math.cuh"
#include "norm/cuda/row_values.cuh"

namespace partita {
namespace {

using namespace rows;

struct Params {
  GatedActivationGpuParams op;
  bool is_vector;
};

// core/lanes16.h, exp_in_range: the same operations in the same order, none fused.
__device__ __forceinline__ float exp_in_range(float x) {
  constexpr float kRoundingShift = 12582912.0f;
  constexpr int32_t kRoundingShiftBits = 0x4b400000;
  const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896341f), kRoundingShift);
  const float n = __fadd_rn(shifted, -kRoundingShift);
  float r = __fadd_rn(x, -__fmul_rn(n, 0.693359375f));
  r = __fadd_rn(r, -__fmul_rn(n, -2.12194440e-4f));
  float q = __fadd_rn(__fmul_rn(r, 0.0013814539f), 0.008368745f);
  q = __fadd_rn(__fmul_rn(q, r), 0.04166839f);
  q = __fadd_rn(__fmul_rn(q, r), 0.16666521f);
  q = __fadd_rn(__fmul_rn(q, r), 0.49999994f);
  const float e_r = __fadd_rn(__fadd_rn(__fmul_rn(q, __fmul_rn(r, r)), r), 1.0f);
  return __int_as_float(__float_as_int(e_r) + ((__float_as_int(shifted) - kRoundingShiftBits) << 23));
}

// x / (1 + e^-z).  The clamp keeps a NaN z out of the exponential; the NaN stays one through x.
template <bool kIsExact>
__device__ __forceinline__ float times_sigmoid(float x, float z) {
  if constexpr (kIsExact) {
    const float low = -z > -87.0f ? -z : -87.0f;
    return x / __fadd_rn(1.0f, exp_in_range(low < 87.0f ? low : 87.0f));
  } else {
    // 2^126 keeps the reciprocal above what is flushed to zero.
    const float power = fminf(-1.44269504088896341f * z, 126.0f);
    return x * device::rcp_approx(1.0f + device::ex2_approx(power));
  }
}

template <bool kIsExact>
__device__ __forceinline__ float gated(float gate, float up, GateActivation activation) {
  if (activation == GateActivation::kSilu) return __fmul_rn(times_sigmoid<kIsExact>(gate, gate), up);
  const float cube = __fmul_rn(__fmul_rn(gate, gate), gate);
  const float u = __fmul_rn(0.7978845608028654f, __fadd_rn(gate, __fmul_rn(0.044715f, cube)));
  return __fmul_rn(times_sigmoid<kIsExact>(gate, __fadd_rn(u, u)), up);
}

// kNumItems: of a thread, kept in registers; 0: any number, computed again for each pass.
template <int kNumItems, bool kIsExact>
__global__ void __launch_bounds__(kMaxRowThreads, 1) gated_activation_kernel(const __grid_constant__ Params params) {
  const GatedActivationGpuParams& p = params.op;
  RowScratch& scratch = device::dynamic_shared<RowScratch>();
  const int64_t row_idx = blockIdx.x, width = p.width;
  const int64_t step = int64_t{blockDim.x} * kItemValues, first = int64_t{threadIdx.x} * kItemValues;
  const bool is_vector = params.is_vector;
  const auto item_bytes = static_cast<int64_t>(dtype_bytes(p.in_type));
  const auto* gate_row = static_cast<const std::byte*>(p.in) + row_idx * p.in_stride * item_bytes;
  const auto* up_row = gate_row + width * item_bytes;

  const auto load = [&](float (&x)[kItemValues], int64_t at) {
    float up[kItemValues];
    load_item(x, gate_row, p.in_type, at, width, is_vector);
    load_item(up, up_row, p.in_type, at, width, is_vector);
#pragma unroll
    for (int j = 0; j < kItemValues; ++j) x[j] = gated<kIsExact>(x[j], up[j], p.activation);
  };
  float kept[kNumItems > 0 ? kNumItems : 1][kItemValues];
#pragma unroll
  for (int i = 0; i < kNumItems; ++i)
    if (first + i * step < width) load(kept[i], first + i * step);
  const auto for_each_item = [&](auto&& body) {
    if constexpr (kNumItems > 0) {
#pragma unroll
      for (int i = 0; i < kNumItems; ++i)
        if (first + i * step < width) body(kept[i], first + i * step);
    } else {
      for (int64_t at = first; at < width; at += step) {
        float x[kItemValues];
        load(x, at);
        body(x, at);
      }
    }
  };
  emit_row(for_each_item, target_of(p), row_idx, width, is_vector, scratch);
}

template <bool kIsExact>
void launch_items(const Params& params, const RowSchedule& schedule, void* stream) {
  const device::Dim3 grid{static_cast<unsigned>(params.op.num_tokens)};
  const device::Dim3 block{static_cast<unsigned>(schedule.num_threads)};
  const auto run = [&](auto kernel) {
    device::launch("gated_activation", kernel, grid, block, sizeof(RowScratch), stream, params);
  };
  switch (schedule.num_items) {
    case 1:
      return run(gated_activation_kernel<1, kIsExact>);
    case 2:
      return run(gated_activation_kernel<2, kIsExact>);
    case 4:
      return run(gated_activation_kernel<4, kIsExact>);
    case 8:
      return run(gated_activation_kernel<8, kIsExact>);
    default:
      return run(gated_activation_kernel<0, kIsExact>);
  }
}

void launch_gated_activation(const GatedActivationGpuParams& op, const RowSchedule& schedule, void* stream) {
  const Params params{op, schedule.is_vector};
  if (op.out_type == DType::kF32)
    launch_items<true>(params, schedule, stream);
  else
    launch_items<false>(params, schedule, stream);
}

const KernelRegistration<GatedActivationKernel> kRegistered({{"gated_activation", ""}, &launch_gated_activation});

}  // namespace
}  // namespace partita
