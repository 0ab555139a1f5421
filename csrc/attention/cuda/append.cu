// Append: per head of a token, norm + RoPE + block Hadamard + codes, from one read of qkv to the page slot.
//
// A head belongs to kLanes neighbouring lanes of a warp; lane l holds elements [16 l, 16 l + 16). So the butterflies of
// stride 1, 2, 4, 8 stay in a lane's registers and those of stride 16 and up cost one shuffle an element: at D = 128
// three of seven stages. RoPE's other half is read from memory once more (L1) rather than shuffled.
//
// The operations and their order are those of cpu/kv_rows_body.h, none fused: equal fp32 rows give equal bytes.
#include "attention/append_gpu_kernel.h"
#include "norm/cuda/row_values.cuh"

namespace partita {
namespace {

using namespace rows;
using Params = AppendKernelParams;

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 5;  // at most 96 registers; left alone, the compiler interleaves all divisions in 160
constexpr int kLaneValues = 16;
constexpr int kLaneItems = kLaneValues / kItemValues;
constexpr float kMaxHalf = 65504.0f;

__device__ __forceinline__ float clamp_to_half(float x) {
  return x > kMaxHalf ? kMaxHalf : (x < -kMaxHalf ? -kMaxHalf : x);
}

// One head of one token: where its lane stands.
struct HeadLane {
  const void* row;  // [D] of qkv
  DType type;
  int head_dim;
  bool is_vector;
  int lane;       // 0..kLanes-1
  unsigned mask;  // the head's lanes in the warp
};

// 1 / sqrt(mean(x^2) + eps). Sixteen column sums d % 16 from top to bottom, then a tree, as on the CPU: lane l sums
// columns [kColumns l, ..), read from L1, since its own elements belong to sixteen columns.
template <int kLanes>
__device__ __forceinline__ float inverse_rms(const HeadLane& head, float eps) {
  constexpr int kColumns = kLaneValues / kLanes;
  float sums[kColumns] = {};
  for (int d = head.lane * kColumns; d < head.head_dim; d += kLaneValues) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (d + c >= head.head_dim) break;
      const float x = load_value(head.row, head.type, d + c);
      sums[c] = __fadd_rn(sums[c], __fmul_rn(x, x));
    }
  }
#pragma unroll
  for (int width = kLaneValues / 2; width >= kColumns; width /= 2)
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      sums[c] = __fadd_rn(sums[c], __shfl_xor_sync(head.mask, sums[c], width / kColumns));
#pragma unroll
  for (int width = kColumns / 2; width > 0; width /= 2)
#pragma unroll
    for (int c = 0; c < width; ++c) sums[c] = __fadd_rn(sums[c], sums[c + width]);
  return 1.0f / sqrtf(__fadd_rn(sums[0] / static_cast<float>(head.head_dim), eps));
}

// x[j] of the pair (a, b) = (element i, element i + half), of which `x` is one and `other` the other.
__device__ __forceinline__ float rope_value(float x, float other, float cos, float sin, bool is_low) {
  const float turned = __fmul_rn(other, sin);
  return __fadd_rn(__fmul_rn(x, cos), is_low ? -turned : turned);
}

