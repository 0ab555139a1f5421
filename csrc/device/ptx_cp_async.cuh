// Copies from global to shared memory that run on by themselves. A thread's copies since its last cp_async_commit form
// a group; cp_async_wait<kPending> returns when all but its newest kPending groups have arrived. Other threads may
// read what arrived only after a barrier that follows the wait. Both addresses are multiples of the size; bytes that
// are on the way are nobody's to touch; a thread waits for all of its copies before it ends.
#pragma once

#include "device/launch.cuh"

namespace partita::device {

__device__ __forceinline__ void cp_async_4(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
}

__device__ __forceinline__ void cp_async_8(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(global) : "memory");
}

// Reads src_bytes of 0..8 and writes 8: zeros after what was read. Where src_bytes is 0 `global` may be any address.
__device__ __forceinline__ void cp_async_8_zfill(void* shared, const void* global, int src_bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(global), "r"(src_bytes) : "memory");
}

// Past L1, which would only copy what is read once.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

// Reads src_bytes of 0..16 and writes 16: zeros after what was read. Where src_bytes is 0 `global` may be any address.
__device__ __forceinline__ void cp_async_16_zfill(void* shared, const void* global, int src_bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(src_bytes) : "memory");
}

// For bytes that are read once, such as weights: L2 drops them before anything else.
__device__ __forceinline__ void cp_async_16_evict_first(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));  // not volatile: made once in a loop
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  static_assert(kPending >= 0);
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace partita::device
