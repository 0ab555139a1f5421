// mma and ldmatrix: the whole warp's operands are gathered by the last lane, which computes for all.
#include <cstring>

#include "simt/block.h"
#include "simt/collective.h"
#include "simt/memory_check.h"
#include "simt/number_formats.h"
#include "simt/report.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace partita::simt {
namespace {

constexpr int kRows = 16, kColumns = 8;

// ---- 16-bit floats
// -----------------------------------------------------------------------------------------------------

// Fragments as packed pairs along k: a [16, 8 pairs], b [8 pairs, 8 columns].
struct Pairs {
  uint32_t a[kRows][8];
  uint32_t b[8][kColumns];
};

void gather_pairs(const Warp& warp, Pairs& pairs) {
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = warp.threads[lane].operands.mma;
    const int group = lane / 4, pair = lane % 4;
    pairs.a[group][pair] = operands.a.at[0];
    pairs.a[group + 8][pair] = operands.a.at[1];
    pairs.a[group][pair + 4] = operands.a.at[2];
    pairs.a[group + 8][pair + 4] = operands.a.at[3];
    pairs.b[pair][group] = operands.b.at[0];
    pairs.b[pair + 4][group] = operands.b.at[1];
  }
}

template <typename T>
void gather_accumulators(const Warp& warp, T (&d)[kRows][kColumns], const Registers<T, 4>& (*of)(const Operands&)) {
  for (int lane = 0; lane < 32; ++lane) {
    const Registers<T, 4>& held = of(warp.threads[lane].operands);
    const int group = lane / 4, pair = lane % 4;
    std::memcpy(&d[group][2 * pair], &held.at[0], 8);
    std::memcpy(&d[group + 8][2 * pair], &held.at[2], 8);
  }
}

struct Floats {
  float a[kRows][16];
  float b[16][kColumns];
  float d[kRows][kColumns];
};

void widen_bf16(const Pairs& pairs, Floats& floats) {
  for (int row = 0; row < kRows; ++row)
    for (int pair = 0; pair < 8; ++pair) {
      floats.a[row][2 * pair] = float_of(pairs.a[row][pair] << 16);
      floats.a[row][2 * pair + 1] = float_of(pairs.a[row][pair] & 0xffff0000u);
    }
  for (int pair = 0; pair < 8; ++pair)
    for (int column = 0; column < kColumns; ++column) {
      floats.b[2 * pair][column] = float_of(pairs.b[pair][column] << 16);
      floats.b[2 * pair + 1][column] = float_of(pairs.b[pair][column] & 0xffff0000u);
    }
}

void widen_f16(const Pairs& pairs, Floats& floats) {
  for (int row = 0; row < kRows; ++row)
    for (int pair = 0; pair < 8; ++pair) {
      floats.a[row][2 * pair] = float_from_f16(static_cast<uint16_t>(pairs.a[row][pair]));
      floats.a[row][2 * pair + 1] = float_from_f16(static_cast<uint16_t>(pairs.a[row][pair] >> 16));
    }
  for (int pair = 0; pair < 8; ++pair)
    for (int column = 0; column < kColumns; ++column) {
      floats.b[2 * pair][column] = float_from_f16(static_cast<uint16_t>(pairs.b[pair][column]));
      floats.b[2 * pair + 1][column] = float_from_f16(static_cast<uint16_t>(pairs.b[pair][column] >> 16));
    }
}

// In the order of k for every element; products of two 16-bit floats are exact in fp32, so that whether the compiler
// fuses the addition makes no difference.
void multiply(Floats& floats) {
  for (int row = 0; row < kRows; ++row) {
    float sums[kColumns];
    std::memcpy(sums, floats.d[row], sizeof sums);
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < kColumns; ++column) sums[column] += floats.a[row][k] * floats.b[k][column];
    std::memcpy(floats.d[row], sums, sizeof sums);
  }
}

#if defined(__x86_64__)

