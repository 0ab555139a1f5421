// Attention of few query rows: 8 or 16 rows (tokens times the query heads of a KV head) share a pass over K and V. Body
// for the sm_80 family; the instances are attend_decode.cu.in's.
//
// The products are transposed, S^T = K Q^T and O^T = V^T P^T, so that tokens fill the 16 rows of mma and query heads
// its 8 columns. Of each tile of 64 tokens a warp owns 16, from the copy into shared memory to its own running softmax:
// no warp waits for another until the item ends, when the four results are added up.
#pragma once

#include "attention/cuda/attend_codes.cuh"
#include "attention/cuda/attend_rows.cuh"
#include "attention/cuda/attend_softmax.cuh"
#include "device/ptx_convert.cuh"
#include "device/ptx_cp_async.cuh"
#include "device/ptx_ldmatrix.cuh"
#include "device/ptx_mma.cuh"
#include "device/ptx_movmatrix.cuh"

namespace partita {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = kDecodeWarps * device::kWarpSize;
constexpr int kWarpTokens = 16;
static_assert(kDecodeWarps * kWarpTokens == kAttendTileTokens);
constexpr int kOutPadding = 4;  // floats: keeps the four lanes of a column pair in different banks

template <int kHeadDimValue, KvCodec kKCodec, KvCodec kVCodec, int kColumns>
struct DecodeShape {
  using K = CodeTraits<kKCodec>;
  using V = CodeTraits<kVCodec>;
  static constexpr int kHeadDim = kHeadDimValue;
  static constexpr int kNumTiles = kColumns / 8;   // n tiles of mma
  static constexpr int kSteps = kHeadDim / 16;     // k steps of S^T
  static constexpr int kOutTiles = kHeadDim / 16;  // m tiles of O^T
  static constexpr int kKRowBytes = kHeadDim * K::kBits / 8, kVRowBytes = kHeadDim * V::kBits / 8;
  static constexpr bool kHasParams = K::kHasParams || V::kHasParams;
  // Q stays in registers where it and O fit beside each other.
  static constexpr bool kHoldsQueries = kHeadDim * kColumns <= 1024;

  struct WarpStage {
    alignas(16) uint4 k[kWarpTokens * kKRowBytes / 16];
    uint4 v[kWarpTokens * kVRowBytes / 16];
    uint32_t k_params[K::kHasParams ? kWarpTokens : 4];  // fp16 scale, min
    uint32_t v_params[V::kHasParams ? kWarpTokens : 4];
  };
  // Bytes in flight are what hides the memory's latency: as many stages, up to 4, as fit the shared memory of every
  // chip of the family.
  static constexpr int kSharedBytes = 99 * 1024;
  static constexpr int kStagesThatFit =
      (kSharedBytes - kSteps * kNumTiles * device::kWarpSize * 8) / static_cast<int>(kDecodeWarps * sizeof(WarpStage));
  static constexpr int kStages = kStagesThatFit < 2 ? 2 : kStagesThatFit > 4 ? 4 : kStagesThatFit;
  struct Merge {
    float out[kDecodeWarps][kColumns][kHeadDim + kOutPadding];
    float max[kDecodeWarps][kColumns], sum[kDecodeWarps][kColumns];
  };
  struct Storage {
    union {
      WarpStage stages[kDecodeWarps][kStages];
      Merge merge;  // when the item's last tile has been read
    };
    uint2 queries[kSteps][kNumTiles][device::kWarpSize];  // operand B, as the lanes take it
  };
  // Thread blocks that an SM is to hold: as many as Hopper's shared memory holds, and no more than leave the threads
  // enough registers.
  static constexpr int kCtasByShared = 228 * 1024 / static_cast<int>(sizeof(Storage) + 1024);
  static constexpr int kCtasByRegisters = kHeadDim * kColumns <= 1024 ? 4 : kHeadDim * kColumns <= 2048 ? 3 : 2;
  static constexpr int kCtasPerSm = kCtasByShared < kCtasByRegisters ? kCtasByShared : kCtasByRegisters;
};

// Where a warp's 16 tokens of a tile come from.
template <typename Shape, KvCodec kKCodec, KvCodec kVCodec>
struct WarpFetch {
  const AttendKernelParams& params;
  const int32_t* pages;
  int kv_begin, kv_end, kv_head;
  int lane;

