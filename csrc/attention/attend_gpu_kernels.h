// What attend's kernels take and how they register: the seam between attend_gpu.cpp and attention/cuda.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/attention_gpu.h"
#include "core/kernel_registry.h"

namespace partita {

constexpr int kAttendTileTokens = 64;  // K and V are walked in tiles that begin at multiples of this
constexpr int kMaxAttendGroup = 16;    // query heads of a KV head that the tuned kernels take

// One query tile against one range of KV positions of one KV head. Tile row r is token token_begin + r / group, query
// head kv_head * group + r % group. A row sees those positions of [kv_begin, kv_end) that are not past its own and not
// before its window. The tokens may belong to several requests when they share these pages.
struct GpuAttendItem {
  int32_t request;  // whose page table
  int32_t kv_head;
  int32_t token_begin, num_tokens;
  int32_t kv_begin, kv_end;
  int32_t partial_row;  // of row 0; -1: no other item has these rows, the result goes to out
  int32_t padding;
};
constexpr int kAttendItemEntries = sizeof(GpuAttendItem) / sizeof(int32_t);

// The query heads of one KV head of one token, whose partial results are added up. Part i's rows begin at partial row
// parts[first_part + i]; they are added in this order.
struct GpuAttendMerge {
  int32_t token, kv_head, first_part, num_parts;
};
constexpr int kAttendMergeEntries = sizeof(GpuAttendMerge) / sizeof(int32_t);

// One stream of one layer inside a page.
struct GpuKvStream {
  KvCodec codec;
  int32_t row_bytes;      // codes of one (token, head)
  int64_t codes_offset;   // from the page's first byte, of head 0
  int64_t params_offset;  // the same; integer codecs
};

struct AttendKernelParams {
  // pages
  const std::byte* arena;
  int64_t arena_page_bytes;
  GpuKvStream k, v;
  int32_t page_size, page_size_log2;
  int32_t head_dim, group, num_kv_heads;
  int32_t window;              // 0: all
  int32_t v_rotation;          // block size of the rotation that out is turned back by; 0: none
  const int32_t* page_tables;  // [R, page_table_stride]
  int64_t page_table_stride;
  // rows
  int64_t num_tokens;
  const int32_t* token_positions;  // [T]
  const int32_t* token_requests;   // [T]
  const void* q;                   // [T, q_stride], the first Hq * D elements of each row
  int64_t q_stride;
  void* out;  // [T, out_stride]
  int64_t out_stride;
  DType q_type, out_type;
  float scale, soft_cap;
  // The same in units of log2. Sums of products times score_scale are scores, or what is capped at score_cap.
  float score_scale, score_cap;
  // plan, in device memory
  const int32_t* queues;         // [grid + 1]
  const GpuAttendItem* items;    // [queues[grid]]
  const int32_t* num_merges;     // [1]
  const GpuAttendMerge* merges;  // [num_merges]
  const int32_t* parts;
  // Unfinished rows: sum of exp2(s - m) v, and (m, sum of exp2(s - m)), s the scores times log2(e).
  float* partial_out;   // [num_partial_rows, D]
  float* partial_sums;  // [num_partial_rows, 2]
};

// Codecs of the same bytes are the same to attend: rotation is not its business until the output.
constexpr KvCodec stored_codec(KvCodec codec) { return codec == KvCodec::kInt4Rotated ? KvCodec::kInt4Plain : codec; }

struct AttendDecodeKernel {
  static constexpr const char* kFamily = "attend_decode";
  KernelInfo info;
  int max_head_dim;  // smaller ones run padded with zeros
  KvCodec k_codec, v_codec;
  int (*ctas_per_sm)(int num_columns);  // as registers allow
  size_t (*shared_bytes)(int num_columns);
  // num_columns: query rows of a tile, 8 or 16
  void (*launch)(const AttendKernelParams& params, int num_columns, int num_ctas, void* stream);
};

struct AttendPrefillKernel {
  static constexpr const char* kFamily = "attend_prefill";
  KernelInfo info;
  int max_head_dim;
  bool converts;  // any codecs but fp32, computed in fp16; else both streams hold codec
  KvCodec codec;
  int tile_rows;
  int ctas_per_sm;  // as registers allow
  size_t shared_bytes;
  void (*launch)(const AttendKernelParams& params, int num_ctas, void* stream);
};

struct AttendMergeKernel {
  static constexpr const char* kFamily = "attend_merge";
  KernelInfo info;
  void (*launch)(const AttendKernelParams& params, int num_ctas, void* stream);
};

struct AttendNaiveKernel {
  static constexpr const char* kFamily = "attend_naive";
  KernelInfo info;
  void (*launch)(const AttendKernelParams& params, int num_ctas, void* stream);
};

}  // namespace partita
