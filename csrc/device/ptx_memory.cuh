// Loads and stores of global memory, one instruction each. Addresses are multiples of the size.
#pragma once

#include "device/launch.cuh"

namespace partita::device {

__device__ __forceinline__ uint4 load_16(const void* global) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global)
               : "memory");
  return value;
}

__device__ __forceinline__ uint2 load_8(const void* global) {
  uint2 value;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(global) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_4(const void* global) {
  uint32_t value;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(global) : "memory");
  return value;
}

// For what no kernel writes while this one runs: goes through the non-coherent cache, and the compiler may move it.
__device__ __forceinline__ uint4 load_nc_16(const void* global) {
  uint4 value;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(global));
  return value;
}

// For what is read once: evicted first.
__device__ __forceinline__ uint4 load_stream_16(const void* global) {
  uint4 value;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_16(void* global, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void store_8(void* global, uint2 value) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(global), "r"(value.x), "r"(value.y) : "memory");
}

__device__ __forceinline__ void store_4(void* global, uint32_t value) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}

// Between blocks: what a thread wrote before a release is seen by a thread whose acquire reads the released value.
__device__ __forceinline__ uint32_t load_acquire_u32(const uint32_t* global) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(global) : "memory");
  return value;
}

__device__ __forceinline__ void store_release_u32(uint32_t* global, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}

// Returns the value before the addition.
__device__ __forceinline__ uint32_t add_release_u32(uint32_t* global, uint32_t value) {
  uint32_t old;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(global), "r"(value) : "memory");
  return old;
}

// Also acquires: who finds itself last sees what the others wrote before their additions.
__device__ __forceinline__ uint32_t add_acquire_release_u32(uint32_t* global, uint32_t value) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(global), "r"(value) : "memory");
  return old;
}

// Brings the line of this address into L2; the address need not be aligned.
__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

}  // namespace partita::device