  __device__ __forceinline__ bool has_tokens(int first_token) const {
    return first_token < kv_end && first_token + kWarpTokens > kv_begin;
  }
  __device__ __forceinline__ int page_of(int first_token) const {
    return has_tokens(first_token) ? pages[first_token >> params.page_size_log2] : 0;
  }

  // The warp's 16 rows in pieces of kPieceBytes, 16 or 8: rows of int4 at head sizes 80 and 112 are 40 and 56 bytes, so
  // every second one begins in the middle of a vector. A piece keeps its place in the chunk of 16 bytes that is read.
  template <int kRowBytes, bool kIsKey, int kPieceBytes>
  __device__ __forceinline__ void rows(int row_bytes, uint4* codes, const std::byte* source, int first_token) const {
    constexpr int kChunks = kRowBytes / 16, kPieces = kRowBytes / kPieceBytes, kPiecesOfChunk = 16 / kPieceBytes;
#pragma unroll 4
    for (int i = 0; i < kWarpTokens * kPieces / device::kWarpSize; ++i) {
      const int index = i * device::kWarpSize + lane;
      const int row = index / kPieces, piece = index % kPieces, chunk = piece / kPiecesOfChunk;
      const int token = first_token + row;
      // What nobody may look at becomes zero: padding of the head, and slots outside of the item's range, which may
      // hold anything.
      const bool is_there = token >= kv_begin && token < kv_end && piece * kPieceBytes < row_bytes;
      const int place = kIsKey ? k_chunk<kRowBytes>(row, chunk) : matrix_chunk<kRowBytes>(row, chunk);
      std::byte* target =
          reinterpret_cast<std::byte*>(codes + row * kChunks + place) + piece % kPiecesOfChunk * kPieceBytes;
      const std::byte* from = is_there ? source + row * row_bytes + piece * kPieceBytes : source;
      if constexpr (kPieceBytes == 16)
        device::cp_async_16_zfill(target, from, is_there ? 16 : 0);
      else
        device::cp_async_8_zfill(target, from, is_there ? 8 : 0);
    }
  }

  template <int kRowBytes, int kBits, bool kHasParams, bool kIsKey>
  __device__ __forceinline__ void stream(const GpuKvStream& from, uint4* codes, uint32_t* pairs, const std::byte* page,
                                         int first_token) const {
    const int64_t first_row = int64_t{kv_head} * params.page_size + (first_token & (params.page_size - 1));
    const std::byte* source = page + from.codes_offset + first_row * from.row_bytes;
    // Two instances of the loop: with the size of a piece known only at run time each copy would be two under
    // predicates.
    if (kBits == 4 && from.row_bytes % 16 != 0)
      rows<kRowBytes, kIsKey, 8>(from.row_bytes, codes, source, first_token);
    else
      rows<kRowBytes, kIsKey, 16>(from.row_bytes, codes, source, first_token);
    if constexpr (kHasParams) {
      constexpr int kPairChunks = kWarpTokens * 4 / 16;
      if (lane < kPairChunks)
        device::cp_async_16(pairs + lane * 4, page + from.params_offset + first_row * 4 + lane * 16);
    }
  }

