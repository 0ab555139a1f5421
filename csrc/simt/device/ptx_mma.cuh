// Twin of csrc/device/ptx_mma.cuh, which describes the fragments. Products are exact; an element's sum adds them to d
// one by one in the order of k, rounded to fp32 each time. (Hardware sums in an order of its own and cuts bits off, so
// the last bits differ.)
#pragma once

#include "device/launch.cuh"

namespace partita::device {

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             simt::Site site = simt::Site::here()) {
  const auto r = simt::mma_f16({d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, site);
  d[0] = r.at[0], d[1] = r.at[1], d[2] = r.at[2], d[3] = r.at[3];
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              simt::Site site = simt::Site::here()) {
  const auto r = simt::mma_bf16({d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, site);
  d[0] = r.at[0], d[1] = r.at[1], d[2] = r.at[2], d[3] = r.at[3];
}

inline void mma_m16n8k32_bytes(simt::ByteSigns signs, int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                               simt::Site site) {
  const auto r = simt::mma_bytes(signs, {d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, site);
  d[0] = r.at[0], d[1] = r.at[1], d[2] = r.at[2], d[3] = r.at[3];
}

inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            simt::Site site = simt::Site::here()) {
  mma_m16n8k32_bytes(simt::ByteSigns::kBothSigned, d, a, b, site);
}
inline void mma_m16n8k32_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              simt::Site site = simt::Site::here()) {
  mma_m16n8k32_bytes(simt::ByteSigns::kAUnsigned, d, a, b, site);
}
inline void mma_m16n8k32_s8u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              simt::Site site = simt::Site::here()) {
  mma_m16n8k32_bytes(simt::ByteSigns::kBUnsigned, d, a, b, site);
}

}  // namespace partita::device