// Elements [at, at + 8), normed already; `weight` and `inverse` norm the partners as well.
__device__ __forceinline__ void rope_item(float (&x)[kItemValues], const HeadLane& head, const Params& p, int at,
                                          int64_t position, const float* weight, float inverse) {
  const int half = p.rotary_dim / 2;
  const float* cos = p.cos + position * half;
  const float* sin = p.sin + position * half;
  if (at >= p.rotary_dim) return;
  if (p.is_rope_vector) {
    const bool is_low = at < half;
    const int partner = is_low ? at + half : at - half, pair = is_low ? at : at - half;
    float other[kItemValues], cosines[kItemValues], sines[kItemValues];
    load_item(other, head.row, head.type, partner, head.head_dim, head.is_vector);
    if (weight) {
      load_constant_item(cosines, weight, partner, head.head_dim, true);
#pragma unroll
      for (int j = 0; j < kItemValues; ++j) other[j] = __fmul_rn(__fmul_rn(other[j], inverse), cosines[j]);
    }
    load_constant_item(cosines, cos, pair, half, true);
    load_constant_item(sines, sin, pair, half, true);
#pragma unroll
    for (int j = 0; j < kItemValues; ++j) x[j] = rope_value(x[j], other[j], cosines[j], sines[j], is_low);
    return;
  }
#pragma unroll
  for (int j = 0; j < kItemValues; ++j) {
    const int d = at + j;
    if (d >= p.rotary_dim) break;
    const bool is_low = d < half;
    const int partner = is_low ? d + half : d - half, pair = is_low ? d : d - half;
    float other = load_value(head.row, head.type, partner);
    if (weight) other = __fmul_rn(__fmul_rn(other, inverse), weight[partner]);
    x[j] = rope_value(x[j], other, cos[pair], sin[pair], is_low);
  }
}

// y = H x / sqrt(n) on each run of n = rotation_size elements: butterflies of stride 1, 2, ... n / 2.
template <int kLanes>
__device__ __forceinline__ void rotate(float (&x)[kLaneItems][kItemValues], const HeadLane& head, int rotation_size,
                                       float factor) {
#pragma unroll
  for (int stride = 1; stride < kItemValues; stride *= 2)
#pragma unroll
    for (int i = 0; i < kLaneItems; ++i)
#pragma unroll
      for (int j = 0; j < kItemValues; ++j)
        if (!(j & stride)) {
          const float a = x[i][j], b = x[i][j + stride];
          x[i][j] = __fadd_rn(a, b);
          x[i][j + stride] = __fadd_rn(a, -b);
        }
  if (rotation_size > kItemValues) {
#pragma unroll
    for (int j = 0; j < kItemValues; ++j) {
      const float a = x[0][j], b = x[1][j];
      x[0][j] = __fadd_rn(a, b);
      x[1][j] = __fadd_rn(a, -b);
    }
  }
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    if (rotation_size <= kLaneValues * distance) break;
    const bool is_high = head.lane & distance;
#pragma unroll
    for (int i = 0; i < kLaneItems; ++i)
#pragma unroll
      for (int j = 0; j < kItemValues; ++j) {
        const float other = __shfl_xor_sync(head.mask, x[i][j], distance);
        x[i][j] = __fadd_rn(other, is_high ? -x[i][j] : x[i][j]);
      }
  }
#pragma unroll
  for (int i = 0; i < kLaneItems; ++i)
#pragma unroll
    for (int j = 0; j < kItemValues; ++j) x[i][j] = __fmul_rn(x[i][j], factor);
}

// Codes with the fp16 (scale, min) as stored, over the whole head.
template <int kLanes>
__device__ __forceinline__ void encode_integer(const float (&x)[kLaneItems][kItemValues], const HeadLane& head,
                                               int num_items, const AppendStream& stream, std::byte* codes,
                                               std::byte* params) {
  const bool is_byte = stream.codec == KvCodec::kInt8;
  const float top = is_byte ? 255.0f : 15.0f;
  float low = __uint_as_float(0x7f800000u), high = -low;
#pragma unroll
  for (int i = 0; i < kLaneItems; ++i)
#pragma unroll
    for (int j = 0; j < kItemValues; ++j) {
      if (i >= num_items) break;
      low = fminf(low, x[i][j]);
      high = fmaxf(high, x[i][j]);
    }
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    low = fminf(low, __shfl_xor_sync(head.mask, low, distance));
    high = fmaxf(high, __shfl_xor_sync(head.mask, high, distance));
  }
  low = __fadd_rn(clamp_to_half(low), 0.0f);  // -0 becomes 0
  high = __fadd_rn(clamp_to_half(high), 0.0f);
  const uint16_t scale_bits = device::f32_to_f16(clamp_to_half(__fadd_rn(high, -low) / top));
  const uint16_t min_bits = device::f32_to_f16(low);
  if (head.lane == 0) device::store_4(params, scale_bits | static_cast<uint32_t>(min_bits) << 16);
  const float scale = device::f16_to_f32(scale_bits), min = device::f16_to_f32(min_bits);
  const float divisor = scale > 0.0f ? scale : __uint_as_float(0x7f800000u);