  __device__ __forceinline__ void start(typename Shape::WarpStage& stage, int first_token, int page_id) const {
    if (!has_tokens(first_token)) return;
    const std::byte* page = params.arena + int64_t{page_id} * params.arena_page_bytes;
    stream<Shape::kKRowBytes, Shape::K::kBits, Shape::K::kHasParams, true>(params.k, stage.k, stage.k_params, page,
                                                                           first_token);
    stream<Shape::kVRowBytes, Shape::V::kBits, Shape::V::kHasParams, false>(params.v, stage.v, stage.v_params, page,
                                                                            first_token);
  }
};

// Lays Q out in the order in which K's codes will meet it, in the type that K is multiplied in.
template <typename Shape, KvCodec kKCodec, int kColumns>
__device__ __forceinline__ void load_queries(const AttendKernelParams& params, const GpuAttendItem& item,
                                             typename Shape::Storage& storage) {
  using K = CodeTraits<kKCodec>;
  const int num_rows = item.num_tokens * params.group;
  constexpr int kSlots = Shape::kSteps * Shape::kNumTiles * device::kWarpSize;
  for (int slot = static_cast<int>(threadIdx.x); slot < kSlots; slot += kDecodeThreads) {
    const int lane = slot % device::kWarpSize, tile = slot / device::kWarpSize % Shape::kNumTiles;
    const int step = slot / (device::kWarpSize * Shape::kNumTiles);
    const int row = tile * 8 + lane / 4;
    uint32_t packed[2] = {0, 0};
    if (row < num_rows) {
      const int64_t first = (item.token_begin + row / params.group) * params.q_stride +
                            int64_t{item.kv_head * params.group + row % params.group} * params.head_dim;
#pragma unroll
      for (int reg = 0; reg < 2; ++reg) {
        float x[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int d = k_element<K::kBits, Shape::kHeadDim>(step, lane % 4, reg, half);
          x[half] = d < params.head_dim ? load_row_element(params.q, params.q_type, first + d) : 0.0f;
        }
        if constexpr (K::kIsBF16) {
          packed[reg] = device::f32x2_to_bf16x2(x[0], x[1]);
        } else {
          constexpr float kHalfMax = 65504.0f;
          const float factor = reg ? 1.0f / K::kOddFactor : 1.0f;
#pragma unroll
          for (int half = 0; half < 2; ++half) x[half] = fminf(fmaxf(x[half] * factor, -kHalfMax), kHalfMax);
          packed[reg] = device::f32x2_to_f16x2(x[0], x[1]);
        }
      }
    }
    storage.queries[step][tile][lane] = make_uint2(packed[0], packed[1]);
  }
}

// The running softmax and output of one warp, columns 2 * pair and 2 * pair + 1 of each n tile.
template <typename Shape>
struct WarpState {
  float out[Shape::kNumTiles][Shape::kOutTiles][4];
  float max[Shape::kNumTiles][2], sum[Shape::kNumTiles][2];  // sum: of this lane's tokens
  float min_sum[Shape::kNumTiles][2];                        // sum of weights times V's minimum, of this lane's tokens
  float v_unit;  // power of two that V's scales are divided by, so that weights times scales suit fp16
};

template <bool kIsBF16>
__device__ __forceinline__ void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kIsBF16)
    device::mma_m16n8k16_bf16(d, a, b);
  else
    device::mma_m16n8k16_f16(d, a, b);
}

__device__ __forceinline__ float2 scale_and_min(uint32_t pair) {
  return make_float2(device::f16_to_f32(static_cast<uint16_t>(pair)),
                     device::f16_to_f32(static_cast<uint16_t>(pair >> 16)));
}