// The same with AVX2 and F16C, four times as quick.
__attribute__((target("avx2,f16c,fma"))) void multiply_avx2(const Pairs& pairs, bool is_f16, Floats& floats) {
  __m256 b[16];
  for (int pair = 0; pair < 8; ++pair) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs.b[pair]));
    if (is_f16) {
      const __m256i low = _mm256_and_si256(packed, _mm256_set1_epi32(0xffff)), high = _mm256_srli_epi32(packed, 16);
      // packus works within 128-bit halves: [low 0..3, high 0..3 | low 4..7, high 4..7]
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
      b[2 * pair] = _mm256_cvtph_ps(_mm256_castsi256_si128(both));
      b[2 * pair + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1));
    } else {
      b[2 * pair] = _mm256_castsi256_ps(_mm256_slli_epi32(packed, 16));
      b[2 * pair + 1] = _mm256_castsi256_ps(_mm256_and_si256(packed, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    }
  }
  for (int row = 0; row < kRows; ++row) {
    alignas(32) float a[16];
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs.a[row]));
    if (is_f16) {
      _mm256_store_ps(a, _mm256_cvtph_ps(_mm256_castsi256_si128(packed)));
      _mm256_store_ps(a + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1)));
    } else {
      const __m256i zero = _mm256_setzero_si256();
      const __m256i low = _mm256_unpacklo_epi16(zero, packed), high = _mm256_unpackhi_epi16(zero, packed);
      _mm256_store_si256(reinterpret_cast<__m256i*>(a), _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_store_si256(reinterpret_cast<__m256i*>(a + 8), _mm256_permute2x128_si256(low, high, 0x31));
    }
    __m256 sums = _mm256_loadu_ps(floats.d[row]);
    for (int k = 0; k < 16; ++k) sums = _mm256_fmadd_ps(_mm256_set1_ps(a[k]), b[k], sums);
    _mm256_storeu_ps(floats.d[row], sums);
  }
}

const bool kHasAvx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");

#endif

template <bool kIsF16>
void complete_mma(Warp& warp, uint32_t lanes, int) {
  if (lanes != 0xffffffffu) report(*current_thread, nullptr, "mma: lanes 0x%x came, wanted the whole warp", lanes);
  Pairs pairs;
  Floats floats;
  gather_pairs(warp, pairs);
  gather_accumulators<float>(
      warp, floats.d, +[](const Operands& operands) -> const Registers<float, 4>& { return operands.mma.d; });
#if defined(__x86_64__)
  if (kHasAvx2) {
    multiply_avx2(pairs, kIsF16, floats);
  } else
#endif
  {
    if (kIsF16)
      widen_f16(pairs, floats);
    else
      widen_bf16(pairs, floats);
    multiply(floats);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& d = warp.threads[lane].operands.mma.d;
    std::memcpy(&d.at[0], &floats.d[lane / 4][2 * (lane % 4)], 8);
    std::memcpy(&d.at[2], &floats.d[lane / 4 + 8][2 * (lane % 4)], 8);
  }
}

// ---- bytes
// ---------------------------------------------------------------------------------------------------------------

template <typename A, typename B>
void complete_mma_bytes(Warp& warp, uint32_t lanes, int) {
  if (lanes != 0xffffffffu) report(*current_thread, nullptr, "mma: lanes 0x%x came, wanted the whole warp", lanes);
  int16_t a[kRows][32], b[kColumns][32];
  int32_t d[kRows][kColumns];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = warp.threads[lane].operands.mma_bytes;
    const int group = lane / 4, pair = lane % 4;
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 4; ++i) {
        const int k = 16 * half + 4 * pair + i;
        a[group][k] = static_cast<A>(operands.a.at[2 * half] >> (8 * i));
        a[group + 8][k] = static_cast<A>(operands.a.at[2 * half + 1] >> (8 * i));
        b[group][k] = static_cast<B>(operands.b.at[half] >> (8 * i));
      }
  }
  gather_accumulators<int32_t>(
      warp, d, +[](const Operands& operands) -> const Registers<int32_t, 4>& { return operands.mma_bytes.d; });
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < kColumns; ++column) {
      int32_t sum = 0;  // at most 32 * 255 * 128
      for (int k = 0; k < 32; ++k) sum += a[row][k] * b[column][k];
      d[row][column] = static_cast<int32_t>(static_cast<uint32_t>(d[row][column]) + static_cast<uint32_t>(sum));
    }
  for (int lane = 0; lane < 32; ++lane) {
    auto& held = warp.threads[lane].operands.mma_bytes.d;
    std::memcpy(&held.at[0], &d[lane / 4][2 * (lane % 4)], 8);
    std::memcpy(&held.at[2], &d[lane / 4 + 8][2 * (lane % 4)], 8);
  }
}

