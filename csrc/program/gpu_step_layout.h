// Where a step's inputs lie in the one block that is staged in pinned memory and copied to the device at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace partita {

// The sizes that the layout follows from. A captured graph's are its row bucket's, so its addresses never move.
struct GpuStepSizes {
  int64_t num_tokens = 0;             // T
  int64_t num_requests = 0;           // R
  int64_t num_logit_rows = 0;         // S
  int64_t num_copies = 0;             // pages to copy
  int64_t page_table_stride = 0;      // entries of a request's page table
  int num_groups = 0;                 // KV groups
  std::vector<int64_t> plan_entries;  // of each attention plan's tables
};

// Byte offsets, each a multiple of 16; every section holds int32.
struct GpuStepLayout {
  explicit GpuStepLayout(const GpuStepSizes& sizes);

  int64_t token_rows, token_positions, token_requests;  // [T] -1 in the first two: padding
  int64_t cu_seqlens_q;                                 // [R + 1]
  int64_t context_starts;                               // [R] -1: padding
  int64_t logit_tokens;                                 // [S] token row of each logit row, -1: padding
  int64_t logit_rows;                                   // [S] row of the row store, -1: padding
  int64_t logit_num_tokens;                             // [S] tokens known before the one that is sampled
  int64_t num_copies;                                   // [1]
  int64_t copies;                                       // [num_copies, 2] source, target
  std::vector<int64_t> page_tables;                     // [groups] -> [R, page_table_stride]
  std::vector<int64_t> plan_tables;                     // [plans]
  int64_t num_bytes;

  static int32_t* at(std::byte* block, int64_t offset) { return reinterpret_cast<int32_t*>(block + offset); }
};

}  // namespace partita