template <int kHeadDim, KvCodec kKCodec, KvCodec kVCodec, int kColumns>
__global__ void __launch_bounds__(kDecodeThreads, DecodeShape<kHeadDim, kKCodec, kVCodec, kColumns>::kCtasPerSm)
    attend_decode_kernel(const __grid_constant__ AttendKernelParams params) {
  using Shape = DecodeShape<kHeadDim, kKCodec, kVCodec, kColumns>;
  using K = CodeTraits<kKCodec>;
  using V = CodeTraits<kVCodec>;
  constexpr int kNumTiles = Shape::kNumTiles, kStages = Shape::kStages, kSteps = Shape::kSteps;
  auto& storage = device::dynamic_shared<typename Shape::Storage>();
  const int warp = static_cast<int>(threadIdx.x) / device::kWarpSize;
  const int lane = static_cast<int>(device::lane_idx());
  const int g = lane / 4, pair = lane % 4;

  const int last_item = params.queues[blockIdx.x + 1];
  for (int item_idx = params.queues[blockIdx.x]; item_idx < last_item; ++item_idx) {
    const GpuAttendItem item = params.items[item_idx];
    const int num_rows = item.num_tokens * params.group;

    // Copies of the first tiles start before anything else. A page id is read one tile ahead of its copies.
    const WarpFetch<Shape, kKCodec, kVCodec> fetch{
        params, params.page_tables + item.request * params.page_table_stride, item.kv_begin, item.kv_end, item.kv_head,
        lane};
    const int first_tile = item.kv_begin / kAttendTileTokens;
    const int num_kv_tiles = (item.kv_end + kAttendTileTokens - 1) / kAttendTileTokens - first_tile;
    const int first_token = first_tile * kAttendTileTokens + warp * kWarpTokens;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      const int token = first_token + i * kAttendTileTokens;
      fetch.start(storage.stages[warp][i], token, fetch.page_of(token));
      device::cp_async_commit();
    }
    int next_page = fetch.page_of(first_token + (kStages - 1) * kAttendTileTokens);

    // The positions that each of this lane's columns sees. A column of no row sees none.
    int first_seen[kNumTiles][2], last_seen[kNumTiles][2];
#pragma unroll
    for (int tile = 0; tile < kNumTiles; ++tile)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = tile * 8 + pair * 2 + c;
        const int position = row < num_rows ? params.token_positions[item.token_begin + row / params.group] : -1;
        first_seen[tile][c] = max(item.kv_begin, params.window > 0 ? position - params.window + 1 : 0);
        last_seen[tile][c] = min(item.kv_end - 1, position);
      }
    load_queries<Shape, kKCodec, kColumns>(params, item, storage);
    __syncthreads();

    uint2 queries[Shape::kHoldsQueries ? kSteps : 1][kNumTiles];
    if constexpr (Shape::kHoldsQueries)
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int tile = 0; tile < kNumTiles; ++tile) queries[step][tile] = storage.queries[step][tile][lane];
    // What a token's minimum is multiplied with: the sum over q.
    float query_sum[kNumTiles][2];
    if constexpr (K::kHasParams) {
#pragma unroll
      for (int tile = 0; tile < kNumTiles; ++tile) {
        float total = 0;
        for (int step = 0; step < kSteps; ++step) {
          const uint2 b = storage.queries[step][tile][lane];
          total +=
              device::f16_to_f32(static_cast<uint16_t>(b.x)) + device::f16_to_f32(static_cast<uint16_t>(b.x >> 16));
          total += K::kOddFactor * (device::f16_to_f32(static_cast<uint16_t>(b.y)) +
                                    device::f16_to_f32(static_cast<uint16_t>(b.y >> 16)));
        }
        total += __shfl_xor_sync(device::kFullWarp, total, 1);
        total += __shfl_xor_sync(device::kFullWarp, total, 2);
#pragma unroll
        for (int c = 0; c < 2; ++c)
          query_sum[tile][c] = __shfl_sync(device::kFullWarp, total, (pair * 2 + c) * 4) * params.score_scale;
      }
    }

    WarpState<Shape> state;
    state.v_unit = 1.0f / 16777216.0f;  // no scale is smaller
#pragma unroll
    for (int tile = 0; tile < kNumTiles; ++tile) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        state.max[tile][c] = kNegativeInfinity;
        state.sum[tile][c] = state.min_sum[tile][c] = 0.0f;
      }
