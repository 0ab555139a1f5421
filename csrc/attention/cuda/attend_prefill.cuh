// Attention of many query rows: a tile of 64 or 128 rows (tokens times the query heads of a KV head) walks K and V in
// tiles of 32 or 64 tokens. Body for the sm_80 family; the instances are attend_prefill.cu.in's.
//
// A warp owns 16 or 32 of the rows with their softmax and output in registers. K and V arrive one tile ahead: pages of
// 16-bit codes in the type that is multiplied where ldmatrix reads them, in two buffers; other codes raw, to be turned
// into fp16 once for all rows.
#pragma once

#include "attention/cuda/attend_codes.cuh"
#include "attention/cuda/attend_rows.cuh"
#include "attention/cuda/attend_softmax.cuh"
#include "device/ptx_convert.cuh"
#include "device/ptx_cp_async.cuh"
#include "device/ptx_ldmatrix.cuh"
#include "device/ptx_mma.cuh"

namespace partita {

constexpr int kPrefillWarps = 4;
constexpr int kPrefillThreads = kPrefillWarps * device::kWarpSize;

template <int kHeadDimValue, bool kConverts>
struct PrefillShape {
  static constexpr int kHeadDim = kHeadDimValue;
  static constexpr int kRowTiles = kHeadDim <= 128 ? 2 : 1;  // m tiles of a warp; two share each read of K and V
  static constexpr int kTileRows = kPrefillWarps * 16 * kRowTiles;
  // Scores and output must fit in registers beside each other.
  static constexpr int kTokens = kHeadDim <= 64 ? 64 : 32;
  static constexpr int kChunks = kHeadDim / 8;  // 16-byte chunks of a row
  static constexpr int kBuffers = kConverts ? 1 : 2;

  struct Raw {
    uint4 k[kTokens * kChunks], v[kTokens * kChunks];  // rows as long as their codes are
    uint32_t k_params[kTokens], v_params[kTokens];     // fp16 scale, min
  };
  struct NoRaw {};
  struct Storage {
    uint4 q[kTileRows * kChunks], k[kBuffers][kTokens * kChunks], v[kBuffers][kTokens * kChunks];
    std::conditional_t<kConverts, Raw, NoRaw> raw;
  };
};

template <bool kIsBF16>
__device__ __forceinline__ uint32_t pack_16(float low, float high) {
  if constexpr (kIsBF16)
    return device::f32x2_to_bf16x2(low, high);
  else
    return device::f32x2_to_f16x2(low, high);
}

// fp16 ends at 65504: larger values stay finite.
template <bool kIsBF16>
__device__ __forceinline__ uint32_t pack_clamped(float low, float high) {
  if constexpr (kIsBF16) return device::f32x2_to_bf16x2(low, high);
  constexpr float kMax = 65504.0f;
  return device::f32x2_to_f16x2(fminf(fmaxf(low, -kMax), kMax), fminf(fmaxf(high, -kMax), kMax));
}

// The query rows of an item into shared memory, rows past the last one as zeros.
template <typename Shape, bool kIsBF16>
__device__ __forceinline__ void load_query_tile(const AttendKernelParams& params, const GpuAttendItem& item, uint4* q) {
  const int num_rows = item.num_tokens * params.group;
  const DType same = kIsBF16 ? DType::kBF16 : DType::kF16;
  for (int index = static_cast<int>(threadIdx.x); index < Shape::kTileRows * Shape::kChunks; index += kPrefillThreads) {
    const int row = index / Shape::kChunks, chunk = index % Shape::kChunks;
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (row < num_rows && chunk * 8 < params.head_dim) {  // head sizes are multiples of 8
      const int64_t first = (item.token_begin + row / params.group) * params.q_stride +
                            int64_t{item.kv_head * params.group + row % params.group} * params.head_dim + chunk * 8;
      const uint16_t* source = static_cast<const uint16_t*>(params.q) + first;
      if (params.q_type == same && reinterpret_cast<uintptr_t>(source) % 16 == 0) {
        packed = device::load_16(source);
      } else {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = load_row_element(params.q, params.q_type, first + i);
        packed = make_uint4(pack_clamped<kIsBF16>(x[0], x[1]), pack_clamped<kIsBF16>(x[2], x[3]),
                            pack_clamped<kIsBF16>(x[4], x[5]), pack_clamped<kIsBF16>(x[6], x[7]));
      }
    }
    q[row * Shape::kChunks + matrix_chunk<Shape::kHeadDim * 2>(row, chunk)] = packed;
  }
}

// Copies tiles of one item's pages.
template <typename Shape>
struct TileFetch {
  static constexpr int kTokens = Shape::kTokens, kChunks = Shape::kChunks;
  const AttendKernelParams& params;
  const int32_t* pages;
  int kv_begin, kv_end, kv_head;

