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

#include "attention/cpu/kv_tile_avx512.h"

namespace partita {
namespace {

constexpr float kFixedPointMax = 32639.0f;  // 127 * 256 + 127: both halves fit a signed byte

// Accumulators of a register block. Not __m512i: GCC 12 keeps arrays of that type in memory when the intrinsics cast
// them, and the accumulators would live on the stack. (With __m512 no difference could be measured.)
typedef int32_t Sums __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

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

constexpr int kReducedRows = 8;

// Lane r: the largest of rows[r]; only the first num_rows lanes mean anything.
inline __m512 largest_of_rows(const float (*rows)[kLanes], int num_rows) {
  __m512 quads[2];  // in each 128-bit lane, one of four rows an element
  for (int i = 0; i < 2; ++i) {
    const auto row = [&](int index) { return _mm512_load_ps(rows[index < num_rows ? index : 0]); };
    const __m512 a = row(4 * i), b = row(4 * i + 1), c = row(4 * i + 2), d = row(4 * i + 3);
    const __m512d ab = _mm512_castps_pd(_mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(_mm512_max_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    quads[i] =
        _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  __m512 top =
      _mm512_max_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x44), _mm512_shuffle_f32x4(quads[0], quads[1], 0xee));
  top = _mm512_max_ps(top, _mm512_shuffle_f32x4(top, top, 0xb1));
  return _mm512_shuffle_f32x4(top, top, 0x08);
}

struct Avx512Tile {
  static constexpr int kRowBlock = 6;
  static constexpr bool kAsksAhead = true;
  static constexpr int kCodeRows = 3;  // rows of a register block of the integer dot: two accumulators each

  static bool keeps_codes(const AttendTask& task, const KvStream& stream) {
    return !task.exact && has_params(stream.codec);
  }

  // One row block's tile of bf16 is not worth widening in memory: K is transposed in pairs and V read where it lies.
  // The multiply-adds and their order are the same.
  static bool keeps_pairs(const AttendTask& task, const KvStream& stream) {
    return stream.codec == KvCodec::kBF16 && task.num_rows <= kRowBlock;
  }

  // A turn takes 15 to 20 cycles; the fp32 loops that many row blocks share have none.
  static int turns_per_tile(const AttendTask& task) {
    const int head_dim = task.head_dim;
    const int column_blocks = partial_pitch(head_dim) / kColumnBlock;
    int turns = static_cast<int>(task.k.row_bytes) / 16 * kTileGroups;
    if (keeps_codes(task, task.k)) {
      turns += head_dim / 4;
    } else if (keeps_pairs(task, task.k)) {
      turns += head_dim / 2;
    }
    if (!keeps_codes(task, task.v)) return turns + kKvTileTokens / 2 * (keeps_pairs(task, task.v) ? column_blocks : 1);
    const int quads = kKvTileTokens / 4;
    return turns + (task.v.codec == KvCodec::kInt8 ? 2 * quads : quads + quads / 2) * column_blocks;
  }

  static void rotate(float* x, int head_dim) {
    int size = 1;
    while (size < 256 && head_dim % (size * 2) == 0) size *= 2;
    kv_row_kernel_avx512().rotate(x, head_dim, size);
  }

  // out[d] = o[column of d] * factor. Adding zero: merging with a split that the row does not see turns -0 into 0.
  static void write_row(const AttendTask& task, const float* o, float factor, float* out) {
    const int32_t* columns = value_columns(task.v.codec, keeps_codes(task, task.v));
    for (int d = 0; d < task.head_dim; d += kLanes) {
      const int left = task.head_dim - d;
      const auto mask = static_cast<__mmask16>(left >= kLanes ? 0xffff : (1 << left) - 1);
      const float* block = o + d / kColumnBlock * kColumnBlock;
      __m512 x = _mm512_load_ps(o + d);
      if (columns) {
        const __m512i column = _mm512_load_si512(columns + d % kColumnBlock);
        x = _mm512_permutex2var_ps(_mm512_load_ps(block), column, _mm512_load_ps(block + 16));
        const __m512 upper = _mm512_permutex2var_ps(_mm512_load_ps(block + 32), column, _mm512_load_ps(block + 48));
        x = _mm512_mask_mov_ps(x, _mm512_test_epi32_mask(column, _mm512_set1_epi32(32)), upper);
      }
      _mm512_mask_storeu_ps(out + d, mask,
                            _mm512_mul_ps(_mm512_add_ps(x, _mm512_setzero_ps()), _mm512_set1_ps(factor)));
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
      for (int d = 0; d < head_dim; d += 8)
        _mm256_storeu_ps(row + d, _mm256_mul_ps(_mm256_loadu_ps(q + d), _mm256_set1_ps(factor)));
      if (!is_integer) continue;
      __m256 top = _mm256_setzero_ps();
      for (int d = 0; d < head_dim; d += 8)
        top = _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(row + d)), top);
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
      } else if (keeps_pairs(task, task.k)) {
        load_k_pairs(task, s, groups[g], g);
      } else {
        load_k_fp32(task, s, groups[g], g);
      }
      if (keeps_codes(task, task.v)) {
        load_v_codes(task, s, groups[g], g);
      } else if (!keeps_pairs(task, task.v)) {
        load_v_fp32(task, s, groups[g], g);
      }
    }
    // softmax_rows multiplies these by p = 0, so they must be finite.
    for (int g = num_groups; g < kTileGroups; ++g) {
      _mm512_store_ps(s.v_scale + g * kGroupTokens, _mm512_setzero_ps());
      _mm512_store_ps(s.v_min + g * kGroupTokens, _mm512_setzero_ps());
    }
  }