#pragma unroll
      for (int m = 0; m < Shape::kOutTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) state.out[tile][m][i] = 0.0f;
    }

    int stage_idx = 0;
    for (int kv_tile = 0; kv_tile < num_kv_tiles; ++kv_tile) {
      const int token = first_token + kv_tile * kAttendTileTokens;
      device::cp_async_wait<kStages - 2>();
      __syncwarp();  // this tile has arrived for all lanes, and all have read the one before it
      {
        const int ahead = token + (kStages - 1) * kAttendTileTokens;
        const int free_idx = stage_idx == 0 ? kStages - 1 : stage_idx - 1;
        fetch.start(storage.stages[warp][free_idx], ahead, next_page);
        device::cp_async_commit();
        next_page = fetch.page_of(ahead + kAttendTileTokens);
      }
      const typename Shape::WarpStage& stage = storage.stages[warp][stage_idx];
      stage_idx = stage_idx == kStages - 1 ? 0 : stage_idx + 1;
      if (!fetch.has_tokens(token)) continue;

      // S^T = K Q^T
      float scores[kNumTiles][4] = {};
      constexpr int kWords = k_read_words<K::kBits, kHeadDim>();
      constexpr int kReads = Shape::kKRowBytes / (16 * kWords);
      constexpr int kStepsPerRead = kSteps / kReads;
      // Where Q is read anew, reads of K that run ahead would take registers from the output.
      [[maybe_unused]] constexpr int kReadsAhead = Shape::kHoldsQueries || kReads < 2 ? kReads : 2;
#pragma unroll kReadsAhead
      for (int read = 0; read < kReads; ++read) {
        uint32_t row[kWords], row_8[kWords];
        if constexpr (kWords == 4) {
          constexpr int kChunks = Shape::kKRowBytes / 16;
          const uint4 x = stage.k[g * kChunks + k_chunk<Shape::kKRowBytes>(g, read * 4 + pair)];
          const uint4 y = stage.k[(g + 8) * kChunks + k_chunk<Shape::kKRowBytes>(g + 8, read * 4 + pair)];
          row[0] = x.x, row[1] = x.y, row[2] = x.z, row[3] = x.w;
          row_8[0] = y.x, row_8[1] = y.y, row_8[2] = y.z, row_8[3] = y.w;
        } else {
          const auto* rows = reinterpret_cast<const uint2*>(stage.k);
          const uint2 x = rows[g * 4 + pair], y = rows[(g + 8) * 4 + pair];
          row[0] = x.x, row[1] = x.y, row_8[0] = y.x, row_8[1] = y.y;
        }
#pragma unroll
        for (int i = 0; i < kStepsPerRead; ++i) {
          uint32_t a[4];
          k_operand<kKCodec>(a, row, row_8, i);
          const int step = read * kStepsPerRead + i;
#pragma unroll
          for (int tile = 0; tile < kNumTiles; ++tile) {
            uint2 q;
            if constexpr (Shape::kHoldsQueries)
              q = queries[step][tile];
            else
              q = storage.queries[step][tile][lane];
            const uint32_t b[2] = {q.x, q.y};
            mma_16<K::kIsBF16>(scores[tile], a, b);
          }
        }
      }

      // Softmax, over tokens g and g + 8 of this lane and then over the lanes of a column.
      float2 k_params[2], v_params[2];
      if constexpr (K::kHasParams) {
        k_params[0] = scale_and_min(stage.k_params[g]);
        k_params[1] = scale_and_min(stage.k_params[g + 8]);
      }
      float v_fade = 1.0f, v_unit_inverse = 1.0f;
      if constexpr (V::kHasParams) {
        float largest = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          v_params[i] = scale_and_min(stage.v_params[g + 8 * i]);
          const int at = token + g + 8 * i;
          if (at < item.kv_begin || at >= item.kv_end) v_params[i] = make_float2(0.0f, 0.0f);
          largest = fmaxf(largest, v_params[i].x);
        }
        largest = fmaxf(largest, __shfl_xor_sync(device::kFullWarp, largest, 4));
        largest = fmaxf(largest, __shfl_xor_sync(device::kFullWarp, largest, 8));
        largest = fmaxf(largest, __shfl_xor_sync(device::kFullWarp, largest, 16));
        const float unit = fmaxf(state.v_unit, __uint_as_float(__float_as_uint(largest) & 0x7f800000u));
        // Powers of two: the exponent of 1 / unit is 254 minus unit's.
        v_unit_inverse = __uint_as_float(0x7f000000u - __float_as_uint(unit));
        v_fade = state.v_unit * v_unit_inverse;
        state.v_unit = unit;
      }
      float fade[kNumTiles][2];
      uint32_t weights[kNumTiles][2];  // operand B of the second product