  // Lane l holds the page of tokens 16 * (l % (kTokens / 16)) ... of the tile: the id of a page is read a tile ahead of
  // its use.
  __device__ __forceinline__ int page_of(int tile_token) const {
    const int token = tile_token + static_cast<int>(device::lane_idx()) % (kTokens / 16) * 16;
    return token < kv_end && token + 16 > kv_begin ? pages[token >> params.page_size_log2] : 0;
  }
  __device__ __forceinline__ bool has(int token) const { return token >= kv_begin && token < kv_end; }
  __device__ __forceinline__ int64_t page_row(int token) const {
    return int64_t{kv_head} * params.page_size + (token & (params.page_size - 1));
  }

  // To where ldmatrix reads, zeros outside of the item's range and past the head.
  __device__ __forceinline__ void to_matrix(const GpuKvStream& from, uint4* to, int tile_token, int tile_pages) const {
    // Unrolled, the addresses of all rounds would be kept in registers that the output needs.
#pragma unroll 1
    for (int i = 0; i < kTokens * kChunks / kPrefillThreads; ++i) {
      const int index = i * kPrefillThreads + static_cast<int>(threadIdx.x);
      const int row = index / kChunks, chunk = index % kChunks, token = tile_token + row;
      const std::byte* page =
          params.arena + int64_t{__shfl_sync(device::kFullWarp, tile_pages, row / 16)} * params.arena_page_bytes;
      const bool is_there = has(token) && chunk * 16 < from.row_bytes;
      const std::byte* source = page + from.codes_offset + page_row(token) * from.row_bytes + chunk * 16;
      device::cp_async_16_zfill(to + row * kChunks + matrix_chunk<kChunks * 16>(row, chunk),
                                is_there ? source : params.arena, is_there ? 16 : 0);
    }
  }

