// A page's K and V -> the tile that the AVX-512 arithmetic reads: K with tokens in lanes, V with columns in lanes.
// Included by attend_avx512.cpp alone, inside whose anonymous namespace everything here stays.
//   fp32    K transposed to [D, 64], V [64, pitch] in the order of value_columns()
//   codes   K [D / 4, 64] and V [16, pitch] lanes of four bytes, as VPDPBUSD takes them
#pragma once

#include <immintrin.h>

#include "attention/cpu/attend_flow.h"

namespace partita {
namespace {

constexpr int kLanes = 16;
constexpr int kTileVecs = kKvTileTokens / kLanes;
constexpr int kColumnBlock = 64;  // columns of o per register block

// 16 bytes of each of 16 rows -> out[i] holds 32-bit word i of every row, one row a lane. The 128-bit columns are
// gathered by masked broadcast loads, which leaves only 8 shuffles.
__attribute__((always_inline)) inline void transpose_16_rows(const std::byte* rows, size_t stride, __m512i out[4]) {
  __m512i r[4];
  for (int i = 0; i < 4; ++i) {
    const auto row = [&](int index) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + static_cast<size_t>(index) * stride));
    };
    r[i] = _mm512_broadcast_i32x4(row(i));
    r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x00f0, row(i + 4));
    r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x0f00, row(i + 8));
    r[i] = _mm512_mask_broadcast_i32x4(r[i], 0xf000, row(i + 12));
  }
  const __m512i low01 = _mm512_unpacklo_epi32(r[0], r[1]);
  const __m512i high01 = _mm512_unpackhi_epi32(r[0], r[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(r[2], r[3]);
  const __m512i high23 = _mm512_unpackhi_epi32(r[2], r[3]);
  out[0] = _mm512_unpacklo_epi64(low01, low23);
  out[1] = _mm512_unpackhi_epi64(low01, low23);
  out[2] = _mm512_unpacklo_epi64(high01, high23);
  out[3] = _mm512_unpackhi_epi64(high01, high23);
}

inline __m512 bf16_low(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
inline __m512 bf16_high(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline __m512 half_low(__m512i words) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }
inline __m512 half_high(__m512i words) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16))); }

// 16 tokens' (scale, min) pairs, fp16 -> fp32.
inline void load_params(const uint16_t* params, float* scale, float* min) {
  const __m512i words = _mm512_loadu_si512(params);
  _mm512_store_ps(scale, half_low(words));
  _mm512_store_ps(min, half_high(words));
}

inline __m512 codes_to_float(__m512i words, int shift, int mask) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, shift), _mm512_set1_epi32(mask)));
}

// ---- K: 16 tokens into the tile's columns [16 g, 16 g + 16)

// e4m3 codes in the low bytes: shifted, they are halves whose exponent is 8 too small.
__attribute__((always_inline)) inline __m512 e4m3_to_float(__m512i codes) {
  const __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi32(0x7f));
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(codes, _mm512_set1_epi32(0x80)), 8);
  const __m512i half = _mm512_or_si512(_mm512_slli_epi32(magnitude, 7), sign);
  const __m512 x = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(half)), _mm512_set1_ps(256.0f));
  const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f));
  return _mm512_mask_mov_ps(x, is_nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
}

