// Adds up the partial results of rows that several items share, in the order of the plan's parts: the same bits
// whatever ran first. One warp for each (token, query head).
#include "attention/cuda/attend_rows.cuh"
#include "device/launch.cuh"
#include "device/ptx_math.cuh"

namespace partita {
namespace {

constexpr int kWarps = 4;

template <int kPerLane>
__global__ void __launch_bounds__(kWarps* device::kWarpSize)
    attend_merge_kernel(const __grid_constant__ AttendKernelParams params) {
  const int warp = static_cast<int>(threadIdx.x) / device::kWarpSize;
  const int lane = static_cast<int>(device::lane_idx());
  const int first_element = lane * kPerLane;
  const int64_t num_rows = int64_t{params.num_merges[0]} * params.group;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + warp; row < num_rows; row += int64_t{gridDim.x} * kWarps) {
    const GpuAttendMerge merge = params.merges[row / params.group];
    const int head = static_cast<int>(row % params.group);
    float max = kNegativeInfinity;
    for (int part = lane; part < merge.num_parts; part += device::kWarpSize)
      max = fmaxf(max, params.partial_sums[2 * int64_t{params.parts[merge.first_part + part] + head}]);
#pragma unroll
    for (int stride = 16; stride > 0; stride /= 2) max = fmaxf(max, __shfl_xor_sync(device::kFullWarp, max, stride));

    float out[kPerLane] = {};
    float sum = 0;
    for (int part = 0; part < merge.num_parts; ++part) {
      const int64_t partial = params.parts[merge.first_part + part] + head;
      const float part_max = params.partial_sums[2 * partial];
      if (part_max == kNegativeInfinity) continue;  // nothing of this part was visible
      const float weight = device::ex2_approx(part_max - max);
      sum = fmaf(weight, params.partial_sums[2 * partial + 1], sum);
      const float* partial_out = params.partial_out + partial * params.head_dim;
#pragma unroll
      for (int i = 0; i < kPerLane; i += 2) {
        if (first_element + i >= params.head_dim) continue;
        const uint2 pair = device::load_8(partial_out + first_element + i);
        out[i] = fmaf(weight, __uint_as_float(pair.x), out[i]);
        out[i + 1] = fmaf(weight, __uint_as_float(pair.y), out[i + 1]);
      }
    }
    store_out_row<kPerLane>(params, merge.token, merge.kv_head * params.group + head, out, sum);
  }
}

void launch_attend_merge(const AttendKernelParams& params, int num_ctas, void* stream) {
  const auto start = [&](auto* kernel) {
    device::launch("attend_merge", kernel, {static_cast<unsigned>(num_ctas)}, {kWarps * device::kWarpSize}, 0, stream,
                   params);
  };
  if (params.head_dim <= 64)
    start(&attend_merge_kernel<2>);
  else if (params.head_dim <= 128)
    start(&attend_merge_kernel<4>);
  else
    start(&attend_merge_kernel<8>);
}

const KernelRegistration<AttendMergeKernel> kRegistered({{"attend_merge", ""}, &launch_attend_merge});

}  // namespace
}  // namespace partita
