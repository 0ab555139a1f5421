// What append's kernel is given: append_gpu.cpp makes it, cuda/append.cu runs it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/attention_gpu.h"
#include "core/kernel_registry.h"

namespace partita {

// One stream (K or V) of the layer as it lies in every page.
struct AppendStream {
  KvCodec codec;
  bool rotates;
  int64_t row_bytes;      // codes of one (token, head)
  int64_t codes_offset;   // from the page's first byte, of head 0's token 0
  int64_t params_offset;  // likewise, of its (scale, min)
};

struct AppendKernelParams {
  // ---- the step
  int64_t num_tokens;              // T
  const int32_t* token_positions;  // [T]; -1: padded
  const int32_t* token_requests;   // [T]
  const int32_t* page_tables;      // [R, page_table_stride]
  int64_t page_table_stride;
  std::byte* arena;
  int64_t arena_page_bytes;
  // ---- the rows
  void* qkv;  // [T, (Hq + 2 * Hkv) * D]
  DType qkv_type;
  int64_t qkv_stride;  // elements
  bool is_vector;      // 8 values of qkv can be moved by whole vectors
  bool changes_q;
  int num_q_heads, num_kv_heads, head_dim, page_size;
  AppendStream k, v;
  // ---- norm, RoPE, rotation
  const float* q_norm_weight;  // [D] or null
  const float* k_norm_weight;  // [D] or null
  float norm_eps;
  const float* cos;  // [num_positions, rotary_dim / 2] or null
  const float* sin;
  int rotary_dim;
  int64_t num_positions;
  bool is_rope_vector;  // pairs lie a multiple of 8 elements apart, tables and weights at multiples of 16 bytes
  int rotation_size;
  float rotation_factor;  // 1 / sqrt(rotation_size)
};

struct AppendKernel {
  static constexpr const char* kFamily = "append";
  KernelInfo info;
  // num_ctas: most thread blocks; 0: as many as there are pieces of work.
  void (*launch)(const AppendKernelParams& params, int num_ctas, void* stream);
};

}  // namespace partita
