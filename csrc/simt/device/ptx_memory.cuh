// Twin of csrc/device/ptx_memory.cuh.
#pragma once

#include "device/launch.cuh"

namespace partita::device {

inline uint4 load_16(const void* global) {
  const auto r = simt::load_global_16(global);
  return {r.at[0], r.at[1], r.at[2], r.at[3]};
}
inline uint2 load_8(const void* global) {
  const auto r = simt::load_global_8(global);
  return {r.at[0], r.at[1]};
}
inline uint32_t load_4(const void* global) { return simt::load_global_4(global); }
inline uint4 load_nc_16(const void* global) { return load_16(global); }
inline uint4 load_stream_16(const void* global) { return load_16(global); }

inline void store_16(void* global, uint4 value) { simt::store_global_16(global, {value.x, value.y, value.z, value.w}); }
inline void store_8(void* global, uint2 value) { simt::store_global_8(global, {value.x, value.y}); }
inline void store_4(void* global, uint32_t value) { simt::store_global_4(global, value); }

inline uint32_t load_acquire_u32(const uint32_t* global) { return simt::load_acquire(global); }
inline void store_release_u32(uint32_t* global, uint32_t value) { simt::store_release(global, value); }
inline uint32_t add_release_u32(uint32_t* global, uint32_t value) {
  return simt::atomic_update(simt::Atomic::kAdd, global, value);
}
inline uint32_t add_acquire_release_u32(uint32_t* global, uint32_t value) {
  return simt::atomic_update(simt::Atomic::kAdd, global, value);
}
inline void prefetch_l2(const void*) {}

}  // namespace partita::device