  template <int R>
  static void score_fp32(const Scratch& s, int head_dim, const float* q) {
    Floats acc[R][kTileVecs];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < kTileVecs; ++n) acc[r][n] = Floats{};
    const float* k = s.k;
    for (int d = 0; d < head_dim; ++d, k += kKvTileTokens) {
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

  // The first N groups; K as pairs of bf16, [D / 2, 64].
  template <int R, int N>
  static void score_pairs(const Scratch& s, int head_dim, const float* q) {
    Floats acc[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) acc[r][n] = Floats{};
    const auto* k = reinterpret_cast<const int32_t*>(s.k);
    for (int d = 0; d < head_dim; d += 2, k += kKvTileTokens) {
      s.ahead->turn();
      __m512i pairs[N];
      __m512 keys[N];
      for (int n = 0; n < N; ++n) pairs[n] = _mm512_load_si512(k + n * kLanes);
      for (int n = 0; n < N; ++n) keys[n] = bf16_low(pairs[n]);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n)
          acc[r][n] = _mm512_fmadd_ps(_mm512_set1_ps(q[r * head_dim + d]), keys[n], acc[r][n]);
      for (int n = 0; n < N; ++n) keys[n] = bf16_high(pairs[n]);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n)
          acc[r][n] = _mm512_fmadd_ps(_mm512_set1_ps(q[r * head_dim + d + 1]), keys[n], acc[r][n]);
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) _mm512_store_ps(s.scores + r * kKvTileTokens + n * kLanes, acc[r][n]);
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
  template <int R, bool kAsks>
  static void score_codes(const Scratch& s, int head_dim, int row, int first) {
    Sums high[R][kTileVecs], low[R][kTileVecs];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < kTileVecs; ++n) high[r][n] = low[r][n] = Sums{};
    const auto* k = reinterpret_cast<const int32_t*>(s.k);
    const int8_t* q_high = s.q_high + static_cast<size_t>(row + first) * head_dim;
    const int8_t* q_low = s.q_low + static_cast<size_t>(row + first) * head_dim;
    for (int d = 0; d < head_dim; d += 4, k += kKvTileTokens) {
      if (kAsks) s.ahead->turn();
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
  // What is one number of a row is worked out for all rows at once, a row a lane.
  template <bool kIsMasked, bool kIsCapped, bool kCodes>
  static void softmax_rows(const AttendTask& task, const Scratch& s, int row, int num_rows, const int* lows,
                           const int* highs) {
    const __m512 nothing = _mm512_set1_ps(kNoScore);
    const auto row_mask = static_cast<__mmask16>((1 << num_rows) - 1);
    alignas(64) float tops[kReducedRows][kLanes];
    uint64_t seen[kMaxRowBlock];
    for (int r = 0; r < num_rows; ++r) {
      __m512 x[kTileVecs];
      float* scores = s.scores + r * kKvTileTokens;
      for (int n = 0; n < kTileVecs; ++n) x[n] = _mm512_load_ps(scores + n * kLanes);
      if (kIsMasked) {
        const uint64_t below_high = highs[r] >= 64 ? ~uint64_t{0} : (uint64_t{1} << highs[r]) - 1;
        const uint64_t below_low = lows[r] >= 64 ? ~uint64_t{0} : (uint64_t{1} << lows[r]) - 1;
        seen[r] = below_high & ~below_low;
        for (int n = 0; n < kTileVecs; ++n) {
          if (kIsCapped) x[n] = _mm512_mul_ps(tanh_lanes(x[n]), _mm512_set1_ps(task.soft_cap * kLog2E));
          x[n] = _mm512_mask_blend_ps(static_cast<__mmask16>(seen[r] >> (16 * n)), nothing, x[n]);
          _mm512_store_ps(scores + n * kLanes, x[n]);
        }
      }
      _mm512_store_ps(tops[r], _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3])));
    }
    const __m512 m_old = _mm512_maskz_loadu_ps(row_mask, s.m + row);
    const __m512 m_new = _mm512_max_ps(largest_of_rows(tops, num_rows), m_old);
    _mm512_mask_storeu_ps(s.m + row, row_mask, m_new);
    alignas(64) float tile_max[kLanes];
    _mm512_store_ps(tile_max, m_new);
    _mm512_store_ps(s.alpha, exp2_lanes(_mm512_sub_ps(m_old, m_new)));

    for (int r = 0; r < num_rows; ++r) {
      __m512 x[kTileVecs];
      const __m512 m_lanes = _mm512_set1_ps(tile_max[r]);
      const __m512 alpha = _mm512_set1_ps(s.alpha[r]);
      for (int n = 0; n < kTileVecs; ++n) {
        x[n] = exp2_lanes(_mm512_sub_ps(_mm512_load_ps(s.scores + r * kKvTileTokens + n * kLanes), m_lanes));
        if (kIsMasked) x[n] = _mm512_maskz_mov_ps(static_cast<__mmask16>(seen[r] >> (16 * n)), x[n]);
      }
      const __m512 sum = _mm512_add_ps(_mm512_add_ps(x[0], x[1]), _mm512_add_ps(x[2], x[3]));
      float* l = s.l + static_cast<size_t>(row + r) * kStateLanes;
      _mm512_store_ps(l, _mm512_fmadd_ps(_mm512_load_ps(l), alpha, sum));
      if (kCodes) {
        __m512 min_sum = _mm512_setzero_ps();
        for (int n = 0; n < kTileVecs; ++n) {
          min_sum = _mm512_fmadd_ps(x[n], _mm512_load_ps(s.v_min + n * kLanes), min_sum);
          x[n] = _mm512_mul_ps(x[n], _mm512_load_ps(s.v_scale + n * kLanes));
        }
        float* l_min = s.l_min + static_cast<size_t>(row + r) * kStateLanes;
        _mm512_store_ps(l_min, _mm512_fmadd_ps(_mm512_load_ps(l_min), alpha, min_sum));
        _mm512_store_ps(tops[r], _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3])));
      }
      for (int n = 0; n < kTileVecs; ++n) _mm512_store_ps(s.p + r * kKvTileTokens + n * kLanes, x[n]);
    }
    if (kCodes) fix_points(s, num_rows, largest_of_rows(tops, num_rows));
  }

  // p -> 15-bit fixed point in units of p_scale, 256 * high + low.  largest: of each row, a row a lane
  static void fix_points(const Scratch& s, int num_rows, __m512 largest) {
    const __mmask16 is_sized = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(1e-30f), _CMP_GT_OQ);
    _mm512_store_ps(s.p_scale, _mm512_maskz_mul_ps(is_sized, largest, _mm512_set1_ps(1.0f / kFixedPointMax)));
    alignas(64) float inverses[kLanes];
    _mm512_store_ps(inverses, _mm512_maskz_div_ps(is_sized, _mm512_set1_ps(kFixedPointMax), largest));
    for (int r = 0; r < num_rows; ++r) {
      const __m512 inverse = _mm512_set1_ps(inverses[r]);
      __m512i fixed[kTileVecs];
      for (int n = 0; n < kTileVecs; ++n)
        fixed[n] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(s.p + r * kKvTileTokens + n * kLanes), inverse));
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

  template <int R, int N>
  static void accumulate_fp32(const Scratch& s, int row, int column, int pitch, int num_tokens) {
    float* o = s.o + static_cast<size_t>(row) * pitch + column;
    Floats acc[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n)
        acc[r][n] =
            _mm512_mul_ps(_mm512_load_ps(o + static_cast<size_t>(r) * pitch + n * kLanes), _mm512_set1_ps(s.alpha[r]));
    const float* v = s.v + column;
    for (int t = 0; t < num_tokens; ++t, v += pitch) {
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
  template <int R, int N>
  static void accumulate_pages(const AttendTask& task, const Scratch& s, int column, int num_groups) {
    const int pitch = partial_pitch(task.head_dim);
    float* o = s.o + column;
    const int left = task.head_dim - column;
    const __mmask32 tail = left >= 32 ? 0xffffffffu : (1u << left) - 1;
    Floats acc[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n)
        acc[r][n] =
            _mm512_mul_ps(_mm512_load_ps(o + static_cast<size_t>(r) * pitch + n * kLanes), _mm512_set1_ps(s.alpha[r]));
    for (int g = 0; g < num_groups; ++g) {
      const std::byte* v = s.groups[g].v + 2 * column;
      for (int t = g * kGroupTokens; t < (g + 1) * kGroupTokens; ++t) {
        if (t % 2 == 0) s.ahead->turn();
        __m512 values[N];
        for (int n = 0; n < N / 2; ++n) {
          const __m512i pairs = N > 2 ? _mm512_loadu_si512(v + 64 * n) : _mm512_maskz_loadu_epi16(tail, v);
          values[2 * n] = bf16_low(pairs);
          values[2 * n + 1] = bf16_high(pairs);
        }
        for (int r = 0; r < R; ++r) {
          const __m512 p = _mm512_set1_ps(s.p[r * kKvTileTokens + t]);
          for (int n = 0; n < N; ++n) acc[r][n] = _mm512_fmadd_ps(p, values[n], acc[r][n]);
        }
        v += task.v.row_bytes;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) _mm512_store_ps(o + static_cast<size_t>(r) * pitch + n * kLanes, acc[r][n]);
  }

  template <int R, bool kAsks>
  static void accumulate_codes(const Scratch& s, int row, int first, int pitch, int num_tokens) {
    constexpr int kVecs = kColumnBlock / kLanes;
    for (int column = 0; column < pitch; column += kColumnBlock) {
      Sums high[R][kVecs], low[R][kVecs];
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < kVecs; ++n) high[r][n] = low[r][n] = Sums{};
      const auto* v = reinterpret_cast<const int32_t*>(s.v) + column;
      for (int t = 0; t < num_tokens; t += 4, v += pitch) {
        if (kAsks) s.ahead->turn();
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

  template <int R>
  static void attend_rows(const AttendTask& task, const Scratch& s, int row, int num_groups, const int* lows,
                          const int* highs, bool is_masked) {
    constexpr int kFirst = R < kCodeRows ? R : kCodeRows;
    constexpr int kSecond = R - kFirst;
    constexpr int kVecs = kColumnBlock / kLanes;
    const int head_dim = task.head_dim;
    const int pitch = partial_pitch(head_dim);
    const int num_tokens = num_groups * kGroupTokens;
    const bool v_codes = keeps_codes(task, task.v);
    const bool asks = task.num_rows <= kRowBlock;  // else between the row blocks
    if (keeps_codes(task, task.k)) {
      (asks ? score_codes<kFirst, true> : score_codes<kFirst, false>)(s, head_dim, row, 0);
      if constexpr (kSecond > 0) score_codes<kSecond, false>(s, head_dim, row, kFirst);
    } else if (keeps_pairs(task, task.k)) {
      const float* q = s.q + static_cast<size_t>(row) * head_dim;
      (num_groups > 2 ? score_pairs<R, kTileVecs> : score_pairs<R, 2>)(s, head_dim, q);
    } else {
      score_fp32<R>(s, head_dim, s.q + static_cast<size_t>(row) * head_dim);
    }
    if (task.soft_cap > 0) {
      (v_codes ? softmax_rows<true, true, true> : softmax_rows<true, true, false>)(task, s, row, R, lows, highs);
    } else if (is_masked) {
      (v_codes ? softmax_rows<true, false, true> : softmax_rows<true, false, false>)(task, s, row, R, lows, highs);
    } else {
      (v_codes ? softmax_rows<false, false, true> : softmax_rows<false, false, false>)(task, s, row, R, lows, highs);
    }
    int column = 0;
    if (v_codes) {
      (asks ? accumulate_codes<kFirst, true> : accumulate_codes<kFirst, false>)(s, row, 0, pitch, num_tokens);
      if constexpr (kSecond > 0) accumulate_codes<kSecond, false>(s, row, kFirst, pitch, num_tokens);
    } else if (keeps_pairs(task, task.v)) {
      for (; column + kColumnBlock <= head_dim; column += kColumnBlock)
        accumulate_pages<R, kVecs>(task, s, column, num_groups);
      for (; column < head_dim; column += 32) accumulate_pages<R, 2>(task, s, column, num_groups);
    } else {
      for (; column + kColumnBlock <= head_dim; column += kColumnBlock)
        accumulate_fp32<R, kVecs>(s, row, column, pitch, num_tokens);
      for (; column < head_dim; column += 32) accumulate_fp32<R, 2>(s, row, column, pitch, num_tokens);
    }
  }

  static void attend_block(const AttendTask& task, const Scratch& s, int row, int num_rows, int num_groups,
                           const int* lows, const int* highs, bool is_masked) {
    switch (num_rows) {
      case 1:
        return attend_rows<1>(task, s, row, num_groups, lows, highs, is_masked);
      case 2:
        return attend_rows<2>(task, s, row, num_groups, lows, highs, is_masked);
      case 3:
        return attend_rows<3>(task, s, row, num_groups, lows, highs, is_masked);
      case 4:
        return attend_rows<4>(task, s, row, num_groups, lows, highs, is_masked);
      case 5:
        return attend_rows<5>(task, s, row, num_groups, lows, highs, is_masked);
      default:
        return attend_rows<6>(task, s, row, num_groups, lows, highs, is_masked);
    }
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
