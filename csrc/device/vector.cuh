// Four floats at a time from and to global memory, one PTX instruction each. Addresses are multiples of 16 bytes.
#pragma once

namespace partita::device {

// Read-only for the whole kernel: goes through the non-coherent cache.
__device__ __forceinline__ float4 load_read_only_4(const float* address) {
  float4 value;
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(address));
  return value;
}

__device__ __forceinline__ void store_4(float* address, float4 value) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(value.x), "f"(value.y), "f"(value.z),
               "f"(value.w)
               : "memory");
}

}  // namespace partita::device