void load_k_fp32(const AttendTask& task, const Scratch& s, const TokenGroup& group, int g) {
  float* out = s.k + g * kGroupTokens;  // row d at out + 64 d
  const int row_bytes = static_cast<int>(task.k.row_bytes);
  __m512 scale{}, min{};
  if (group.k_params) {
    load_params(group.k_params, s.k_scale + g * kGroupTokens, s.k_min + g * kGroupTokens);
    scale = _mm512_load_ps(s.k_scale + g * kGroupTokens);
    min = _mm512_load_ps(s.k_min + g * kGroupTokens);
  }
  for (int byte = 0; byte < row_bytes; byte += 16) {
    s.ahead->turn();
    __m512i words[4];
    transpose_16_rows(group.k + byte, task.k.row_bytes, words);
    for (int i = 0; i < 4; ++i) {
      switch (task.k.codec) {
        case KvCodec::kF32:
          _mm512_store_ps(out, _mm512_castsi512_ps(words[i]));
          out += kKvTileTokens;
          break;
        case KvCodec::kBF16:
          _mm512_store_ps(out, bf16_low(words[i]));
          _mm512_store_ps(out + kKvTileTokens, bf16_high(words[i]));
          out += 2 * kKvTileTokens;
          break;
        case KvCodec::kF16:
          _mm512_store_ps(out, half_low(words[i]));
          _mm512_store_ps(out + kKvTileTokens, half_high(words[i]));
          out += 2 * kKvTileTokens;
          break;
        case KvCodec::kInt8:
          for (int b = 0; b < 4; ++b, out += kKvTileTokens)
            _mm512_store_ps(out, _mm512_fmadd_ps(codes_to_float(words[i], 8 * b, 255), scale, min));
          break;
        case KvCodec::kInt4Rotated:
        case KvCodec::kInt4Plain:
          for (int b = 0; b < 8; ++b, out += kKvTileTokens)
            _mm512_store_ps(out, _mm512_fmadd_ps(codes_to_float(words[i], 4 * b, 15), scale, min));
          break;
        case KvCodec::kE4M3:
          for (int b = 0; b < 4; ++b, out += kKvTileTokens)
            _mm512_store_ps(out, e4m3_to_float(_mm512_srli_epi32(words[i], 8 * b)));
          break;
      }
    }
  }
}

// Lane t of group j holds four codes of token t. int8: d = 4j .. 4j + 3; int4: of each run of 8 elements the even ones,
// then the odd ones. pack_queries() puts q in the same order.
void load_k_codes(const AttendTask& task, const Scratch& s, const TokenGroup& group, int g) {
  load_params(group.k_params, s.k_scale + g * kGroupTokens, s.k_min + g * kGroupTokens);
  auto* out = reinterpret_cast<int32_t*>(s.k) + g * kGroupTokens;
  const int row_bytes = static_cast<int>(task.k.row_bytes);
  const __m512i nibble = _mm512_set1_epi8(15);
  const bool is_byte = task.k.codec == KvCodec::kInt8;
  for (int byte = 0; byte < row_bytes; byte += 16) {
    s.ahead->turn();
    __m512i words[4];
    transpose_16_rows(group.k + byte, task.k.row_bytes, words);
    for (int i = 0; i < 4; ++i) {
      if (is_byte) {
        _mm512_store_si512(out, words[i]);
        out += kKvTileTokens;
      } else {
        _mm512_store_si512(out, _mm512_and_si512(words[i], nibble));
        _mm512_store_si512(out + kKvTileTokens, _mm512_and_si512(_mm512_srli_epi32(words[i], 4), nibble));
        out += 2 * kKvTileTokens;
      }
    }
  }
}

// bf16 pairs as they are: lane t of row i holds elements 2i and 2i + 1 of token t. [D / 2, 64]
void load_k_pairs(const AttendTask& task, const Scratch& s, const TokenGroup& group, int g) {
  auto* out = reinterpret_cast<int32_t*>(s.k) + g * kGroupTokens;
  const int row_bytes = static_cast<int>(task.k.row_bytes);
  for (int byte = 0; byte < row_bytes; byte += 16) {
    s.ahead->turn();
    __m512i words[4];
    transpose_16_rows(group.k + byte, task.k.row_bytes, words);
    for (int i = 0; i < 4; ++i, out += kKvTileTokens) _mm512_store_si512(out, words[i]);
  }
}

// ---- V: 16 tokens into the tile's rows

