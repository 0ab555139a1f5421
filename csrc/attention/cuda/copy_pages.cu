// Pages copied inside the arena: a thread block moves a run of 16 KB of one pair's page, four vectors in flight a
// thread.
#include "attention/pages_gpu.h"
#include "device/launch.cuh"
#include "device/ptx_memory.cuh"

namespace partita {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // of a thread
constexpr int64_t kRunBytes = int64_t{kThreads} * kVectors * 16;

__global__ void __launch_bounds__(kThreads) copy_pages_kernel(const __grid_constant__ CopyPagesParams p) {
  const int64_t pair = blockIdx.x;
  if (p.num_pairs && pair >= *p.num_pairs) return;
  const int64_t source = p.pairs[2 * pair], target = p.pairs[2 * pair + 1];
  if (source < 0 || target < 0) return;
  const auto page_bytes = static_cast<int64_t>(p.page_bytes);
  const std::byte* from = p.arena + source * page_bytes;
  std::byte* to = p.arena + target * page_bytes;
  const int64_t begin = blockIdx.y * kRunBytes + threadIdx.x * 16;
  uint4 words[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    if (begin + i * kThreads * 16 < page_bytes) words[i] = device::load_stream_16(from + begin + i * kThreads * 16);
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    if (begin + i * kThreads * 16 < page_bytes) device::store_16(to + begin + i * kThreads * 16, words[i]);
}

void launch_copy_pages(const CopyPagesParams& params, void* stream) {
  // 65535 runs of a page, the most that the grid's y can be, are 1 GB.
  const auto num_runs = static_cast<unsigned>((static_cast<int64_t>(params.page_bytes) + kRunBytes - 1) / kRunBytes);
  device::launch("copy_pages", copy_pages_kernel, {static_cast<unsigned>(params.max_pairs), num_runs}, {kThreads}, 0,
                 stream, params);
}

const KernelRegistration<CopyPagesKernel> kRegistered({{"copy_pages", ""}, &launch_copy_pages});

}  // namespace
}  // namespace partita
