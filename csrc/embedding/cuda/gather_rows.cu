// Rows copied by index: a thread moves 16 bytes, or one element where width, strides or addresses forbid it.
#include "device/launch.cuh"
#include "device/ptx_memory.cuh"
#include "embedding/embedding_gpu.h"

namespace partita {
namespace {

constexpr int kMaxThreads = 256;

struct Params {
  GatherRowsParams op;
  bool is_vector;
};

__global__ void __launch_bounds__(kMaxThreads) gather_rows_kernel(const __grid_constant__ Params params) {
  const GatherRowsParams& p = params.op;
  const int64_t row = blockIdx.x, item = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  const int32_t from = p.row_idxs[row];
  const bool is_known = from >= 0 && from < p.num_in_rows;
  const float* in = p.in + (is_known ? from : 0) * p.in_stride;
  float* out = p.out + row * p.out_stride;
  if (params.is_vector) {
    if (item * 4 < p.width) device::store_16(out + item * 4, is_known ? device::load_16(in + item * 4) : uint4{});
  } else if (item < p.width) {
    out[item] = is_known ? in[item] : 0.0f;
  }
}

void launch_gather_rows(const GatherRowsParams& op, void* stream) {
  const auto is_aligned = [](const float* rows, int64_t stride) {
    return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride % 4 == 0;
  };
  const Params params{op, op.width % 4 == 0 && is_aligned(op.in, op.in_stride) && is_aligned(op.out, op.out_stride)};
  const int64_t items = params.is_vector ? op.width / 4 : op.width;
  const int64_t threads = items < kMaxThreads ? (items + 31) / 32 * 32 : kMaxThreads;
  device::launch("gather_rows", gather_rows_kernel,
                 {static_cast<unsigned>(op.num_rows), static_cast<unsigned>((items + threads - 1) / threads)},
                 {static_cast<unsigned>(threads)}, 0, stream, params);
}

const KernelRegistration<GatherRowsKernel> kRegistered({{"gather_rows", ""}, &launch_gather_rows});

}  // namespace
}  // namespace partita