void load_v_fp32(const AttendTask& task, const Scratch& s, const TokenGroup& group, int g) {
  const int head_dim = task.head_dim;
  const int pitch = partial_pitch(head_dim);
  if (group.v_params) load_params(group.v_params, s.v_scale + g * kGroupTokens, s.v_min + g * kGroupTokens);
  for (int t = 0; t < kGroupTokens; ++t) {
    const std::byte* row = group.v + t * task.v.row_bytes;
    float* out = s.v + static_cast<size_t>(g * kGroupTokens + t) * pitch;
    const __m512 scale = _mm512_set1_ps(s.v_scale[g * kGroupTokens + t]);
    const __m512 min = _mm512_set1_ps(s.v_min[g * kGroupTokens + t]);
    if (t % 2 == 0) s.ahead->turn();
    for (int d = 0; d < head_dim; d += 32, out += 32) {
      const int left = head_dim - d < 32 ? head_dim - d : 32;
      const uint32_t mask32 = left == 32 ? 0xffffffffu : (1u << left) - 1;
      const auto low_mask = static_cast<__mmask16>(mask32);
      const auto high_mask = static_cast<__mmask16>(mask32 >> 16);
      switch (task.v.codec) {
        case KvCodec::kF32: {
          const auto* x = reinterpret_cast<const float*>(row) + d;
          _mm512_store_ps(out, _mm512_maskz_loadu_ps(low_mask, x));
          _mm512_store_ps(out + 16, _mm512_maskz_loadu_ps(high_mask, x + 16));
          break;
        }
        case KvCodec::kBF16: {
          const __m512i words = _mm512_maskz_loadu_epi16(mask32, row + 2 * d);
          _mm512_store_ps(out, bf16_low(words));
          _mm512_store_ps(out + 16, bf16_high(words));
          break;
        }
        case KvCodec::kF16: {
          const __m512i words = _mm512_maskz_loadu_epi16(mask32, row + 2 * d);
          _mm512_store_ps(out, _mm512_cvtph_ps(_mm512_castsi512_si256(words)));
          _mm512_store_ps(out + 16, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1)));
          break;
        }
        case KvCodec::kInt8: {
          const __m256i bytes = _mm256_maskz_loadu_epi8(mask32, row + d);
          const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes)));
          const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1)));
          _mm512_store_ps(out, _mm512_fmadd_ps(low, scale, min));
          _mm512_store_ps(out + 16, _mm512_fmadd_ps(high, scale, min));
          break;
        }
        case KvCodec::kInt4Rotated:
        case KvCodec::kInt4Plain: {  // even elements, then odd ones
          const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << (left / 2)) - 1), row + d / 2);
          const __m512i words = _mm512_cvtepu8_epi32(bytes);
          _mm512_store_ps(out, _mm512_fmadd_ps(codes_to_float(words, 0, 15), scale, min));
          _mm512_store_ps(out + 16, _mm512_fmadd_ps(codes_to_float(words, 4, 15), scale, min));
          break;
        }
        case KvCodec::kE4M3: {
          const __m256i bytes = _mm256_maskz_loadu_epi8(mask32, row + d);
          _mm512_store_ps(out, e4m3_to_float(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes))));
          _mm512_store_ps(out + 16, e4m3_to_float(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1))));
          break;
        }
      }
    }
  }
}

