// How codes of a page become operands of mma without being moved between lanes, and what that does to the order of
// elements. Two tricks, both from the freedom that an element's place in a dot product is nobody's business:
//
// K (operand A of S^T = K Q^T): a lane reads 16 (or 8) neighbouring bytes of a token's row and takes them as they come.
// Which element then meets which k of the instruction is k_element(); Q is laid out in the same order, once per item.
//
// V (operand A of O^T = V^T P^T): ldmatrix.trans moves 16-bit units, so a lane gets 2 or 4 neighbouring elements of a
// token where it wants one. They go to different rows of O^T; out_element() says which, and O is put in order when it
// is stored.
//
// Integer codes are never converted: masked out of their word, a code is a half's mantissa under a zero exponent, that
// is the subnormal number code * 2^-24 (or 2^-20 where a nibble sits four bits up), which mma multiplies exactly. The
// power is undone on the fp32 sums, together with the token's scale. e4m3 bits shifted into a half's place are the
// value times 2^-8, subnormals and NaN included (device/e4m3_bits.cuh).
#pragma once

#include "attention/attend_gpu_kernels.h"
#include "device/e4m3_bits.cuh"
#include "device/launch.cuh"

namespace partita {

template <KvCodec kCodec>
struct CodeTraits {
  static constexpr bool kIsFloat16 = kCodec == KvCodec::kF16 || kCodec == KvCodec::kBF16;
  static constexpr int kBits = kIsFloat16 ? 16 : kCodec == KvCodec::kInt4Plain ? 4 : 8;
  static constexpr bool kHasParams = kCodec == KvCodec::kInt8 || kCodec == KvCodec::kInt4Plain;
  static constexpr bool kIsBF16 = kCodec == KvCodec::kBF16;  // the type that mma multiplies; else fp16
  // A sum of products with the codes as they are, times this, is the sum with their values.
  static constexpr float kUnit = kHasParams ? 16777216.0f : kCodec == KvCodec::kE4M3 ? 256.0f : 1.0f;
  // Factor of the operands of odd registers against those of even ones.
  static constexpr float kOddFactor = kBits == 4 ? 16.0f : 1.0f;
};

// The four bytes of a word as two pairs of halves: bytes 0 and 2, bytes 1 and 3.
template <KvCodec kCodec>
__device__ __forceinline__ uint32_t even_bytes(uint32_t word) {
  if constexpr (kCodec == KvCodec::kE4M3)
    return device::e4m3_high_bytes_to_scaled_f16x2(word << 8);
  else
    return word & 0x00ff00ffu;
}
template <KvCodec kCodec>
__device__ __forceinline__ uint32_t odd_bytes(uint32_t word) {
  if constexpr (kCodec == KvCodec::kE4M3)
    return device::e4m3_high_bytes_to_scaled_f16x2(word);
  else
    return (word >> 8) & 0x00ff00ffu;
}

// ---- K

// 32-bit words that a lane takes from a row at once.
template <int kBits, int kHeadDim>
constexpr int k_read_words() {
  return kHeadDim * kBits / 8 >= 64 ? 4 : 2;
}

// The element that half `half` of register `reg` of step `step` of the lane with this `pair` (lane % 4) holds; for the
// registers of Q (b[0], b[1]) and of K (a[0] and a[1], a[2] and a[3]) alike.
template <int kBits, int kHeadDim>
__device__ __forceinline__ constexpr int k_element(int step, int pair, int reg, int half) {
  constexpr int kWords = k_read_words<kBits, kHeadDim>();
  constexpr int kElementsPerWord = 32 / kBits;
  if constexpr (kBits == 16) {
    return (step / 2 * 4 + pair) * 8 + step % 2 * 4 + reg * 2 + half;
  } else if constexpr (kBits == 8) {
    return ((step / kWords * 4 + pair) * kWords + step % kWords) * kElementsPerWord + reg + 2 * half;
  } else {
    const int word = step / 2;
    return ((word / kWords * 4 + pair) * kWords + word % kWords) * kElementsPerWord + step % 2 * 2 + reg + 4 * half;
  }
}

// Operand A of step `step` within one read: rows g and g + 8.
template <KvCodec kCodec>
__device__ __forceinline__ void k_operand(uint32_t (&a)[4], const uint32_t* row, const uint32_t* row_8, int step) {
  using Traits = CodeTraits<kCodec>;
  if constexpr (Traits::kBits == 16) {
    a[0] = row[2 * step], a[1] = row_8[2 * step], a[2] = row[2 * step + 1], a[3] = row_8[2 * step + 1];
  } else if constexpr (Traits::kBits == 8) {
    a[0] = even_bytes<kCodec>(row[step]), a[1] = even_bytes<kCodec>(row_8[step]);
    a[2] = odd_bytes<kCodec>(row[step]), a[3] = odd_bytes<kCodec>(row_8[step]);
  } else {
    const uint32_t x = row[step / 2] >> (step % 2 * 8), y = row_8[step / 2] >> (step % 2 * 8);
    a[0] = x & 0x000f000fu, a[1] = y & 0x000f000fu, a[2] = x & 0x00f000f0u, a[3] = y & 0x00f000f0u;
  }
}

// Place of 16-byte chunk `chunk` in row `row` of K's tile: the eight lanes that read at once are four of each of two
// rows, which must not begin at the same banks.
template <int kRowBytes>
__device__ __forceinline__ constexpr int k_chunk(int row, int chunk) {
  return kRowBytes >= 128 ? chunk ^ (row % 2 * 4) : chunk;
}

// ---- V

// m tiles (16 rows of O^T) of two 16-byte chunks.
template <int kBits>
constexpr int v_tiles_per_pair() {
  return 16 / kBits;
}

// Operand A of tile `tile` of a pair of chunks. r: ldmatrix's matrices (tokens 0-7, chunk 0), (tokens 0-7, chunk 1),
// (tokens 8-15, chunk 0), (tokens 8-15, chunk 1).
template <KvCodec kCodec>
__device__ __forceinline__ void v_operand(uint32_t (&a)[4], const uint32_t (&r)[4], int tile) {
  using Traits = CodeTraits<kCodec>;
  if constexpr (Traits::kBits == 16) {
    a[0] = r[0], a[1] = r[1], a[2] = r[2], a[3] = r[3];
  } else if constexpr (Traits::kBits == 8) {
    a[0] = even_bytes<kCodec>(r[tile]), a[1] = odd_bytes<kCodec>(r[tile]);
    a[2] = even_bytes<kCodec>(r[2 + tile]), a[3] = odd_bytes<kCodec>(r[2 + tile]);
  } else {
    const uint32_t x = r[tile / 2] >> (tile % 2 * 8), y = r[2 + tile / 2] >> (tile % 2 * 8);
    a[0] = x & 0x000f000fu, a[1] = x & 0x00f000f0u, a[2] = y & 0x000f000fu, a[3] = y & 0x00f000f0u;
  }
}

// The element of V that row g (half 0) or g + 8 (half 1) of m tile `tile` is.
template <int kBits>
__device__ __forceinline__ constexpr int out_element(int tile, int g, int half) {
  if constexpr (kBits == 16)
    return 16 * tile + 8 * half + g;
  else if constexpr (kBits == 8)
    return 16 * tile + 2 * g + half;
  else
    return tile / 2 * 32 + 4 * g + tile % 2 * 2 + half;
}

// Place of chunk `chunk` in row `row` of a tile that ldmatrix reads: eight rows of one chunk lie in different banks.
template <int kRowBytes>
__device__ __forceinline__ constexpr int matrix_chunk(int row, int chunk) {
  if constexpr (kRowBytes >= 128)
    return chunk ^ (row & 7);
  else if constexpr (kRowBytes == 64)
    return chunk ^ (row >> 1 & 3);
  else
    return chunk ^ (row >> 2 & 1);
}

}  // namespace partita