#pragma unroll
  for (int i = 0; i < kLaneItems; ++i) {
    if (i >= num_items) break;
    uint32_t values[kItemValues];
#pragma unroll
    for (int j = 0; j < kItemValues; ++j) {
      float code = __fadd_rn(x[i][j], -min) / divisor;
      code = code > 0.0f ? code : 0.0f;  // NaN too
      code = code < top ? code : top;
      values[j] = __float_as_uint(__fadd_rn(code, 8388608.0f)) & 0xffu;  // 2^23: rounds to nearest even
    }
    const int at = head.lane * kLaneValues + i * kItemValues;
    if (is_byte) {
      const uint32_t first = values[0] | values[1] << 8 | values[2] << 16 | values[3] << 24;
      const uint32_t second = values[4] | values[5] << 8 | values[6] << 16 | values[7] << 24;
      device::store_8(codes + at, make_uint2(first, second));
    } else {
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < kItemValues; ++j) word |= values[j] << 4 * j;
      device::store_4(codes + at / 2, word);
    }
  }
}

template <int kLanes>
__device__ __forceinline__ void encode(const float (&x)[kLaneItems][kItemValues], const HeadLane& head, int num_items,
                                       const AppendStream& stream, std::byte* codes, std::byte* params) {
  if (stream.codec == KvCodec::kInt8 || stream.codec == KvCodec::kInt4Rotated || stream.codec == KvCodec::kInt4Plain) {
    encode_integer<kLanes>(x, head, num_items, stream, codes, params);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneItems; ++i) {
    if (i >= num_items) break;
    const int at = head.lane * kLaneValues + i * kItemValues;
    if (stream.codec == KvCodec::kE4M3) {
      uint32_t words[2] = {};
#pragma unroll
      for (int j = 0; j < kItemValues; j += 2)
        words[j / 4] |= static_cast<uint32_t>(device::f32x2_to_e4m3x2(x[i][j], x[i][j + 1])) << 8 * (j % 4);
      device::store_8(codes + at, make_uint2(words[0], words[1]));
    } else if (stream.codec == KvCodec::kF16) {
      float clamped[kItemValues];
#pragma unroll
      for (int j = 0; j < kItemValues; ++j) clamped[j] = clamp_to_half(x[i][j]);
      store_item(clamped, codes, DType::kF16, at, head.head_dim, true);
    } else {
      store_item(x[i], codes, stream.codec == KvCodec::kBF16 ? DType::kBF16 : DType::kF32, at, head.head_dim, true);
    }
  }
}

