// Launching a kernel, its dynamic shared memory and barriers. The CUDA world; csrc/simt/device/launch.cuh is its twin.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace partita::device {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Arguments travel by value: params structs that are trivially copyable. `stream` is a GpuStream. Returns before the
// kernel has run; throws std::runtime_error, which names the kernel, when it cannot be started.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Dim3 grid, Dim3 block, size_t shared_bytes, void* stream,
            Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each parameter of the kernel");
  static_assert((std::is_trivially_copyable_v<std::remove_cv_t<Parameters>> && ...), "arguments are copied as bytes");
  const auto check = [name](cudaError_t status, const char* call) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // or the next launch would report it again
    throw std::runtime_error(std::string("kernel ") + name + ": " + call + ": " + cudaGetErrorString(status));
  };
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(block.x, block.y, block.z);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "cudaLaunchKernelEx");
}

// The block's dynamic shared memory as a plan: a struct of arrays with their alignments. Its bytes are undefined until
// written.
template <typename Storage>
__device__ __forceinline__ Storage& dynamic_shared() {
  static_assert(std::is_trivially_default_constructible_v<Storage>, "shared memory is never constructed");
  extern __shared__ __align__(1024) unsigned char partita_dynamic_shared[];
  return *reinterpret_cast<Storage*>(partita_dynamic_shared);
}

__device__ __forceinline__ unsigned lane_idx() {
  unsigned lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Named barriers 1..15 (0 is __syncthreads): orders the memory of the `num_threads` threads that meet at it, a multiple
// of 32; every warp that comes comes whole.
__device__ __forceinline__ void barrier_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Counts this warp in without waiting: what it wrote before is seen by those that barrier_sync releases.
__device__ __forceinline__ void barrier_arrive(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

}  // namespace partita::device