#pragma unroll
      for (int tile = 0; tile < kNumTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float s;
          if constexpr (K::kHasParams)
            s = fmaf(scores[tile][i], k_params[i / 2].x * (K::kUnit * params.score_scale),
                     k_params[i / 2].y * query_sum[tile][i % 2]);
          else
            s = scores[tile][i] * (K::kUnit * params.score_scale);
          s = finish_score(params, s);
          const int at = token + g + i / 2 * 8;
          scores[tile][i] = at >= first_seen[tile][i % 2] && at <= last_seen[tile][i % 2] ? s : kNegativeInfinity;
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float next = fmaxf(scores[tile][c], scores[tile][c + 2]);
          next = fmaxf(next, __shfl_xor_sync(device::kFullWarp, next, 4));
          next = fmaxf(next, __shfl_xor_sync(device::kFullWarp, next, 8));
          next = fmaxf(next, __shfl_xor_sync(device::kFullWarp, next, 16));
          next = fmaxf(next, state.max[tile][c]);
          const float base = next == kNegativeInfinity ? 0.0f : next;  // nothing seen yet: weights are exp2(-inf)
          fade[tile][c] = device::ex2_approx(state.max[tile][c] - base);
          state.max[tile][c] = next;
          scores[tile][c] = device::ex2_approx(scores[tile][c] - base);
          scores[tile][c + 2] = device::ex2_approx(scores[tile][c + 2] - base);
          state.sum[tile][c] = fmaf(state.sum[tile][c], fade[tile][c], scores[tile][c] + scores[tile][c + 2]);
          if constexpr (V::kHasParams) {
            state.min_sum[tile][c] =
                fmaf(scores[tile][c], v_params[0].y,
                     fmaf(scores[tile][c + 2], v_params[1].y, state.min_sum[tile][c] * fade[tile][c]));
            scores[tile][c] *= v_params[0].x * v_unit_inverse;
            scores[tile][c + 2] *= v_params[1].x * v_unit_inverse;
            fade[tile][c] *= v_fade;
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t packed;
          if constexpr (V::kIsBF16)
            packed = device::f32x2_to_bf16x2(scores[tile][2 * i], scores[tile][2 * i + 1]);
          else
            packed = device::f32x2_to_f16x2(scores[tile][2 * i], scores[tile][2 * i + 1]);
          weights[tile][i] = device::movmatrix_trans(packed);
        }
      }
      bool has_moved = false;
#pragma unroll
      for (int tile = 0; tile < kNumTiles; ++tile)
        has_moved = has_moved || fade[tile][0] != 1.0f || fade[tile][1] != 1.0f;
      // After the first tiles a maximum seldom moves.
      if (__any_sync(device::kFullWarp, has_moved)) {
#pragma unroll
        for (int tile = 0; tile < kNumTiles; ++tile)
#pragma unroll
          for (int m = 0; m < Shape::kOutTiles; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) state.out[tile][m][i] *= fade[tile][i % 2];
      }

      // O^T = V^T P^T
      constexpr int kVChunks = Shape::kVRowBytes / 16, kTilesPerPair = v_tiles_per_pair<V::kBits>();
      const int matrix = lane / 8, v_row = matrix / 2 * 8 + lane % 8;