template <int kLanes>
__device__ __forceinline__ void append_head(const Params& p, int64_t token, int head_idx) {
  const bool is_q = head_idx < p.num_q_heads, is_v = head_idx >= p.num_q_heads + p.num_kv_heads;
  const int64_t position = p.token_positions[token];
  if (position < 0 || (p.cos && position >= p.num_positions) || (is_q && !p.changes_q)) return;
  HeadLane head;
  head.row = static_cast<std::byte*>(p.qkv) +
             (token * p.qkv_stride + int64_t{head_idx} * p.head_dim) * static_cast<int64_t>(dtype_bytes(p.qkv_type));
  head.type = p.qkv_type;
  head.head_dim = p.head_dim;
  head.is_vector = p.is_vector;
  head.lane = static_cast<int>(threadIdx.x) % kLanes;
  head.mask = ((1u << kLanes) - 1u) << (threadIdx.x % 32u / kLanes * kLanes);
  const int first = head.lane * kLaneValues;
  const int left = (p.head_dim - first) / kItemValues;
  const int num_items = left < 0 ? 0 : (left < kLaneItems ? left : kLaneItems);

  float x[kLaneItems][kItemValues] = {};
#pragma unroll
  for (int i = 0; i < kLaneItems; ++i)
    if (i < num_items) load_item(x[i], head.row, head.type, first + i * kItemValues, p.head_dim, p.is_vector);
  if (!is_v) {
    const float* weight = is_q ? p.q_norm_weight : p.k_norm_weight;
    float inverse = 1.0f;
    if (weight) inverse = inverse_rms<kLanes>(head, p.norm_eps);
#pragma unroll
    for (int i = 0; i < kLaneItems; ++i) {
      if (i >= num_items) break;
      const int at = first + i * kItemValues;
      if (weight) {
        float factors[kItemValues];
        load_constant_item(factors, weight, at, p.head_dim, p.is_rope_vector);
#pragma unroll
        for (int j = 0; j < kItemValues; ++j) x[i][j] = __fmul_rn(__fmul_rn(x[i][j], inverse), factors[j]);
      }
      if (p.cos) rope_item(x[i], head, p, at, position, weight, inverse);
    }
  }
  if (is_v ? p.v.rotates : p.k.rotates) rotate<kLanes>(x, head, p.rotation_size, p.rotation_factor);

  if (is_q) {
    __syncwarp(head.mask);  // every lane has read its partners
#pragma unroll
    for (int i = 0; i < kLaneItems; ++i)
      if (i < num_items)
        store_item(x[i], const_cast<void*>(head.row), head.type, first + i * kItemValues, p.head_dim, p.is_vector);
    return;
  }
  const AppendStream& stream = is_v ? p.v : p.k;
  const int kv_head = head_idx - p.num_q_heads - (is_v ? p.num_kv_heads : 0);
  const int32_t page_id = p.page_tables[p.token_requests[token] * p.page_table_stride + position / p.page_size];
  if (page_id < 0) return;
  const int64_t row = int64_t{kv_head} * p.page_size + position % p.page_size;
  std::byte* page = p.arena + page_id * p.arena_page_bytes;
  encode<kLanes>(x, head, num_items, stream, page + stream.codes_offset + row * stream.row_bytes,
                 page + stream.params_offset + row * 4);
}

template <int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) append_kernel(const __grid_constant__ Params p) {
  constexpr int kHeads = kThreads / kLanes;  // of a thread block
  const int num_heads = p.num_q_heads + 2 * p.num_kv_heads;
  const int64_t num_parts = (num_heads + kHeads - 1) / kHeads;
  for (int64_t work = blockIdx.x; work < p.num_tokens * num_parts; work += gridDim.x) {
    const int head_idx = static_cast<int>(work % num_parts) * kHeads + static_cast<int>(threadIdx.x) / kLanes;
    if (head_idx < num_heads) append_head<kLanes>(p, work / num_parts, head_idx);
  }
}

template <int kLanes>
void launch_lanes(const Params& params, int num_ctas, void* stream) {
  constexpr int kHeads = kThreads / kLanes;
  constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;
  const int64_t num_heads = params.num_q_heads + 2 * params.num_kv_heads;
  int64_t grid = params.num_tokens * ((num_heads + kHeads - 1) / kHeads);
  const int64_t most = num_ctas > 0 ? num_ctas : kMaxGrid;
  grid = grid < most ? grid : most;
  device::launch("append", append_kernel<kLanes>, {static_cast<unsigned>(grid)}, {kThreads}, 0, stream, params);
}

void launch_append(const Params& params, int num_ctas, void* stream) {
  if (params.head_dim <= 32) return launch_lanes<2>(params, num_ctas, stream);
  if (params.head_dim <= 64) return launch_lanes<4>(params, num_ctas, stream);
  if (params.head_dim <= 128) return launch_lanes<8>(params, num_ctas, stream);
  launch_lanes<16>(params, num_ctas, stream);
}

const KernelRegistration<AppendKernel> kRegistered({{"append", ""}, &launch_append});

}  // namespace
}  // namespace partita