  // As the codes are, rows side by side; what is outside of the item's range is left out.
  __device__ __forceinline__ void to_raw(const GpuKvStream& from, uint4* to, uint32_t* pairs, int tile_token,
                                         int tile_pages) const {
    // Rows of int4 at head sizes 80 and 112 are 40 and 56 bytes.
    const bool is_whole = from.row_bytes % 16 == 0;
    const int piece_bytes = is_whole ? 16 : 8, pieces = from.row_bytes / piece_bytes;
    for (int index = static_cast<int>(threadIdx.x); index < kTokens * pieces; index += kPrefillThreads) {
      const int row = index / pieces, piece = index - row * pieces, token = tile_token + row;
      const std::byte* page =
          params.arena + int64_t{__shfl_sync(device::kFullWarp, tile_pages, row / 16)} * params.arena_page_bytes;
      if (!has(token)) continue;
      std::byte* target = reinterpret_cast<std::byte*>(to) + index * piece_bytes;
      const std::byte* source = page + from.codes_offset + page_row(token) * from.row_bytes + piece * piece_bytes;
      if (is_whole)
        device::cp_async_16(target, source);
      else
        device::cp_async_8(target, source);
    }
    if (from.codec != KvCodec::kInt8 && from.codec != KvCodec::kInt4Plain) return;
    constexpr int kPairChunks = kTokens / 4;
    const int index = static_cast<int>(threadIdx.x);
    if (index / device::kWarpSize > 0) return;
    const int token = tile_token + index % kPairChunks * 4;
    const std::byte* page =
        params.arena +
        int64_t{__shfl_sync(device::kFullWarp, tile_pages, index % kPairChunks / 4)} * params.arena_page_bytes;
    if (index < kPairChunks && token + 4 > kv_begin && token < kv_end)
      device::cp_async_16(pairs + index * 4, page + from.params_offset + page_row(token) * 4);
  }
};

// Eight neighbouring elements of a raw row as fp16.
__device__ __forceinline__ uint4 convert_eight(const GpuKvStream& from, const uint32_t* words, int group,
                                               uint32_t pair) {
  float x[8];
  const auto halves = [](float low, float high) { return pack_clamped<false>(low, high); };
  switch (from.codec) {
    case KvCodec::kF16:
      return make_uint4(words[group * 4], words[group * 4 + 1], words[group * 4 + 2], words[group * 4 + 3]);
    case KvCodec::kBF16:
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(words[group * 4 + i] << 16);
        x[2 * i + 1] = __uint_as_float(words[group * 4 + i] & 0xffff0000u);
      }
      break;
    case KvCodec::kE4M3: {
      const uint32_t low = words[group * 2], high = words[group * 2 + 1];
      return make_uint4(device::e4m3x2_to_f16x2(static_cast<uint16_t>(low)),
                        device::e4m3x2_to_f16x2(static_cast<uint16_t>(low >> 16)),
                        device::e4m3x2_to_f16x2(static_cast<uint16_t>(high)),
                        device::e4m3x2_to_f16x2(static_cast<uint16_t>(high >> 16)));
    }
    default: {
      const bool is_byte = from.codec == KvCodec::kInt8;
      const float scale = device::f16_to_f32(static_cast<uint16_t>(pair));
      const float min = device::f16_to_f32(static_cast<uint16_t>(pair >> 16));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t code = is_byte ? words[group * 2 + i / 4] >> (i % 4 * 8) & 0xffu : words[group] >> (i * 4) & 15u;
        x[i] = fmaf(static_cast<float>(code), scale, min);
      }
    }
  }
  return make_uint4(halves(x[0], x[1]), halves(x[2], x[3]), halves(x[4], x[5]), halves(x[6], x[7]));
}

template <typename Shape>
__device__ __forceinline__ void convert_tile(const AttendKernelParams& params, const TileFetch<Shape>& fetch,
                                             const GpuKvStream& from, const uint4* raw, const uint32_t* pairs,
                                             uint4* to, int tile_token) {
  const auto* words = reinterpret_cast<const uint32_t*>(raw);
  const bool has_params = from.codec == KvCodec::kInt8 || from.codec == KvCodec::kInt4Plain;
  for (int index = static_cast<int>(threadIdx.x); index < Shape::kTokens * Shape::kChunks; index += kPrefillThreads) {
    const int row = index / Shape::kChunks, group = index % Shape::kChunks;
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (fetch.has(tile_token + row) && group * 8 < params.head_dim)
      packed = convert_eight(from, words + row * (from.row_bytes / 4), group, has_params ? pairs[row] : 0u);
    to[row * Shape::kChunks + matrix_chunk<Shape::kHeadDim * 2>(row, group)] = packed;
  }
}

// The block Hadamard transform of a row of an mma result: elements 8 * t + 2 * (lane % 4) and the next one are in
// x[t][first] and x[t][first + 1].
template <int kTiles>
__device__ __forceinline__ void rotate_fragment(float (&x)[kTiles][4], int first, int block) {
  const int lane = static_cast<int>(device::lane_idx());
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const float a = x[t][first], b = x[t][first + 1];
    x[t][first] = a + b, x[t][first + 1] = a - b;
#pragma unroll
    for (int stride = 1; stride <= 2; stride *= 2)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float other = __shfl_xor_sync(device::kFullWarp, x[t][first + c], stride);
        x[t][first + c] = lane & stride ? other - x[t][first + c] : x[t][first + c] + other;
      }
  }
