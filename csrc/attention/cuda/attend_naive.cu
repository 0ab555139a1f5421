// Attention in fp32 for any codec, head size and group: the reference, and the fallback where no tuned kernel fits. One
// warp for each (token, query head); lanes are keys for the scores and elements for the output.
#include "attention/cuda/attend_rows.cuh"
#include "device/launch.cuh"

namespace partita {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxHeadDim = 256;
constexpr int kPerLane = kMaxHeadDim / device::kWarpSize;
constexpr int kTileKeys = device::kWarpSize;

struct NaiveStorage {
  float q[kWarps][kMaxHeadDim];
};

// One row of one stream: where its codes lie, and what turns them into values.
struct CodeRow {
  const std::byte* codes;
  float scale, min;
};

__device__ __forceinline__ CodeRow code_row(const AttendKernelParams& params, const GpuKvStream& stream,
                                            int64_t page_id, int kv_head, int slot) {
  const std::byte* page = params.arena + page_id * params.arena_page_bytes;
  const int64_t row = int64_t{kv_head} * params.page_size + slot;
  CodeRow found{page + stream.codes_offset + row * stream.row_bytes, 1.0f, 0.0f};
  if (stream.codec == KvCodec::kInt8 || stream.codec == KvCodec::kInt4Plain) {
    const uint32_t pair = device::load_4(page + stream.params_offset + row * 4);
    found.scale = device::f16_to_f32(static_cast<uint16_t>(pair));
    found.min = device::f16_to_f32(static_cast<uint16_t>(pair >> 16));
  }
  return found;
}

__device__ __forceinline__ float code_value(const CodeRow& row, KvCodec codec, int d) {
  switch (codec) {
    case KvCodec::kF32:
      return reinterpret_cast<const float*>(row.codes)[d];
    case KvCodec::kBF16:
      return device::bf16_to_f32(reinterpret_cast<const uint16_t*>(row.codes)[d]);
    case KvCodec::kF16:
      return device::f16_to_f32(reinterpret_cast<const uint16_t*>(row.codes)[d]);
    case KvCodec::kE4M3:
      return device::f16_to_f32(static_cast<uint16_t>(
          device::e4m3x2_to_f16x2(static_cast<uint16_t>(reinterpret_cast<const uint8_t*>(row.codes)[d]))));
    case KvCodec::kInt8:
      return static_cast<float>(reinterpret_cast<const uint8_t*>(row.codes)[d]) * row.scale + row.min;
    default: {
      const uint8_t byte = reinterpret_cast<const uint8_t*>(row.codes)[d / 2];
      return static_cast<float>(d % 2 ? byte >> 4 : byte & 15) * row.scale + row.min;
    }
  }
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int stride = 16; stride > 0; stride /= 2) x = fmaxf(x, __shfl_xor_sync(device::kFullWarp, x, stride));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int stride = 16; stride > 0; stride /= 2) x += __shfl_xor_sync(device::kFullWarp, x, stride);
  return x;
}

__global__ void __launch_bounds__(kWarps* device::kWarpSize)
    attend_naive_kernel(const __grid_constant__ AttendKernelParams params) {
  auto& storage = device::dynamic_shared<NaiveStorage>();
  const int warp = static_cast<int>(threadIdx.x) / device::kWarpSize;
  const int lane = static_cast<int>(device::lane_idx());
  float* q = storage.q[warp];
  const int num_q_heads = params.group * params.num_kv_heads;
  const int64_t num_rows = params.num_tokens * num_q_heads;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + warp; row < num_rows; row += int64_t{gridDim.x} * kWarps) {
    const int64_t token = row / num_q_heads;
    const int head = static_cast<int>(row % num_q_heads), kv_head = head / params.group;
    const int position = params.token_positions[token];
    if (position < 0) continue;
    const int32_t* pages = params.page_tables + int64_t{params.token_requests[token]} * params.page_table_stride;
    __syncwarp();  // the row before has been read
    for (int d = lane; d < params.head_dim; d += device::kWarpSize)
      q[d] = load_row_element(params.q, params.q_type, token * params.q_stride + int64_t{head} * params.head_dim + d);
    __syncwarp();

    float out[kPerLane] = {};  // elements lane * kPerLane ...
    float max = kNegativeInfinity, sum = 0;
    const int first_key = params.window > 0 && position >= params.window ? position - params.window + 1 : 0;
    for (int tile = first_key; tile <= position; tile += kTileKeys) {
      const int key = tile + lane;
      float score = kNegativeInfinity;
      if (key <= position) {
        const CodeRow k =
            code_row(params, params.k, pages[key >> params.page_size_log2], kv_head, key & (params.page_size - 1));
        float dot = 0;
        for (int d = 0; d < params.head_dim; ++d) dot = fmaf(q[d], code_value(k, params.k.codec, d), dot);
        score = dot * params.scale;
        if (params.soft_cap > 0) score = params.soft_cap * tanhf(score / params.soft_cap);
      }
      const float next_max = fmaxf(max, warp_max(score));  // finite: the tile's first key is visible
      const float fade = expf(max - next_max);
      const float p = key <= position ? expf(score - next_max) : 0.0f;
      max = next_max;
      sum = sum * fade + warp_sum(p);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) out[i] *= fade;
      const int num_keys = min(kTileKeys, position - tile + 1);
      for (int j = 0; j < num_keys; ++j) {
        const float weight = __shfl_sync(device::kFullWarp, p, j);
        const int slot = tile + j;
        const CodeRow v =
            code_row(params, params.v, pages[slot >> params.page_size_log2], kv_head, slot & (params.page_size - 1));
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          const int d = lane * kPerLane + i;
          if (d < params.head_dim) out[i] = fmaf(weight, code_value(v, params.v.codec, d), out[i]);
        }
      }
    }
    store_out_row<kPerLane>(params, token, head, out, sum);
  }
}

void launch_attend_naive(const AttendKernelParams& params, int num_ctas, void* stream) {
  device::launch("attend_naive", attend_naive_kernel, {static_cast<unsigned>(num_ctas)}, {kWarps * device::kWarpSize},
                 sizeof(NaiveStorage), stream, params);
}

const KernelRegistration<AttendNaiveKernel> kRegistered({{"attend_naive", ""}, &launch_attend_naive});

}  // namespace
}  // namespace partita