// Byte-interleaves four rows: out[j] lane i * 4 + k holds byte 16 i + 4 j + k of the rows.
__attribute__((always_inline)) inline void interleave_4_rows(const __m512i r[4], __m512i out[4]) {
  const __m512i low01 = _mm512_unpacklo_epi8(r[0], r[1]);
  const __m512i high01 = _mm512_unpackhi_epi8(r[0], r[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(r[2], r[3]);
  const __m512i high23 = _mm512_unpackhi_epi8(r[2], r[3]);
  out[0] = _mm512_unpacklo_epi16(low01, low23);
  out[1] = _mm512_unpackhi_epi16(low01, low23);
  out[2] = _mm512_unpacklo_epi16(high01, high23);
  out[3] = _mm512_unpackhi_epi16(high01, high23);
}

// Each 32-bit lane holds one column of four tokens. [16 token groups, pitch]
void load_v_codes(const AttendTask& task, const Scratch& s, const TokenGroup& group, int g) {
  load_params(group.v_params, s.v_scale + g * kGroupTokens, s.v_min + g * kGroupTokens);
  const int head_dim = task.head_dim;
  const int pitch = partial_pitch(head_dim);
  auto* tile = reinterpret_cast<int32_t*>(s.v) + static_cast<size_t>(g) * 4 * pitch;
  if (task.v.codec == KvCodec::kInt8) {
    for (int quad = 0; quad < 4; ++quad) {
      const std::byte* rows = group.v + static_cast<size_t>(quad) * 4 * task.v.row_bytes;
      for (int d = 0; d < head_dim; d += 64) {
        s.ahead->turn();
        const __mmask64 mask = head_dim - d < 64 ? (__mmask64{1} << (head_dim - d)) - 1 : ~__mmask64{0};
        __m512i r[4], out[4];
        for (int i = 0; i < 4; ++i) r[i] = _mm512_maskz_loadu_epi8(mask, rows + i * task.v.row_bytes + d);
        interleave_4_rows(r, out);
        for (int i = 0; i < 4; ++i) _mm512_store_si512(tile + quad * pitch + d + i * 16, out[i]);
      }
    }
    return;
  }
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int quad = 0; quad < 4; quad += 2) {  // two quads side by side: a row of 64 codes is half a vector
    const std::byte* rows = group.v + static_cast<size_t>(quad) * 4 * task.v.row_bytes;
    for (int d = 0; d < head_dim; d += 64) {
      s.ahead->turn();
      const __mmask32 mask = head_dim - d < 64 ? (__mmask32{1} << ((head_dim - d) / 2)) - 1 : ~__mmask32{0};
      __m512i r[4], u[4];
      for (int i = 0; i < 4; ++i) {
        const std::byte* row = rows + i * task.v.row_bytes + d / 2;
        r[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(mask, row)),
                                  _mm256_maskz_loadu_epi8(mask, row + 4 * task.v.row_bytes), 1);
      }
      interleave_4_rows(r, u);
      for (int side = 0; side < 2; ++side) {
        int32_t* out = tile + (quad + side) * pitch + d;
        const __m512i first = side ? _mm512_shuffle_i64x2(u[0], u[1], 0xee) : _mm512_shuffle_i64x2(u[0], u[1], 0x44);
        const __m512i second = side ? _mm512_shuffle_i64x2(u[2], u[3], 0xee) : _mm512_shuffle_i64x2(u[2], u[3], 0x44);
        _mm512_store_si512(out, _mm512_and_si512(first, nibble));
        _mm512_store_si512(out + 16, _mm512_and_si512(_mm512_srli_epi16(first, 4), nibble));
        _mm512_store_si512(out + 32, _mm512_and_si512(second, nibble));
        _mm512_store_si512(out + 48, _mm512_and_si512(_mm512_srli_epi16(second, 4), nibble));
      }
    }
  }
}

// Where loading leaves element d of each 64: column value_columns(...)[d % 64] of the block.
struct ColumnOrder {
  alignas(64) int32_t column[kColumnBlock];
};
constexpr ColumnOrder column_order(bool is_code, bool is_nibble) {
  ColumnOrder order{};
  for (int d = 0; d < kColumnBlock; ++d) {
    if (is_code && is_nibble) {
      const int byte = d / 2;  // 16 i + 4 j + k
      const int i = byte / 16, j = byte % 16 / 4, k = byte % 4;
      order.column[d] = (j / 2) * 32 + (d % 2) * 16 + (j % 2) * 8 + i * 4 + k;
    } else if (is_code) {
      const int i = d / 16, j = d % 16 / 4, k = d % 4;
      order.column[d] = j * 16 + i * 4 + k;
    } else {
      order.column[d] = d - d % 32 + (d % 2) * 16 + d % 32 / 2;
    }
  }
  return order;
}
constexpr ColumnOrder kByteOrder = column_order(true, false);
constexpr ColumnOrder kNibbleOrder = column_order(true, true);
constexpr ColumnOrder kPairOrder = column_order(false, false);

// Null: as they lie in the page.
inline const int32_t* value_columns(KvCodec codec, bool is_code) {
  const bool is_nibble = codec == KvCodec::kInt4Rotated || codec == KvCodec::kInt4Plain;
  if (is_code) return is_nibble ? kNibbleOrder.column : kByteOrder.column;
  return is_nibble || codec == KvCodec::kBF16 ? kPairOrder.column : nullptr;
}

}  // namespace
}  // namespace partita
