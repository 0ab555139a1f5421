#if defined(__x86_64__)
#include <immintrin.h>

#include "core/cpu/peak_loops.h"

// The accumulators go through an empty asm statement in every round, so the compiler can neither drop nor merge rounds.
#define PARTITA_KEEP(x) __asm__ volatile("" : "+x"(x))

namespace partita {
namespace {

constexpr int kChains = 10;

// A dot of AVX2 takes three instructions: u8 x s8 pairs, pairs of 16 bits to 32, add.
double int8_dots(int64_t iterations) {
  __m256i acc[kChains], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 10
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_setzero_si256();
  for (int64_t n = 0; n < iterations; ++n)
#pragma GCC unroll 10
    for (int i = 0; i < kChains; ++i) {
      PARTITA_KEEP(a);
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
      PARTITA_KEEP(acc[i]);
    }
  return 2.0 * 32 * kChains * static_cast<double>(iterations);
}

double fp32_multiply_adds(int64_t iterations) {
  __m256 acc[kChains];
  const __m256 a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(0.5f);
#pragma GCC unroll 10
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_setzero_ps();
  for (int64_t n = 0; n < iterations; ++n)
#pragma GCC unroll 10
    for (int i = 0; i < kChains; ++i) {
      acc[i] = _mm256_fmadd_ps(a, b, acc[i]);
      PARTITA_KEEP(acc[i]);
    }
  return 2.0 * 8 * kChains * static_cast<double>(iterations);
}

// The hardware prefetcher alone reached half of this: it stops at the end of each page.
constexpr int kPrefetchBytes = 5120;

double read(const std::byte* data, size_t bytes) {
  __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  for (size_t offset = 0; offset < bytes; offset += 1024) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) __builtin_prefetch(data + offset + kPrefetchBytes + i * 64);
#pragma GCC unroll 32
    for (int i = 0; i < 32; ++i)
      sums[i % 4] =
          _mm256_add_epi64(sums[i % 4], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + offset + i * 32)));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) PARTITA_KEEP(sums[i]);
  return static_cast<double>(bytes);
}

}  // namespace

const PeakLoops kPeakLoopsAvx2 = {int8_dots, nullptr, fp32_multiply_adds, read};

}  // namespace partita

#endif  // __x86_64__