#pragma unroll
  for (int stride = 1; stride < kTiles; stride *= 2) {
    if (stride * 8 >= block) break;  // blocks are at least 8, the unit of head sizes
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t & stride) continue;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float a = x[t][first + c], b = x[t + stride][first + c];
        x[t][first + c] = a + b, x[t + stride][first + c] = a - b;
      }
    }
  }
  const float norm = 1.0f / sqrtf(static_cast<float>(block));
#pragma unroll
  for (int t = 0; t < kTiles; ++t) x[t][first] *= norm, x[t][first + 1] *= norm;
}

template <bool kIsBF16>
__device__ __forceinline__ void mma_rows(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  if constexpr (kIsBF16)
    device::mma_m16n8k16_bf16(d, a, b);
  else
    device::mma_m16n8k16_f16(d, a, b);
}

template <int kHeadDim, bool kIsBF16, bool kConverts>
__global__ void __launch_bounds__(kPrefillThreads, kConverts || kHeadDim > 128 ? 1 : 2)
    attend_prefill_kernel(const __grid_constant__ AttendKernelParams params) {
  static_assert(!kConverts || !kIsBF16, "what is converted becomes fp16");
  using Shape = PrefillShape<kHeadDim, kConverts>;
  constexpr int kRowTiles = Shape::kRowTiles, kChunks = Shape::kChunks, kRowBytes = kHeadDim * 2;
  constexpr int kTokens = Shape::kTokens, kTokenTiles = kTokens / 8, kOutTiles = kHeadDim / 8;
  auto& storage = device::dynamic_shared<typename Shape::Storage>();
  const int warp = static_cast<int>(threadIdx.x) / device::kWarpSize;
  const int lane = static_cast<int>(device::lane_idx());
  const int g = lane / 4, pair = lane % 4, matrix = lane / 8;
  const int warp_row = warp * 16 * kRowTiles;

  for (int item_idx = params.queues[blockIdx.x]; item_idx < params.queues[blockIdx.x + 1]; ++item_idx) {
    const GpuAttendItem item = params.items[item_idx];
    const int num_rows = item.num_tokens * params.group;
    const TileFetch<Shape> fetch{params, params.page_tables + item.request * params.page_table_stride, item.kv_begin,
                                 item.kv_end, item.kv_head};
    const int first_token = item.kv_begin / kTokens * kTokens;
    const int tile_pages = fetch.page_of(first_token);
    if constexpr (kConverts) {
      fetch.to_raw(params.k, storage.raw.k, storage.raw.k_params, first_token, tile_pages);
      fetch.to_raw(params.v, storage.raw.v, storage.raw.v_params, first_token, tile_pages);
    } else {
      const int buffer = first_token / kTokens & 1;
      fetch.to_matrix(params.k, storage.k[buffer], first_token, tile_pages);
      fetch.to_matrix(params.v, storage.v[buffer], first_token, tile_pages);
    }
    device::cp_async_commit();
    load_query_tile<Shape, kIsBF16>(params, item, storage.q);

    // What the warp's rows see: nothing past warp_last, all of all_from .. all_to. A row past the last sees nothing.
    int positions[kRowTiles][2];
    int warp_last = -1, all_from = item.kv_begin, all_to = item.kv_end - 1;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + m * 16 + half * 8 + g;
        const int position = row < num_rows ? params.token_positions[item.token_begin + row / params.group] : -1;
        positions[m][half] = position;
        warp_last = max(warp_last, position);
        if (position >= 0) {
          if (params.window > 0) all_from = max(all_from, position - params.window + 1);
          all_to = min(all_to, position);
        }
      }
#pragma unroll
    for (int stride = 4; stride <= 16; stride *= 2) {
      warp_last = max(warp_last, __shfl_xor_sync(device::kFullWarp, warp_last, stride));
      all_from = max(all_from, __shfl_xor_sync(device::kFullWarp, all_from, stride));
      all_to = min(all_to, __shfl_xor_sync(device::kFullWarp, all_to, stride));
    }

    float out[kRowTiles][kOutTiles][4];
    float row_max[kRowTiles][2], row_sum[kRowTiles][2];  // sum: of this lane's tokens
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) row_max[m][half] = kNegativeInfinity, row_sum[m][half] = 0.0f;
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][t][i] = 0.0f;
    }

    int next_pages = fetch.page_of(first_token + kTokens);
    for (int token = first_token; token < item.kv_end; token += kTokens) {
      const int next_token = token + kTokens;
      const int buffer = kConverts ? 0 : token / kTokens & 1;
      device::cp_async_wait<0>();
      __syncthreads();  // the tile has arrived, the one before it has been read
      if constexpr (kConverts) {
        convert_tile<Shape>(params, fetch, params.k, storage.raw.k, storage.raw.k_params, storage.k[0], token);
        convert_tile<Shape>(params, fetch, params.v, storage.raw.v, storage.raw.v_params, storage.v[0], token);
        __syncthreads();  // both are there, the raw tile is free
        if (next_token < item.kv_end) {
          fetch.to_raw(params.k, storage.raw.k, storage.raw.k_params, next_token, next_pages);
          fetch.to_raw(params.v, storage.raw.v, storage.raw.v_params, next_token, next_pages);
        }
      } else if (next_token < item.kv_end) {
        fetch.to_matrix(params.k, storage.k[buffer ^ 1], next_token, next_pages);
        fetch.to_matrix(params.v, storage.v[buffer ^ 1], next_token, next_pages);
      }
      device::cp_async_commit();
      next_pages = fetch.page_of(next_token + kTokens);
      const uint4* k_tile = storage.k[buffer];
      const uint4* v_tile = storage.v[buffer];
      if (token > warp_last) continue;  // no row of this warp sees it

      float scores[kRowTiles][kTokenTiles][4];
      // S = Q K^T
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[m][t][i] = 0.0f;
#pragma unroll 4
      for (int step = 0; step < kHeadDim / 16; ++step) {
        uint32_t q[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          const int row = warp_row + m * 16 + matrix % 2 * 8 + lane % 8;
          device::ldmatrix_x4(q[m], storage.q + row * kChunks + matrix_chunk<kRowBytes>(row, step * 2 + matrix / 2));
        }
#pragma unroll
        for (int t = 0; t < kTokenTiles; t += 2) {
          const int row = t * 8 + matrix / 2 * 8 + lane % 8;
          uint32_t k[4];
          device::ldmatrix_x4(k, k_tile + row * kChunks + matrix_chunk<kRowBytes>(row, step * 2 + matrix % 2));
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            mma_rows<kIsBF16>(scores[m][t], q[m], k[0], k[1]);
            mma_rows<kIsBF16>(scores[m][t + 1], q[m], k[2], k[3]);
          }
        }
      }

      const bool has_masked = token < all_from || token + kTokens - 1 > all_to;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[m][t][i] = finish_score(params, scores[m][t][i] * params.score_scale);
        if (has_masked)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int position = positions[m][half];
            const int first_seen = max(item.kv_begin, params.window > 0 ? position - params.window + 1 : 0);
            const int last_seen = min(item.kv_end - 1, position);
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                const int at = token + t * 8 + pair * 2 + c;
                if (at < first_seen || at > last_seen) scores[m][t][half * 2 + c] = kNegativeInfinity;
              }
          }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float next = row_max[m][half];
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t)
            next = fmaxf(next, fmaxf(scores[m][t][half * 2], scores[m][t][half * 2 + 1]));
          next = fmaxf(next, __shfl_xor_sync(device::kFullWarp, next, 1));
          next = fmaxf(next, __shfl_xor_sync(device::kFullWarp, next, 2));
          const float base = next == kNegativeInfinity ? 0.0f : next;  // nothing seen yet
          const float fade = device::ex2_approx(row_max[m][half] - base);
          row_max[m][half] = next;
          float sum = row_sum[m][half] * fade;
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float& weight = scores[m][t][half * 2 + c];
              weight = device::ex2_approx(weight - base);
              sum += weight;
            }
          row_sum[m][half] = sum;
          // After the first tiles a maximum seldom moves.
          if (__any_sync(device::kFullWarp, fade != 1.0f))
