// One thread block a row: sum of squares, largest magnitude and codes in one visit to memory, the row waiting in
// registers between the passes (or, where it is too wide for them, read again from L1 and L2).
#include "norm/cuda/row_values.cuh"

namespace partita {
namespace {

using namespace rows;

struct Params {
  PrepareRowsParams rows;
  bool adds;
  bool is_vector;
};

// kNumItems: of a thread, kept in registers; 0: any number, read again for each pass. One block an SM as the least:
// left to itself ptxas held two items to 40 registers on sm_120, for three blocks, and spilled.
template <int kNumItems>
__global__ void __launch_bounds__(kMaxRowThreads, 1) prepare_row_kernel(const __grid_constant__ Params params) {
  const PrepareRowsParams& p = params.rows;
  RowScratch& scratch = device::dynamic_shared<RowScratch>();
  const int64_t row_idx = blockIdx.x, width = p.width;
  const int64_t step = int64_t{blockDim.x} * kItemValues, first = int64_t{threadIdx.x} * kItemValues;
  const bool is_vector = params.is_vector;
  const auto* in = static_cast<const std::byte*>(p.in) + row_idx * p.in_stride * dtype_bytes(p.in_type);
  auto* out = static_cast<std::byte*>(p.out) + row_idx * p.out_stride * dtype_bytes(p.out_type);
  float inverse_rms = 1.0f;

  const auto normalise = [&](float (&x)[kItemValues], int64_t at) {
    if (!p.norm_weight) return;
    float weight[kItemValues];
    load_constant_item(weight, p.norm_weight, at, width, is_vector);
#pragma unroll
    for (int j = 0; j < kItemValues; ++j) x[j] = __fmul_rn(__fmul_rn(x[j], inverse_rms), weight[j]);
  };
  // ---- load
  float kept[kNumItems > 0 ? kNumItems : 1][kItemValues];
#pragma unroll
  for (int i = 0; i < kNumItems; ++i)
    if (first + i * step < width) load_item(kept[i], in, p.in_type, first + i * step, width, is_vector);
  // body(x, at) over the thread's items. is_normal: x is y already where it is kept, and is made so where it is not.
  const auto for_each_item = [&](bool is_normal, auto&& body) {
    if constexpr (kNumItems > 0) {
#pragma unroll
      for (int i = 0; i < kNumItems; ++i)
        if (first + i * step < width) body(kept[i], first + i * step);
    } else {
      for (int64_t at = first; at < width; at += step) {
        float x[kItemValues];
        load_item(x, in, p.in_type, at, width, is_vector);
        if (is_normal) normalise(x, at);
        body(x, at);
      }
    }
  };

  // ---- norm
  if (p.norm_weight) {
    float sum = 0.0f;
    for_each_item(false, [&](float (&x)[kItemValues], int64_t) {
#pragma unroll
      for (int j = 0; j < kItemValues; ++j) sum = __fadd_rn(sum, __fmul_rn(x[j], x[j]));
    });
    sum = reduce_block(sum, 0.0f, scratch.sums, [](float a, float b) { return __fadd_rn(a, b); });
    inverse_rms = 1.0f / sqrtf(__fadd_rn(sum / static_cast<float>(width), p.norm_eps));
    if constexpr (kNumItems > 0) for_each_item(false, normalise);
  }

  if (params.adds) {
    for_each_item(true, [&](float (&x)[kItemValues], int64_t at) {
      float before[kItemValues];
      load_item(before, out, DType::kF32, at, width, is_vector);
#pragma unroll
      for (int j = 0; j < kItemValues; ++j) x[j] = __fadd_rn(before[j], x[j]);
      store_item(x, out, DType::kF32, at, width, is_vector);
    });
    return;
  }
  emit_row([&](auto&& body) { for_each_item(true, body); }, target_of(p), row_idx, width, is_vector, scratch);
}

void launch_prepare_rows(const PrepareRowsParams& rows, bool adds, const RowSchedule& schedule, void* stream) {
  const Params params{rows, adds, schedule.is_vector};
  const device::Dim3 grid{static_cast<unsigned>(rows.num_rows)}, block{static_cast<unsigned>(schedule.num_threads)};
  const auto run = [&](auto kernel) {
    device::launch("prepare_rows", kernel, grid, block, sizeof(RowScratch), stream, params);
  };
  switch (schedule.num_items) {
    case 1:
      return run(prepare_row_kernel<1>);
    case 2:
      return run(prepare_row_kernel<2>);
    case 4:
      return run(prepare_row_kernel<4>);
    case 8:
      return run(prepare_row_kernel<8>);
    default:
      return run(prepare_row_kernel<0>);
  }
}

const KernelRegistration<PrepareRowsKernel> kRegistered({{"prepare_rows", ""}, &launch_prepare_rows});

}  // namespace
}  // namespace partita
