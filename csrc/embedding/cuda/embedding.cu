// Embedding lookup: a thread makes eight neighbouring elements of one token's row, from whatever bytes they lie in.
#include "embedding/embedding_gpu.h"
#include "norm/cuda/row_values.cuh"

namespace partita {
namespace {

using namespace rows;
using Params = EmbeddingKernel::Params;
constexpr int kMaxThreads = 256;

// Blocks are multiples of two bytes and rows hold whole blocks, so every field is a whole number of 16-bit words.
__device__ __forceinline__ uint32_t word_at(const std::byte* bytes, int64_t offset) {
  return *reinterpret_cast<const uint16_t*>(bytes + offset);
}
__device__ __forceinline__ float half_at(const std::byte* bytes, int64_t offset) {
  return device::f16_to_f32(static_cast<uint16_t>(word_at(bytes, offset)));
}
__device__ __forceinline__ uint32_t byte_at(const std::byte* bytes, int64_t offset) {
  return static_cast<uint32_t>(bytes[offset]);
}
// Four bytes at an even offset, the first in the low byte.
__device__ __forceinline__ uint32_t bytes4_at(const std::byte* bytes, int64_t offset) {
  return word_at(bytes, offset) | word_at(bytes, offset + 2) << 16;
}

// Eight codes as bytes of two words, and what makes values of them.
struct CodedItem {
  uint32_t codes[2];
  float scale;
  float min;
  int zero;
  bool has_min;
};

// Elements [at, at + 8) of the row, whose blocks have 32 values: eight neighbours share a block and a half of it.
__device__ __forceinline__ CodedItem read_block_32(const std::byte* row, WeightFormat format, int64_t at) {
  const int in_block = static_cast<int>(at % 32), nibble_shift = in_block < 16 ? 0 : 4;
  CodedItem item{};
  const auto read_nibbles = [&](const std::byte* nibbles) {
#pragma unroll
    for (int w = 0; w < 2; ++w) item.codes[w] = bytes4_at(nibbles, in_block % 16 + 4 * w) >> nibble_shift & 0x0f0f0f0fu;
  };
  switch (format) {
    case WeightFormat::kQ4_0: {
      const std::byte* block = row + at / 32 * 18;
      item.scale = half_at(block, 0);
      item.zero = 8;
      read_nibbles(block + 2);
      break;
    }
    case WeightFormat::kQ4_1: {
      const std::byte* block = row + at / 32 * 20;
      item.scale = half_at(block, 0);
      item.min = half_at(block, 2);
      item.has_min = true;
      read_nibbles(block + 4);
      break;
    }
    case WeightFormat::kQ5_0: {
      const std::byte* block = row + at / 32 * 22;
      item.scale = half_at(block, 0);
      item.zero = 16;
      read_nibbles(block + 6);
      const uint32_t fifth_bits = bytes4_at(block, 2) >> in_block;
#pragma unroll
      for (int j = 0; j < kItemValues; ++j) item.codes[j / 4] |= (fifth_bits >> j & 1u) << (8 * (j % 4) + 4);
      break;
    }
    default: {  // kQ8_0
      const std::byte* block = row + at / 32 * 34;
      item.scale = half_at(block, 0);
      item.zero = 128;
#pragma unroll
      for (int w = 0; w < 2; ++w) item.codes[w] = bytes4_at(block, 2 + in_block + 4 * w) ^ 0x80808080u;
    }
  }
  return item;
}

// Blocks of 256 values; a sub-scale serves 32 (Q4_K) or 16 (Q6_K) of them. The products of the two levels are exact.
__device__ __forceinline__ CodedItem read_block_256(const std::byte* row, WeightFormat format, int64_t at) {
  const int in_block = static_cast<int>(at % 256);
  CodedItem item{};
  if (format == WeightFormat::kQ4_K) {
    const std::byte* block = row + at / 256 * 144;
    const int group = in_block / 32;
    const std::byte* levels = block + 4;
    uint32_t sub_scale, sub_min;
    if (group < 4) {
      sub_scale = byte_at(levels, group) & 63u;
      sub_min = byte_at(levels, group + 4) & 63u;
    } else {
      sub_scale = (byte_at(levels, group + 4) & 0x0fu) | byte_at(levels, group - 4) >> 6 << 4;
      sub_min = byte_at(levels, group + 4) >> 4 | byte_at(levels, group) >> 6 << 4;
    }
    item.scale = __fmul_rn(half_at(block, 0), static_cast<float>(sub_scale));
    item.min = __fmul_rn(half_at(block, 2), -static_cast<float>(sub_min));
    item.has_min = true;
    const std::byte* nibbles = block + 16 + in_block / 64 * 32 + in_block % 32;
#pragma unroll
    for (int w = 0; w < 2; ++w) item.codes[w] = bytes4_at(nibbles, 4 * w) >> (in_block % 64 < 32 ? 0 : 4) & 0x0f0f0f0fu;
    return item;
  }
  // kQ6_K: two halves of 128; quarter q of a half has its low nibbles in bytes 32 (q % 2) .., its upper two bits at 2
  // q.
  const std::byte* block = row + at / 256 * 210;
  const int half = in_block / 128, quarter = in_block % 128 / 32, in_quarter = in_block % 32;
  const auto sub_scale = static_cast<int8_t>(byte_at(block, 192 + in_block / 16));
  item.scale = __fmul_rn(half_at(block, 208), static_cast<float>(sub_scale));
  item.zero = 32;
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    const uint32_t low = bytes4_at(block, half * 64 + quarter % 2 * 32 + in_quarter + 4 * w);
    const uint32_t high = bytes4_at(block, 128 + half * 32 + in_quarter + 4 * w);
    item.codes[w] = (low >> (quarter < 2 ? 0 : 4) & 0x0f0f0f0fu) | (high >> 2 * quarter & 0x03030303u) << 4;
  }
  return item;
}

__global__ void __launch_bounds__(kMaxThreads) embedding_kernel(const __grid_constant__ Params p) {
  const int64_t token = blockIdx.x;
  const int64_t at = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * kItemValues;
  if (at >= p.hidden) return;
  const int32_t id = p.token_ids[token];
  const bool is_known = id >= 0 && id < p.vocab_size;
  const int64_t row_idx = is_known && p.row_order ? p.row_order[id] : id;
  const std::byte* row = p.rows + (is_known ? row_idx : 0) * p.row_bytes;

  float x[kItemValues] = {};
  if (is_known) {
    switch (p.format) {
      case WeightFormat::kF32:
      case WeightFormat::kF16:
      case WeightFormat::kBF16: {
        const DType type = p.format == WeightFormat::kF32   ? DType::kF32
                           : p.format == WeightFormat::kF16 ? DType::kF16
                                                            : DType::kBF16;
        const bool is_vector = p.hidden % kItemValues == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
        load_item(x, row, type, at, p.hidden, is_vector);
        break;
      }
      default: {
        const bool is_two_level = p.format == WeightFormat::kQ4_K || p.format == WeightFormat::kQ6_K;
        const CodedItem item = is_two_level ? read_block_256(row, p.format, at) : read_block_32(row, p.format, at);
#pragma unroll
        for (int j = 0; j < kItemValues; ++j) {
          const int code = static_cast<int>(item.codes[j / 4] >> 8 * (j % 4) & 0xffu) - item.zero;
          const float product = __fmul_rn(item.scale, static_cast<float>(code));
          x[j] = item.has_min ? __fadd_rn(product, item.min) : product;
        }
      }
    }
  }
  float* out = p.out + token * p.out_stride;
#pragma unroll
  for (int j = 0; j < kItemValues; ++j) x[j] = __fmul_rn(x[j], p.scale);
  const bool is_vector = p.hidden % kItemValues == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  store_item(x, out, DType::kF32, at, p.hidden, is_vector);
}

void launch_embedding(const Params& params, void* stream) {
  const int64_t items = (params.hidden + kItemValues - 1) / kItemValues;
  const int64_t threads = items < kMaxThreads ? (items + 31) / 32 * 32 : kMaxThreads;
  device::launch("embedding", embedding_kernel,
                 {static_cast<unsigned>(params.num_tokens), static_cast<unsigned>((items + threads - 1) / threads)},
                 {static_cast<unsigned>(threads)}, 0, stream, params);
}

const KernelRegistration<EmbeddingKernel> kRegistered({{"embedding", ""}, &launch_embedding});

}  // namespace
}  // namespace partita
