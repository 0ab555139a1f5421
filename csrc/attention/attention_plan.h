// One work item of an attention plan.
#pragma once

#include "attention/attention.h"

namespace partita {

// Query rows [token_begin, token_end) of one request against one KV head, over the KV splits [split_begin, split_end).
struct AttentionPlan::Item {
  int32_t request;
  int32_t kv_head;
  int32_t token_begin;  // rows of the batch
  int32_t token_end;
  int32_t split_begin;
  int32_t split_end;
  // Where several items share a query tile: each leaves one partial per split in the workspace, the last one to finish
  // merges them all in ascending order.
  int32_t counter_idx;     // -1: this item walks every split and writes out itself
  int32_t num_items;       // that share the counter
  int32_t first_split;     // of the tile
  int32_t num_splits;      // of the tile
  size_t partials_offset;  // in the workspace, of the tile's first split
};

}  // namespace partita
