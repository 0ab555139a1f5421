#if defined(__x86_64__)
#include <immintrin.h>

#include "core/cpu/peak_loops.h"

// The accumulators go through an empty asm statement in every round, so the compiler can neither drop nor merge rounds.
#define PARTITA_KEEP(x) __asm__ volatile("" : "+v"(x))

namespace partita {
namespace {

constexpr int kChains = 16;  // independent sums: more than latency x ports

double int8_dots(int64_t iterations) {
  __m512i acc[kChains], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_setzero_si512();
  for (int64_t n = 0; n < iterations; ++n)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
      acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
      PARTITA_KEEP(acc[i]);
    }
  return 2.0 * 64 * kChains * static_cast<double>(iterations);
}

double bf16_dots(int64_t iterations) {
  __m512 acc[kChains];
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80), b = (__m512bh)_mm512_set1_epi32(0x3f003f00);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_setzero_ps();
  for (int64_t n = 0; n < iterations; ++n)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
      acc[i] = _mm512_dpbf16_ps(acc[i], a, b);
      PARTITA_KEEP(acc[i]);
    }
  return 2.0 * 32 * kChains * static_cast<double>(iterations);
}

double fp32_multiply_adds(int64_t iterations) {
  __m512 acc[kChains];
  const __m512 a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(0.5f);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_setzero_ps();
  for (int64_t n = 0; n < iterations; ++n)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
      acc[i] = _mm512_fmadd_ps(a, b, acc[i]);
      PARTITA_KEEP(acc[i]);
    }
  return 2.0 * 16 * kChains * static_cast<double>(iterations);
}

// The hardware prefetcher alone reached half of this: it stops at the end of each page.
constexpr int kPrefetchBytes = 5120;

double read(const std::byte* data, size_t bytes) {
  __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (size_t offset = 0; offset < bytes; offset += 1024) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) __builtin_prefetch(data + offset + kPrefetchBytes + i * 64);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      sums[i % 4] = _mm512_add_epi64(sums[i % 4], _mm512_loadu_si512(data + offset + i * 64));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) PARTITA_KEEP(sums[i]);
  return static_cast<double>(bytes);
}

}  // namespace

const PeakLoops kPeakLoopsAvx512 = {int8_dots, bf16_dots, fp32_multiply_adds, read};

}  // namespace partita

#endif  // __x86_64__
