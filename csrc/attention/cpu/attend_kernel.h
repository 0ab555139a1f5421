// Between attend's flow (attend.cpp) and its instruction sets: plain data and function pointers only, because a
// translation unit compiled for AVX-512 must not share inline code with baseline ones.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/attention.h"

namespace partita {

constexpr int kKvTileTokens = 64;    // a tile of KV: positions [64 t, 64 t + 64)
constexpr int kKvSplitTokens = 256;  // a split of KV: positions [256 s, 256 s + 256); one partial softmax each
constexpr int kMaxQueryRows = 96;    // of one item, unless one token's group alone is larger

// One stream (K or V) of one (layer, head) as it lies in every page.
struct KvStream {
  KvCodec codec;
  size_t codes_offset;   // from the page's first byte, of token 0's row
  size_t params_offset;  // likewise, of token 0's (scale, min)
  size_t row_bytes;
};

// The query rows of one work item against one KV head. Row r is token r / group, query head r % group of the head.
struct AttendTask {
  int num_rows;  // tokens * group
  int group;     // G, query heads per KV head
  int head_dim;
  int64_t first_position;  // absolute, of row 0's token
  const float* q;          // [tokens, q_stride], the group's heads contiguous
  int64_t q_stride;
  float* out;  // [tokens, out_stride]
  int64_t out_stride;

  const int32_t* page_table;
  const std::byte* arena;
  size_t arena_page_bytes;
  int page_size;
  KvStream k, v;

  int window;
  float scale;
  float soft_cap;
  bool exact;

  int split_begin, split_end;  // KV splits to walk
  float* partials;             // null: merge them and write out; else one partial per split, from split_begin on
};

// A partial is m [rows], l [rows], o [rows, pitch] floats; columns in the kernel's own order.
constexpr int partial_pitch(int head_dim) { return (head_dim + 63) / 64 * 64; }
constexpr size_t partial_floats(int num_rows, int head_dim) {
  return (static_cast<size_t>(num_rows) * (2 + partial_pitch(head_dim)) + 15) / 16 * 16;
}

struct AttendKernel {
  size_t (*scratch_bytes)(int max_rows, int head_dim);
  // next: what this worker will probably run afterwards, or null: the first of its K and V may be fetched meanwhile.
  void (*attend)(const AttendTask& task, const AttendTask* next, std::byte* scratch);
  // Merges num_partials consecutive splits' partials in ascending order and writes out.
  void (*merge)(const AttendTask& task, const float* partials, int num_partials, std::byte* scratch);
};
const AttendKernel& attend_kernel_portable();
const AttendKernel& attend_kernel_avx2();
const AttendKernel& attend_kernel_avx512();

// Row arithmetic of append. Every instruction set gives the same bits.
struct KvRowKernel {
  void (*normalize)(float* x, const float* weight, float eps, int head_dim);         // RMS, in place
  void (*apply_rope)(float* x, const float* cos, const float* sin, int rotary_dim);  // in place
  void (*rotate)(float* x, int head_dim, int rotation_size);                         // Hadamard, in place
  void (*encode)(KvCodec codec, const float* x, int head_dim, std::byte* codes, uint16_t* params);  // params: [2]
  void (*decode)(KvCodec codec, const std::byte* codes, const uint16_t* params, int head_dim, float* x);
};
const KvRowKernel& kv_row_kernel_portable();
const KvRowKernel& kv_row_kernel_avx2();
const KvRowKernel& kv_row_kernel_avx512();

// Of the active instruction set.
const AttendKernel& active_attend_kernel();
const KvRowKernel& active_kv_row_kernel();

}  // namespace partita
