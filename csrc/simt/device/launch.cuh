// Twin of csrc/device/launch.cuh for the host execution: the language's keywords, built-in variables and types,
// intrinsics, and the same launch, shared memory and barriers.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "simt/device/intrinsics.cuh"
#include "simt/device/vector_types.cuh"
#include "simt/device_calls.h"
#include "simt/simt.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

#define threadIdx (::partita::simt::thread_index())
#define blockIdx (::partita::simt::block_index())
#define blockDim (::partita::simt::block_extent())
#define gridDim (::partita::simt::grid_extent())
constexpr int warpSize = 32;

namespace partita::simt {

// The arguments of a launch. Not std::tuple: its copying would be instrumented, and these bytes are no kernel's memory.
template <typename... Parameters>
struct Arguments;
template <>
struct Arguments<> {
  template <typename Kernel, typename... Values>
  __attribute__((no_sanitize("thread", "alignment"))) void call(Kernel kernel, const Values&... values) const {
    kernel(values...);
  }
};
template <typename First, typename... Rest>
struct Arguments<First, Rest...> {
  First first;
  Arguments<Rest...> rest;
  template <typename Kernel, typename... Values>
  __attribute__((no_sanitize("thread", "alignment"))) void call(Kernel kernel, const Values&... values) const {
    rest.call(kernel, values..., first);
  }
};

template <typename... Parameters>
struct Closure {
  void (*kernel)(Parameters...);
  Arguments<std::remove_cv_t<Parameters>...> arguments;
  __attribute__((no_sanitize("thread", "alignment"))) static void run(const void* closure) {
    const auto* self = static_cast<const Closure*>(closure);
    self->arguments.call(self->kernel);
  }
};

template <typename First, typename... Rest, typename FirstValue, typename... RestValues>
void fill(Arguments<First, Rest...>& arguments, const FirstValue& first, const RestValues&... rest) {
  arguments.first = static_cast<First>(first);
  if constexpr (sizeof...(Rest) > 0) fill(arguments.rest, rest...);
}

void check_launch(const char* name, Dim3 grid, Dim3 block, size_t shared_bytes);

}  // namespace partita::simt

namespace partita::device {

using Dim3 = simt::Dim3;

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename... Parameters, typename... Values>
void launch(const char* name, void (*kernel)(Parameters...), Dim3 grid, Dim3 block, size_t shared_bytes, void* stream,
            Values&&... values) {
  static_assert(sizeof...(Parameters) == sizeof...(Values), "one argument for each parameter of the kernel");
  static_assert((std::is_trivially_copyable_v<std::remove_cv_t<Parameters>> && ...), "arguments are copied as bytes");
  simt::check_launch(name, grid, block, shared_bytes);
  using Closure = simt::Closure<Parameters...>;
  auto closure = std::make_shared<Closure>();
  closure->kernel = kernel;
  if constexpr (sizeof...(Parameters) > 0) simt::fill(closure->arguments, values...);
  simt::enqueue(stream, {name, grid, block, shared_bytes, std::move(closure), &Closure::run});
}

template <typename Storage>
inline Storage& dynamic_shared() {
  static_assert(std::is_trivially_default_constructible_v<Storage>, "shared memory is never constructed");
  return *static_cast<Storage*>(simt::shared_memory(sizeof(Storage), alignof(Storage)));
}

inline unsigned lane_idx() { return simt::lane_index(); }

inline void barrier_sync(int id, int num_threads, simt::Site site = simt::Site::here()) {
  simt::named_barrier(id, num_threads, site);
}
inline void barrier_arrive(int id, int num_threads, simt::Site site = simt::Site::here()) {
  simt::named_barrier_arrive(id, num_threads, site);
}

}  // namespace partita::device
