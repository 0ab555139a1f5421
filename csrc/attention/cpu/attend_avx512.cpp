// AVX-512 tile arithmetic. Two dot products, chosen for K and for V separately:
//   fp32      float codecs, and everything in exact mode: K transposed to [D, 64], V [64, D], fused multiply-adds
//   integer   integer codecs: the codes stay bytes; q and p become 16-bit fixed point per row, 256 * high + low, and
//             VPDPBUSD sums codes times high and low exactly in int32; scale and minimum of each token come after
// VDPBF16PS was tried first and lost: it retires half the multiply-adds of fp32 FMA per cycle on Sapphire Rapids (one
// instruction in two cycles), a quarter of the two-VPDPBUSD scheme, and rounds q and p to 8 bits.
#include "attention/cpu/attend_kernel.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
// GCC 12 takes its own intrinsics' deliberately undefined operands for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "attention/cpu/attend_flow.h"

namespace partita {
namespace {

constexpr int kLanes = 16;
constexpr int kTileVecs = kKvTileTokens / kLanes;
constexpr int kColumnBlock = 64;            // columns of o per register block
constexpr float kFixedPointMax = 32639.0f;  // 127 * 256 + 127: both halves fit a signed byte

// Sixteen int32 sums. Not __m512i: GCC 12 keeps arrays of that type in memory when the intrinsics cast them, and the
// accumulators of a register block would live on the stack.
typedef int32_t Sums __attribute__((vector_size(64)));

// acc + sum of 4 unsigned codes times 4 signed weights, per lane.
inline Sums dot_codes(Sums acc, __m512i codes, __m512i weights) {
  return (Sums)_mm512_dpbusd_epi32((__m512i)acc, codes, weights);
}

inline __m512 exp2_lanes(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(kExp2Lowest));
  const __m512 rounder = _mm512_set1_ps(kExp2Rounder);
  const __m512 shifted = _mm512_add_ps(x, rounder);
  const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, rounder));
  __m512 poly = _mm512_fmadd_ps(_mm512_set1_ps(kExp2C5), f, _mm512_set1_ps(kExp2C4));
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(kExp2C3));
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(kExp2C2));
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(kExp2C1));
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(1.0f));
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(poly), exponent));
}

// tanh(x) = 1 - 2 / (2^(2 x log2 e) + 1)
inline __m512 tanh_lanes(__m512 x) {
  const __m512 y = _mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(2.0f * kLog2E)), _mm512_set1_ps(64.0f));
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(exp2_lanes(y), one)));
}

// 16 bytes of each of 16 rows -> out[i] holds 32-bit word i of every row, one row a lane. The 128-bit columns are
// gathered by masked broadcast loads, which leaves only 8 shuffles.
inline void transpose_16_rows(const std::byte* rows, size_t stride, __m512i out[4]) {
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
    __m512i words[4];
    transpose_16_rows(group.k + byte, task.k.row_bytes, words);
    for (int i = 0; i < 4; ++i, out += kKvTileTokens) _mm512_store_si512(out, words[i]);
  }
}

// ---- V: 16 tokens into the tile's rows

// Columns in the order that loading leaves: see column_of().
void load_v_fp32(const AttendTask& task, const Scratch& s, const TokenGroup& group, int g) {
  const int head_dim = task.head_dim;
  const int pitch = partial_pitch(head_dim);
  if (group.v_params) load_params(group.v_params, s.v_scale + g * kGroupTokens, s.v_min + g * kGroupTokens);
  for (int t = 0; t < kGroupTokens; ++t) {
    const std::byte* row = group.v + t * task.v.row_bytes;
    float* out = s.v + static_cast<size_t>(g * kGroupTokens + t) * pitch;
    const __m512 scale = _mm512_set1_ps(s.v_scale[g * kGroupTokens + t]);
    const __m512 min = _mm512_set1_ps(s.v_min[g * kGroupTokens + t]);
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
      }
    }
  }
}