#pragma unroll
      for (int chunks = 0; chunks < kVChunks / 2; ++chunks) {
        uint32_t codes[4];
        device::ldmatrix_x4_trans(
            codes, stage.v + v_row * kVChunks + matrix_chunk<Shape::kVRowBytes>(v_row, chunks * 2 + matrix % 2));
#pragma unroll
        for (int m = 0; m < kTilesPerPair; ++m) {
          uint32_t a[4];
          v_operand<kVCodec>(a, codes, m);
#pragma unroll
          for (int tile = 0; tile < kNumTiles; ++tile)
            mma_16<V::kIsBF16>(state.out[tile][chunks * kTilesPerPair + m], a, weights[tile]);
        }
      }
    }
    __syncthreads();  // no warp reads its stages any more; copies past the last tile were never started

    // The warps' results side by side.
    typename Shape::Merge& merge = storage.merge;
#pragma unroll
    for (int tile = 0; tile < kNumTiles; ++tile)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float sum = state.sum[tile][c], min_sum = state.min_sum[tile][c];
#pragma unroll
        for (int stride = 4; stride <= 16; stride *= 2) {
          sum += __shfl_xor_sync(device::kFullWarp, sum, stride);
          if constexpr (V::kHasParams) min_sum += __shfl_xor_sync(device::kFullWarp, min_sum, stride);
        }
        const int column = tile * 8 + pair * 2 + c;
        if (g == 0) {
          merge.max[warp][column] = state.max[tile][c];
          merge.sum[warp][column] = sum;
        }
        const float unit = V::kHasParams ? state.v_unit * V::kUnit : V::kUnit;
#pragma unroll
        for (int m = 0; m < Shape::kOutTiles; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float x = state.out[tile][m][half * 2 + c] * (half ? unit / V::kOddFactor : unit);
            if constexpr (V::kHasParams) x += min_sum;
            merge.out[warp][column][out_element<V::kBits>(m, g, half)] = x;
          }
      }
    __syncthreads();
    constexpr int kPerLane = kHeadDim / device::kWarpSize;
    for (int row = warp; row < num_rows; row += kDecodeWarps) {
      float largest = merge.max[0][row];
#pragma unroll
      for (int w = 1; w < kDecodeWarps; ++w) largest = fmaxf(largest, merge.max[w][row]);
      const float base = largest == kNegativeInfinity ? 0.0f : largest;
      float out[kPerLane] = {};
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float weight = device::ex2_approx(merge.max[w][row] - base);
        sum = fmaf(weight, merge.sum[w][row], sum);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) out[i] = fmaf(weight, merge.out[w][row][lane * kPerLane + i], out[i]);
      }
      if (item.partial_row < 0) {
        store_out_row<kPerLane>(params, item.token_begin + row / params.group,
                                item.kv_head * params.group + row % params.group, out, sum);
      } else {
        store_partial_row<kPerLane>(params, int64_t{item.partial_row} + row, out, largest, sum);
      }
    }
    __syncthreads();  // the next item overwrites what was read here
  }
}

template <int kHeadDim, KvCodec kKCodec, KvCodec kVCodec>
struct DecodeLaunch {
  static size_t shared_bytes(int num_columns) {
    return num_columns == 8 ? sizeof(typename DecodeShape<kHeadDim, kKCodec, kVCodec, 8>::Storage)
                            : sizeof(typename DecodeShape<kHeadDim, kKCodec, kVCodec, 16>::Storage);
  }
  static int ctas_per_sm(int num_columns) {
    return num_columns == 8 ? DecodeShape<kHeadDim, kKCodec, kVCodec, 8>::kCtasPerSm
                            : DecodeShape<kHeadDim, kKCodec, kVCodec, 16>::kCtasPerSm;
  }
  static void launch(const AttendKernelParams& params, int num_columns, int num_ctas, void* stream) {
    const auto start = [&](auto* kernel) {
      device::launch("attend_decode", kernel, {static_cast<unsigned>(num_ctas)}, {kDecodeThreads},
                     shared_bytes(num_columns), stream, params);
    };
    if (num_columns == 8)
      start(&attend_decode_kernel<kHeadDim, kKCodec, kVCodec, 8>);
    else
      start(&attend_decode_kernel<kHeadDim, kKCodec, kVCodec, 16>);
  }
};

}  // namespace partita