#pragma unroll
            for (int t = 0; t < kOutTiles; ++t) out[m][t][half * 2] *= fade, out[m][t][half * 2 + 1] *= fade;
        }
      }

      // O += P V
#pragma unroll
      for (int t = 0; t < kTokenTiles; t += 2) {
        uint32_t weights[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          weights[m][0] = pack_16<kIsBF16>(scores[m][t][0], scores[m][t][1]);
          weights[m][1] = pack_16<kIsBF16>(scores[m][t][2], scores[m][t][3]);
          weights[m][2] = pack_16<kIsBF16>(scores[m][t + 1][0], scores[m][t + 1][1]);
          weights[m][3] = pack_16<kIsBF16>(scores[m][t + 1][2], scores[m][t + 1][3]);
        }
        const int row = t * 8 + matrix % 2 * 8 + lane % 8;
#pragma unroll
        for (int d = 0; d < kOutTiles; d += 2) {
          uint32_t v[4];
          device::ldmatrix_x4_trans(v, v_tile + row * kChunks + matrix_chunk<kRowBytes>(row, d + matrix / 2));
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            mma_rows<kIsBF16>(out[m][d], weights[m], v[0], v[1]);
            mma_rows<kIsBF16>(out[m][d + 1], weights[m], v[2], v[3]);
          }
        }
      }
    }

    // Read again: kept through the loop it would take registers from the output.
    const GpuAttendItem done = params.items[item_idx];
    const int done_rows = done.num_tokens * params.group;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = row_sum[m][half];
        sum += __shfl_xor_sync(device::kFullWarp, sum, 1);
        sum += __shfl_xor_sync(device::kFullWarp, sum, 2);
        const int row = warp_row + m * 16 + half * 8 + g;
        const bool is_partial = done.partial_row >= 0;
        if (!is_partial) {
          const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
#pragma unroll
          for (int t = 0; t < kOutTiles; ++t) out[m][t][half * 2] *= inverse, out[m][t][half * 2 + 1] *= inverse;
          if (params.v_rotation > 0) rotate_fragment<kOutTiles>(out[m], half * 2, params.v_rotation);
        }
        if (row >= done_rows) continue;
        const int64_t first = is_partial
                                  ? (int64_t{done.partial_row} + row) * params.head_dim
                                  : (done.token_begin + row / params.group) * params.out_stride +
                                        int64_t{done.kv_head * params.group + row % params.group} * params.head_dim;
        void* rows = is_partial ? params.partial_out : params.out;
        const DType type = is_partial ? DType::kF32 : params.out_type;
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t)
          if (t * 8 < params.head_dim)
            store_row_pair(rows, type, first + t * 8 + pair * 2, out[m][t][half * 2], out[m][t][half * 2 + 1]);
        if (is_partial && pair == 0)
          store_row_pair(params.partial_sums, DType::kF32, (int64_t{done.partial_row} + row) * 2, row_max[m][half],
                         sum);
      }
    __syncthreads();  // the next item overwrites Q, K and V
  }
}

template <int kHeadDim, bool kIsBF16, bool kConverts>
struct PrefillLaunch {
  using Shape = PrefillShape<kHeadDim, kConverts>;
  static constexpr int kTileRows = Shape::kTileRows;
  static constexpr int kCtasPerSm = 2;
  static constexpr size_t kSharedBytes = sizeof(typename Shape::Storage);
  static void launch(const AttendKernelParams& params, int num_ctas, void* stream) {
    device::launch("attend_prefill", &attend_prefill_kernel<kHeadDim, kIsBF16, kConverts>,
                   {static_cast<unsigned>(num_ctas)}, {kPrefillThreads}, kSharedBytes, stream, params);
  }
};

}  // namespace partita
