// How a GPU plan cuts a step's work. The rules are tested through what they make, GpuAttentionPlan::tables().
//
// Work is a sequence of (query tile, KV head), each a run of KV tiles. The sequence is cut into as many equal parts as
// there are thread blocks: every block gets one contiguous run, and only a pair that lies across a border is split over
// KV. So borders bound how many partial results there can be, whatever the lengths are, which a captured graph's sizes
// rest on; and the plan costs one pass over the pairs, where a heap of blocks costs a logarithm for each.
#pragma once

#include "attention/attend_gpu_kernels.h"

namespace partita {

// What an item costs beside its KV tiles (queries, merging its warps, storing), in KV tiles.
constexpr int kAttendItemTiles = 2;
// No part of a split is shorter, and no block gets less while others would idle, in KV tiles.
constexpr int kMinSplitTiles = 2;
// Where a batch invariant plan splits: at multiples of this position. A multiple of kAttendTileTokens.
constexpr int kFixedSplitTokens = 512;
// Requests with up to this many tiles of a decode kernel take it; longer ones the prefill kernel.
constexpr int kMaxDecodeTiles = 3;
constexpr int kMaxDecodeColumns = 16;

// A query tile: consecutive tokens against one range of KV positions, the same for every KV head.
struct GpuAttentionPlan::Tile {
  int32_t request, token_begin, num_tokens;
  int32_t kv_begin, kv_end;
  bool is_shared;  // its rows have other parts elsewhere

  int num_kv_tiles() const {
    return (kv_end + kAttendTileTokens - 1) / kAttendTileTokens - kv_begin / kAttendTileTokens;
  }
};

}  // namespace partita