// Byte-interleaves four rows: out[j] lane i * 4 + k holds byte 16 i + 4 j + k of the rows.
inline void interleave_4_rows(const __m512i r[4], __m512i out[4]) {
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

struct Avx512Tile {
  static constexpr int kRowBlock = 6;
  static constexpr int kCodeRows = 3;  // rows of a register block of the integer dot: two accumulators each

  static bool keeps_codes(const AttendTask& task, const KvStream& stream) {
    return !task.exact && has_params(stream.codec);
  }

  // A tile of bf16 for one row block is not worth widening in memory: K is transposed in pairs and V read where it
  // lies. The multiply-adds and their order are the same.
  static bool widens_late(const AttendTask& task, const KvStream& stream) {
    return stream.codec == KvCodec::kBF16 && task.num_rows <= kRowBlock;
  }

  // Two in each turn of the fp32 loops, over d and over (column block, token); four in each turn of the integer loops,
  // over 4 elements and over (column block, 4 tokens).
  static int k_prefetches(const AttendTask& task) {
    return keeps_codes(task, task.k) ? task.head_dim : 2 * task.head_dim;
  }
  static int v_prefetches(const AttendTask& task) {
    const int pitch = partial_pitch(task.head_dim);
    return keeps_codes(task, task.v) ? pitch : 2 * pitch;
  }
  template <int kCount>
  static void prefetch(const std::byte* const* lines) {
    for (int i = 0; i < kCount; ++i) __builtin_prefetch(lines[i], 0, 2);
  }

  static void rotate(float* x, int head_dim) {
    int size = 1;
    while (size < 256 && head_dim % (size * 2) == 0) size *= 2;
    kv_row_kernel_avx512().rotate(x, head_dim, size);
  }

  static void column_of(const AttendTask& task, int32_t* out) {
    const bool keeps = keeps_codes(task, task.v);
    const bool is_nibble = task.v.codec == KvCodec::kInt4Rotated || task.v.codec == KvCodec::kInt4Plain;
    for (int d = 0; d < task.head_dim; ++d) {
      const int in32 = d % 32;
      const int in64 = d % 64;
      if (keeps && is_nibble) {
        const int byte = in64 / 2;  // 16 i + 4 j + k
        const int i = byte / 16, j = byte % 16 / 4, k = byte % 4;
        out[d] = d - in64 + (j / 2) * 32 + (d % 2) * 16 + (j % 2) * 8 + i * 4 + k;
      } else if (keeps) {
        const int i = in64 / 16, j = in64 % 16 / 4, k = in64 % 4;
        out[d] = d - in64 + j * 16 + i * 4 + k;
      } else if (task.v.codec == KvCodec::kBF16 || is_nibble) {
        out[d] = d - in32 + (in32 % 2) * 16 + in32 / 2;
      } else {
        out[d] = d;
      }
    }
  }

  // out[d] = o[column_of[d]] * factor
  static void reorder(const float* o, const int32_t* column_of, float factor, int head_dim, float* out) {
    for (int d = 0; d < head_dim; d += 8) {
      const __m256i columns = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column_of + d));
      _mm256_storeu_ps(out + d, _mm256_mul_ps(_mm256_i32gather_ps(o, columns, 4), _mm256_set1_ps(factor)));
    }
  }

  // Scores come out in units of log2, or of the cap where there is one.
  static void pack_queries(const AttendTask& task, const Scratch& s) {
    const float factor = task.soft_cap > 0 ? task.scale / task.soft_cap : task.scale * kLog2E;
    const int head_dim = task.head_dim;
    const bool is_integer = keeps_codes(task, task.k);
    const bool is_nibble = task.k.codec != KvCodec::kInt8;
    for (int r = 0; r < task.num_rows; ++r) {
      const float* q = task.q + (r / task.group) * task.q_stride + static_cast<int64_t>(r % task.group) * head_dim;
      float* row = s.q + static_cast<size_t>(r) * head_dim;
      __m256 top = _mm256_setzero_ps();
      for (int d = 0; d < head_dim; d += 8) {
        const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(q + d), _mm256_set1_ps(factor));
        _mm256_storeu_ps(row + d, x);
        top = _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), top);
      }
      if (!is_integer) continue;
      const float largest = _mm512_reduce_max_ps(_mm512_zextps256_ps512(top));
      const bool is_tiny = !(largest > 1e-30f);
      const __m256 inverse = _mm256_set1_ps(is_tiny ? 0.0f : kFixedPointMax / largest);
      const float scale = is_tiny ? 0.0f : largest * (1.0f / kFixedPointMax);
      int8_t* high = s.q_high + static_cast<size_t>(r) * head_dim;
      int8_t* low = s.q_low + static_cast<size_t>(r) * head_dim;
      const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
      __m256i sums = _mm256_setzero_si256();
      for (int d = 0; d < head_dim; d += 8) {
        __m256i fixed = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(row + d), inverse));
        if (is_nibble) fixed = _mm256_permutevar8x32_epi32(fixed, order);
        sums = _mm256_add_epi32(sums, fixed);
        const __m256i rounded = _mm256_srai_epi32(_mm256_add_epi32(fixed, _mm256_set1_epi32(128)), 8);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(low + d), _mm256_cvtepi32_epi8(fixed));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(high + d), _mm256_cvtepi32_epi8(rounded));
      }
      s.q_scale[r] = scale;
      s.q_sum[r] = static_cast<float>(_mm512_reduce_add_epi32(_mm512_zextsi256_si512(sums))) * scale;
    }
  }

  static void load_tile(const AttendTask& task, const Scratch& s, const TokenGroup* groups, int num_groups) {
    for (int g = 0; g < num_groups; ++g) {
      if (keeps_codes(task, task.k)) {
        load_k_codes(task, s, groups[g], g);
      } else if (widens_late(task, task.k)) {
        load_k_pairs(task, s, groups[g], g);
      } else {
        load_k_fp32(task, s, groups[g], g);
      }
      if (keeps_codes(task, task.v)) {
        load_v_codes(task, s, groups[g], g);
      } else if (!widens_late(task, task.v)) {
        load_v_fp32(task, s, groups[g], g);
      }
    }
    // softmax_row multiplies these by p = 0, so they must be finite.
    for (int g = num_groups; g < kTileGroups; ++g) {
      _mm512_store_ps(s.v_scale + g * kGroupTokens, _mm512_setzero_ps());
      _mm512_store_ps(s.v_min + g * kGroupTokens, _mm512_setzero_ps());
    }
  }

  template <int R, bool kPrefetches>
  static void score_fp32(const Scratch& s, int head_dim, const float* q) {
    __m512 acc[R][kTileVecs];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < kTileVecs; ++n) acc[r][n] = _mm512_setzero_ps();
    const float* k = s.k;
    for (int d = 0; d < head_dim; ++d, k += kKvTileTokens) {
      if (kPrefetches) prefetch<2>(s.k_lines + 2 * d);
      __m512 keys[kTileVecs];
      for (int n = 0; n < kTileVecs; ++n) keys[n] = _mm512_load_ps(k + n * kLanes);
      for (int r = 0; r < R; ++r) {
        const __m512 query = _mm512_set1_ps(q[r * head_dim + d]);
        for (int n = 0; n < kTileVecs; ++n) acc[r][n] = _mm512_fmadd_ps(query, keys[n], acc[r][n]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < kTileVecs; ++n) _mm512_store_ps(s.scores + r * kKvTileTokens + n * kLanes, acc[r][n]);
  }

  template <int R, bool kPrefetches>
  static void score_pairs(const Scratch& s, int head_dim, const float* q) {
    __m512 acc[R][kTileVecs];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < kTileVecs; ++n) acc[r][n] = _mm512_setzero_ps();
    const auto* k = reinterpret_cast<const int32_t*>(s.k);
    for (int d = 0; d < head_dim; d += 2, k += kKvTileTokens) {
      if (kPrefetches) prefetch<4>(s.k_lines + 2 * d);
      __m512i pairs[kTileVecs];
      __m512 keys[kTileVecs];
      for (int n = 0; n < kTileVecs; ++n) pairs[n] = _mm512_load_si512(k + n * kLanes);
      for (int n = 0; n < kTileVecs; ++n) keys[n] = bf16_low(pairs[n]);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < kTileVecs; ++n)
          acc[r][n] = _mm512_fmadd_ps(_mm512_set1_ps(q[r * head_dim + d]), keys[n], acc[r][n]);
      for (int n = 0; n < kTileVecs; ++n) keys[n] = bf16_high(pairs[n]);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < kTileVecs; ++n)
          acc[r][n] = _mm512_fmadd_ps(_mm512_set1_ps(q[r * head_dim + d + 1]), keys[n], acc[r][n]);
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < kTileVecs; ++n) _mm512_store_ps(s.scores + r * kKvTileTokens + n * kLanes, acc[r][n]);
  }

  // 256 * high + low of an exact integer dot product, |high| < 2^24.
  static __m512 join(Sums high, Sums low) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps((__m512i)low));
  }

  static int32_t four_bytes(const int8_t* at) {
    int32_t word;
    std::memcpy(&word, at, sizeof word);
    return word;
  }

  // Rows [first, first + R) of the block.
  template <int R, bool kPrefetches>
  static void score_codes(const Scratch& s, int head_dim, int row, int first) {
    Sums high[R][kTileVecs], low[R][kTileVecs];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < kTileVecs; ++n) high[r][n] = low[r][n] = Sums{};
    const auto* k = reinterpret_cast<const int32_t*>(s.k);
    const int8_t* q_high = s.q_high + static_cast<size_t>(row + first) * head_dim;
    const int8_t* q_low = s.q_low + static_cast<size_t>(row + first) * head_dim;
    for (int d = 0; d < head_dim; d += 4, k += kKvTileTokens) {
      if (kPrefetches) prefetch<4>(s.k_lines + d);
      __m512i keys[kTileVecs];
      for (int n = 0; n < kTileVecs; ++n) keys[n] = _mm512_load_si512(k + n * kLanes);
      for (int r = 0; r < R; ++r) {
        const __m512i query_high = _mm512_set1_epi32(four_bytes(q_high + r * head_dim + d));
        for (int n = 0; n < kTileVecs; ++n) high[r][n] = dot_codes(high[r][n], keys[n], query_high);
        const __m512i query_low = _mm512_set1_epi32(four_bytes(q_low + r * head_dim + d));
        for (int n = 0; n < kTileVecs; ++n) low[r][n] = dot_codes(low[r][n], keys[n], query_low);
      }
    }
    for (int r = 0; r < R; ++r) {
      const __m512 q_scale = _mm512_set1_ps(s.q_scale[row + first + r]);
      const __m512 q_sum = _mm512_set1_ps(s.q_sum[row + first + r]);
      for (int n = 0; n < kTileVecs; ++n) {
        const __m512 codes = _mm512_mul_ps(join(high[r][n], low[r][n]), q_scale);
        const __m512 offset = _mm512_mul_ps(_mm512_load_ps(s.k_min + n * kLanes), q_sum);
        _mm512_store_ps(s.scores + (first + r) * kKvTileTokens + n * kLanes,
                        _mm512_fmadd_ps(codes, _mm512_load_ps(s.k_scale + n * kLanes), offset));
      }
    }
  }

  // scores -> p (fp32, or fixed point with the codec's scale folded in), alpha; updates m, l and l_min of the rows.
  template <bool kIsMasked, bool kIsCapped, bool kCodes>
  static void softmax_rows(const AttendTask& task, const Scratch& s, int row, int num_rows, const int* lows,
                           const int* highs) {
    const __m512 nothing = _mm512_set1_ps(kNoScore);
    for (int r = 0; r < num_rows; ++r, ++row) {
      __m512 x[kTileVecs];
      __mmask16 seen[kTileVecs];
      if (kIsMasked) {
        const uint64_t below_high = highs[r] >= 64 ? ~uint64_t{0} : (uint64_t{1} << highs[r]) - 1;
        const uint64_t below_low = lows[r] >= 64 ? ~uint64_t{0} : (uint64_t{1} << lows[r]) - 1;
        const uint64_t mask = below_high & ~below_low;
        for (int n = 0; n < kTileVecs; ++n) seen[n] = static_cast<__mmask16>(mask >> (16 * n));
      }
      for (int n = 0; n < kTileVecs; ++n) {
        x[n] = _mm512_load_ps(s.scores + r * kKvTileTokens + n * kLanes);
        if (kIsCapped) x[n] = _mm512_mul_ps(tanh_lanes(x[n]), _mm512_set1_ps(task.soft_cap * kLog2E));
        if (kIsMasked) x[n] = _mm512_mask_blend_ps(seen[n], nothing, x[n]);
      }
      const float tile_max = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3])));
      const float m_old = s.m[row];
      const float m_new = tile_max > m_old ? tile_max : m_old;
      const __m512 m_lanes = _mm512_set1_ps(m_new);
      const __m512 alpha = exp2_lanes(_mm512_sub_ps(_mm512_set1_ps(m_old), m_lanes));
      s.m[row] = m_new;
      s.alpha[r] = _mm512_cvtss_f32(alpha);
      for (int n = 0; n < kTileVecs; ++n) {
        x[n] = exp2_lanes(_mm512_sub_ps(x[n], m_lanes));
        if (kIsMasked) x[n] = _mm512_maskz_mov_ps(seen[n], x[n]);
      }
      const __m512 sum = _mm512_add_ps(_mm512_add_ps(x[0], x[1]), _mm512_add_ps(x[2], x[3]));
      float* l = s.l + static_cast<size_t>(row) * kStateLanes;
      _mm512_store_ps(l, _mm512_fmadd_ps(_mm512_load_ps(l), alpha, sum));
      if (!kCodes) {
        for (int n = 0; n < kTileVecs; ++n) _mm512_store_ps(s.p + r * kKvTileTokens + n * kLanes, x[n]);
        continue;
      }
      __m512 min_sum = _mm512_setzero_ps();
      for (int n = 0; n < kTileVecs; ++n) {
        min_sum = _mm512_fmadd_ps(x[n], _mm512_load_ps(s.v_min + n * kLanes), min_sum);
        x[n] = _mm512_mul_ps(x[n], _mm512_load_ps(s.v_scale + n * kLanes));
      }
      float* l_min = s.l_min + static_cast<size_t>(row) * kStateLanes;
      _mm512_store_ps(l_min, _mm512_fmadd_ps(_mm512_load_ps(l_min), alpha, min_sum));
      const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3])));
      const bool is_tiny = !(largest > 1e-30f);
      s.p_scale[r] = is_tiny ? 0.0f : largest * (1.0f / kFixedPointMax);
      const __m512 inverse = _mm512_set1_ps(is_tiny ? 0.0f : kFixedPointMax / largest);
      __m512i fixed[kTileVecs];
      for (int n = 0; n < kTileVecs; ++n) fixed[n] = _mm512_cvtps_epi32(_mm512_mul_ps(x[n], inverse));
      // 64 values of 15 bits -> 64 low and 64 high bytes. Packing leaves dword 4 i + j = tokens 16 j + 4 i ..:
      // transposed.
      const __m512i words01 = _mm512_packs_epi32(fixed[0], fixed[1]);
      const __m512i words23 = _mm512_packs_epi32(fixed[2], fixed[3]);
      const __m512i low_byte = _mm512_set1_epi16(255);
      const __m512i half = _mm512_set1_epi16(128);
      const __m512i low = _mm512_packus_epi16(_mm512_and_si512(words01, low_byte), _mm512_and_si512(words23, low_byte));
      const __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(_mm512_add_epi16(words01, half), 8),
                                               _mm512_srli_epi16(_mm512_add_epi16(words23, half), 8));
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      _mm512_store_si512(s.p_low + r * kKvTileTokens, _mm512_permutexvar_epi32(order, low));
      _mm512_store_si512(s.p_high + r * kKvTileTokens, _mm512_permutexvar_epi32(order, high));
    }
  }

  template <int R, int N, bool kPrefetches>
  static void accumulate_fp32(const Scratch& s, int row, int column, int pitch, int num_tokens) {
    float* o = s.o + static_cast<size_t>(row) * pitch + column;
    __m512 acc[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n)
        acc[r][n] =
            _mm512_mul_ps(_mm512_load_ps(o + static_cast<size_t>(r) * pitch + n * kLanes), _mm512_set1_ps(s.alpha[r]));
    const float* v = s.v + column;
    for (int t = 0; t < num_tokens; ++t, v += pitch) {
      if (kPrefetches) prefetch<2>(s.v_lines + 2 * column + 2 * t);
      __m512 values[N];
      for (int n = 0; n < N; ++n) values[n] = _mm512_load_ps(v + n * kLanes);
      for (int r = 0; r < R; ++r) {
        const __m512 p = _mm512_set1_ps(s.p[r * kKvTileTokens + t]);
        for (int n = 0; n < N; ++n) acc[r][n] = _mm512_fmadd_ps(p, values[n], acc[r][n]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) _mm512_store_ps(o + static_cast<size_t>(r) * pitch + n * kLanes, acc[r][n]);
  }

  // V straight from its pages: each 32 elements as 16 even ones, then 16 odd ones.
  template <int R, int N, bool kPrefetches>
  static void accumulate_pairs(const AttendTask& task, const Scratch& s, int row, int column, int num_groups) {
    const int pitch = partial_pitch(task.head_dim);
    float* o = s.o + static_cast<size_t>(row) * pitch + column;
    const int left = task.head_dim - column;
    __mmask32 masks[N / 2];
    for (int n = 0; n < N / 2; ++n) masks[n] = left >= 32 * (n + 1) ? 0xffffffffu : (1u << (left - 32 * n)) - 1;
    __m512 acc[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n)
        acc[r][n] =
            _mm512_mul_ps(_mm512_load_ps(o + static_cast<size_t>(r) * pitch + n * kLanes), _mm512_set1_ps(s.alpha[r]));
    for (int g = 0; g < num_groups; ++g) {
      const std::byte* v = s.groups[g].v + 2 * column;
      for (int t = g * kGroupTokens; t < (g + 1) * kGroupTokens; ++t, v += task.v.row_bytes) {
        if (kPrefetches) prefetch<2>(s.v_lines + 2 * column + 2 * t);
        __m512 values[N];
        for (int n = 0; n < N / 2; ++n) {
          const __m512i pairs = _mm512_maskz_loadu_epi16(masks[n], v + 64 * n);
          values[2 * n] = bf16_low(pairs);
          values[2 * n + 1] = bf16_high(pairs);
        }
        for (int r = 0; r < R; ++r) {
          const __m512 p = _mm512_set1_ps(s.p[r * kKvTileTokens + t]);
          for (int n = 0; n < N; ++n) acc[r][n] = _mm512_fmadd_ps(p, values[n], acc[r][n]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) _mm512_store_ps(o + static_cast<size_t>(r) * pitch + n * kLanes, acc[r][n]);
  }

  template <int R, bool kPrefetches>
  static void accumulate_codes(const Scratch& s, int row, int first, int pitch, int num_tokens) {
    constexpr int kVecs = kColumnBlock / kLanes;
    for (int column = 0; column < pitch; column += kColumnBlock) {
      Sums high[R][kVecs], low[R][kVecs];
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < kVecs; ++n) high[r][n] = low[r][n] = Sums{};
      const auto* v = reinterpret_cast<const int32_t*>(s.v) + column;
      for (int t = 0; t < num_tokens; t += 4, v += pitch) {
        if (kPrefetches) prefetch<4>(s.v_lines + column + t);
        __m512i values[kVecs];
        for (int n = 0; n < kVecs; ++n) values[n] = _mm512_load_si512(v + n * kLanes);
        for (int r = 0; r < R; ++r) {
          const __m512i p_high = _mm512_set1_epi32(four_bytes(s.p_high + (first + r) * kKvTileTokens + t));
          for (int n = 0; n < kVecs; ++n) high[r][n] = dot_codes(high[r][n], values[n], p_high);
          const __m512i p_low = _mm512_set1_epi32(four_bytes(s.p_low + (first + r) * kKvTileTokens + t));
          for (int n = 0; n < kVecs; ++n) low[r][n] = dot_codes(low[r][n], values[n], p_low);
        }
      }
      for (int r = 0; r < R; ++r) {
        float* o = s.o + static_cast<size_t>(row + first + r) * pitch + column;
        const __m512 alpha = _mm512_set1_ps(s.alpha[first + r]);
        const __m512 p_scale = _mm512_set1_ps(s.p_scale[first + r]);
        for (int n = 0; n < kVecs; ++n) {
          const __m512 added = _mm512_mul_ps(join(high[r][n], low[r][n]), p_scale);
          _mm512_store_ps(o + n * kLanes, _mm512_fmadd_ps(_mm512_load_ps(o + n * kLanes), alpha, added));
        }
      }
    }
  }

  template <int R, bool kPrefetches>
  static void attend_rows(const AttendTask& task, const Scratch& s, int row, int num_groups, const int* lows,
                          const int* highs, bool is_masked) {
    constexpr int kFirst = R < kCodeRows ? R : kCodeRows;
    constexpr int kSecond = R - kFirst;
    const int head_dim = task.head_dim;
    const int pitch = partial_pitch(head_dim);
    const int num_tokens = num_groups * kGroupTokens;
    const bool v_codes = keeps_codes(task, task.v);
    if (keeps_codes(task, task.k)) {
      score_codes<kFirst, kPrefetches>(s, head_dim, row, 0);
      if constexpr (kSecond > 0) score_codes<kSecond, false>(s, head_dim, row, kFirst);
    } else if (widens_late(task, task.k)) {
      score_pairs<R, kPrefetches>(s, head_dim, s.q + static_cast<size_t>(row) * head_dim);
    } else {
      score_fp32<R, kPrefetches>(s, head_dim, s.q + static_cast<size_t>(row) * head_dim);
    }
    if (task.soft_cap > 0) {
      (v_codes ? softmax_rows<true, true, true> : softmax_rows<true, true, false>)(task, s, row, R, lows, highs);
    } else if (is_masked) {
      (v_codes ? softmax_rows<true, false, true> : softmax_rows<true, false, false>)(task, s, row, R, lows, highs);
    } else {
      (v_codes ? softmax_rows<false, false, true> : softmax_rows<false, false, false>)(task, s, row, R, lows, highs);
    }
    if (v_codes) {
      accumulate_codes<kFirst, kPrefetches>(s, row, 0, pitch, num_tokens);
      if constexpr (kSecond > 0) accumulate_codes<kSecond, false>(s, row, kFirst, pitch, num_tokens);
    } else if (widens_late(task, task.v)) {
      int column = 0;
      for (; column + kColumnBlock <= head_dim; column += kColumnBlock)
        accumulate_pairs<R, kColumnBlock / kLanes, kPrefetches>(task, s, row, column, num_groups);
      for (; column < head_dim; column += 32) accumulate_pairs<R, 2, kPrefetches>(task, s, row, column, num_groups);
    } else {
      int column = 0;
      for (; column + kColumnBlock <= head_dim; column += kColumnBlock)
        accumulate_fp32<R, kColumnBlock / kLanes, kPrefetches>(s, row, column, pitch, num_tokens);
      for (; column < head_dim; column += 32) accumulate_fp32<R, 2, kPrefetches>(s, row, column, pitch, num_tokens);
    }
  }

  template <bool kPrefetches>
  static void attend_counted(const AttendTask& task, const Scratch& s, int row, int num_rows, int num_groups,
                             const int* lows, const int* highs, bool is_masked) {
    switch (num_rows) {
      case 1:
        return attend_rows<1, kPrefetches>(task, s, row, num_groups, lows, highs, is_masked);
      case 2:
        return attend_rows<2, kPrefetches>(task, s, row, num_groups, lows, highs, is_masked);
      case 3:
        return attend_rows<3, kPrefetches>(task, s, row, num_groups, lows, highs, is_masked);
      case 4:
        return attend_rows<4, kPrefetches>(task, s, row, num_groups, lows, highs, is_masked);
      case 5:
        return attend_rows<5, kPrefetches>(task, s, row, num_groups, lows, highs, is_masked);
      default:
        return attend_rows<6, kPrefetches>(task, s, row, num_groups, lows, highs, is_masked);
    }
  }

  static void attend_block(const AttendTask& task, const Scratch& s, int row, int num_rows, int num_groups,
                           const int* lows, const int* highs, bool is_masked) {
    (row == 0 ? attend_counted<true> : attend_counted<false>)(task, s, row, num_rows, num_groups, lows, highs,
                                                              is_masked);
  }
};

constexpr AttendKernel kAvx512Kernel{attend_scratch_bytes, attend_task<Avx512Tile>, merge_task<Avx512Tile>};

}  // namespace

const AttendKernel& attend_kernel_avx512() { return kAvx512Kernel; }
}  // namespace partita

#else  // a machine of another kind: never chosen there
namespace partita {
const AttendKernel& attend_kernel_avx512() { return attend_kernel_portable(); }
}  // namespace partita
#endif
