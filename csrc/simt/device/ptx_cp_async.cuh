// Twin of csrc/device/ptx_cp_async.cuh. A copy is noted when it is issued and carried out at the wait that covers it;
// until then its target may not be touched.
#pragma once

#include "device/launch.cuh"

namespace partita::device {

inline void cp_async_4(void* shared, const void* global) { simt::copy_async(shared, global, 4, 4); }
inline void cp_async_8(void* shared, const void* global) { simt::copy_async(shared, global, 8, 8); }
inline void cp_async_8_zfill(void* shared, const void* global, int src_bytes) {
  simt::copy_async(shared, global, 8, src_bytes);
}
inline void cp_async_16(void* shared, const void* global) { simt::copy_async(shared, global, 16, 16); }
inline void cp_async_16_zfill(void* shared, const void* global, int src_bytes) {
  simt::copy_async(shared, global, 16, src_bytes);
}
inline void cp_async_16_evict_first(void* shared, const void* global) { simt::copy_async(shared, global, 16, 16); }
inline void cp_async_commit() { simt::copy_async_commit(); }

template <int kPending>
inline void cp_async_wait(simt::Site site = simt::Site::here()) {
  static_assert(kPending >= 0);
  simt::copy_async_wait(kPending, site);
}

}  // namespace partita::device