// ---- ldmatrix
// ------------------------------------------------------------------------------------------------------------

template <bool kIsTransposed>
void complete_ldmatrix(Warp& warp, uint32_t lanes, int num_matrices) {
  if (lanes != 0xffffffffu) report(*current_thread, nullptr, "ldmatrix: lanes 0x%x came, wanted the whole warp", lanes);
  for (int matrix = 0; matrix < num_matrices; ++matrix) {
    uint16_t rows[8][8];
    for (int row = 0; row < 8; ++row) {
      Thread& thread = warp.threads[8 * matrix + row];
      const auto& operands = thread.operands.ldmatrix;
      check_shared_row(thread, operands.row, operands.caller);
      std::memcpy(rows[row], operands.row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int major = lane / 4, minor = 2 * (lane % 4);
      const uint32_t low = kIsTransposed ? rows[minor][major] : rows[major][minor];
      const uint32_t high = kIsTransposed ? rows[minor + 1][major] : rows[major][minor + 1];
      warp.threads[lane].operands.ldmatrix.loaded.at[matrix] = low | high << 16;
    }
  }
}

}  // namespace

Registers<float, 4> mma_f16(Registers<float, 4> d, Registers<uint32_t, 4> a, Registers<uint32_t, 2> b, Site site) {
  Thread& thread = *current_thread;
  thread.operands.mma = {d, a, b};
  meet(thread, 0xffffffffu, &complete_mma<true>, 0, true, site);
  return thread.operands.mma.d;
}

Registers<float, 4> mma_bf16(Registers<float, 4> d, Registers<uint32_t, 4> a, Registers<uint32_t, 2> b, Site site) {
  Thread& thread = *current_thread;
  thread.operands.mma = {d, a, b};
  meet(thread, 0xffffffffu, &complete_mma<false>, 0, true, site);
  return thread.operands.mma.d;
}

Registers<int32_t, 4> mma_bytes(ByteSigns signs, Registers<int32_t, 4> d, Registers<uint32_t, 4> a,
                                Registers<uint32_t, 2> b, Site site) {
  Thread& thread = *current_thread;
  thread.operands.mma_bytes = {d, a, b};
  const auto complete = signs == ByteSigns::kBothSigned  ? &complete_mma_bytes<int8_t, int8_t>
                        : signs == ByteSigns::kAUnsigned ? &complete_mma_bytes<uint8_t, int8_t>
                                                         : &complete_mma_bytes<int8_t, uint8_t>;
  meet(thread, 0xffffffffu, complete, 0, true, site);
  return thread.operands.mma_bytes.d;
}

Registers<uint32_t, 4> ldmatrix(int num_matrices, bool is_transposed, const void* shared_row, Site site) {
  Thread& thread = *current_thread;
  thread.operands.ldmatrix.row = shared_row;
  thread.operands.ldmatrix.caller = __builtin_return_address(0);
  meet(thread, 0xffffffffu, is_transposed ? &complete_ldmatrix<true> : &complete_ldmatrix<false>, num_matrices, true,
       site);
  return thread.operands.ldmatrix.loaded;
}

}  // namespace partita::simt
