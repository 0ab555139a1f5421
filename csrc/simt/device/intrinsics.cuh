// CUDA's device functions, as far as kernels here use them. Those that wait for other threads carry the place of their
// call.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/device_calls.h"

// Barriers and votes.
inline void __syncthreads(partita::simt::Site site = partita::simt::Site::here()) {
  partita::simt::block_barrier(site);
}
inline int __syncthreads_count(int predicate, partita::simt::Site site = partita::simt::Site::here()) {
  return partita::simt::block_barrier_vote(partita::simt::BlockVote::kCount, predicate != 0, site);
}
inline int __syncthreads_and(int predicate, partita::simt::Site site = partita::simt::Site::here()) {
  return partita::simt::block_barrier_vote(partita::simt::BlockVote::kAnd, predicate != 0, site);
}
inline int __syncthreads_or(int predicate, partita::simt::Site site = partita::simt::Site::here()) {
  return partita::simt::block_barrier_vote(partita::simt::BlockVote::kOr, predicate != 0, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, partita::simt::Site site = partita::simt::Site::here()) {
  partita::simt::sync_warp(mask, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, partita::simt::Site site = partita::simt::Site::here()) {
  return partita::simt::vote(partita::simt::Vote::kBallot, mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, partita::simt::Site site = partita::simt::Site::here()) {
  return static_cast<int>(partita::simt::vote(partita::simt::Vote::kAny, mask, predicate != 0, site));
}
inline int __all_sync(unsigned mask, int predicate, partita::simt::Site site = partita::simt::Site::here()) {
  return static_cast<int>(partita::simt::vote(partita::simt::Vote::kAll, mask, predicate != 0, site));
}

namespace partita::simt {

template <typename T>
inline T shuffle_value(Shuffle kind, unsigned mask, T value, int lane, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles move 32 or 64 bits");
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = static_cast<Bits>(shuffle(kind, mask, bits, lane, width, site));
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace partita::simt

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
                     partita::simt::Site site = partita::simt::Site::here()) {
  return partita::simt::shuffle_value(partita::simt::Shuffle::kIndex, mask, value, lane, width, site);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        partita::simt::Site site = partita::simt::Site::here()) {
  return partita::simt::shuffle_value(partita::simt::Shuffle::kUp, mask, value, static_cast<int>(delta), width, site);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          partita::simt::Site site = partita::simt::Site::here()) {
  return partita::simt::shuffle_value(partita::simt::Shuffle::kDown, mask, value, static_cast<int>(delta), width, site);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                         partita::simt::Site site = partita::simt::Site::here()) {
  return partita::simt::shuffle_value(partita::simt::Shuffle::kXor, mask, value, lane_mask, width, site);
}

// Memory.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { partita::simt::yield_to_others(); }
inline void __trap(partita::simt::Site site = partita::simt::Site::here()) { partita::simt::trap(site); }

#define PARTITA_SIMT_ATOMIC(name, kind, type, host_type)                                                        \
  inline type name(type* address, type value) {                                                                 \
    return static_cast<type>(partita::simt::atomic_update(partita::simt::Atomic::kind,                          \
                                                          reinterpret_cast<partita::simt::host_type*>(address), \
                                                          static_cast<partita::simt::host_type>(value)));       \
  }
#define PARTITA_SIMT_INTEGER_ATOMICS(name, kind)    \
  PARTITA_SIMT_ATOMIC(name, kind, int, Int32)       \
  PARTITA_SIMT_ATOMIC(name, kind, unsigned, Uint32) \
  PARTITA_SIMT_ATOMIC(name, kind, unsigned long long, Uint64)
namespace partita::simt {
using Int32 = int32_t;
using Uint32 = uint32_t;
using Uint64 = uint64_t;
using Float32 = float;
}  // namespace partita::simt
PARTITA_SIMT_INTEGER_ATOMICS(atomicAdd, kAdd)
PARTITA_SIMT_INTEGER_ATOMICS(atomicMin, kMin)
PARTITA_SIMT_INTEGER_ATOMICS(atomicMax, kMax)
PARTITA_SIMT_INTEGER_ATOMICS(atomicExch, kExchange)
PARTITA_SIMT_INTEGER_ATOMICS(atomicAnd, kAnd)
PARTITA_SIMT_INTEGER_ATOMICS(atomicOr, kOr)
PARTITA_SIMT_INTEGER_ATOMICS(atomicXor, kXor)
PARTITA_SIMT_ATOMIC(atomicAdd, kAdd, float, Float32)
PARTITA_SIMT_ATOMIC(atomicExch, kExchange, float, Float32)
#undef PARTITA_SIMT_INTEGER_ATOMICS
#undef PARTITA_SIMT_ATOMIC
inline int atomicSub(int* address, int value) { return atomicAdd(address, -value); }
inline unsigned atomicSub(unsigned* address, unsigned value) { return atomicAdd(address, 0u - value); }
inline int atomicCAS(int* address, int expected, int wanted) {
  return static_cast<int>(partita::simt::atomic_compare_exchange(
      reinterpret_cast<uint32_t*>(address), static_cast<uint32_t>(expected), static_cast<uint32_t>(wanted)));
}
inline unsigned atomicCAS(unsigned* address, unsigned expected, unsigned wanted) {
  return partita::simt::atomic_compare_exchange(address, expected, wanted);
}
inline unsigned long long atomicCAS(unsigned long long* address, unsigned long long expected,
                                    unsigned long long wanted) {
  return partita::simt::atomic_compare_exchange(reinterpret_cast<uint64_t*>(address), uint64_t{expected},
                                                uint64_t{wanted});
}

template <typename T>
inline T __ldg(const T* address) {
  return *address;
}

// Bits.
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<int64_t>(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

// Reinterpretation.
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __uint_as_float(unsigned bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

// Arithmetic. Host functions are at least as exact as the device's.
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// Saturates, NaN gives 0, as the device's conversion does.
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.0f) return 2147483647;
  if (x <= -2147483648.0f) return -2147483647 - 1;
  return static_cast<int>(std::nearbyint(x));
}
inline unsigned __float2uint_rn(float x) {
  if (!(x > 0.0f)) return 0;
  return x >= 4294967296.0f ? 0xffffffffu : static_cast<unsigned>(std::nearbyint(x));
}
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a < b ? b : a; }
inline unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
inline unsigned long max(unsigned long a, unsigned long b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
