#include "attention/attention_plan.h"

#include <algorithm>

#include "attention/cpu/attend_kernel.h"
#include "core/check.h"

namespace partita {
namespace {

// A step is cut into about this many items: enough for 16 workers to end together.
constexpr int kTargetItems = 48;
// Tiles with more query rows are never split over KV: their partials would cost more than they balance.
constexpr int kMaxSplitRows = 32;
// Loading a tile costs about as much as this many query rows computing on it.
constexpr int kTileLoadRows = 4;
constexpr size_t kCounterBytes = 64;  // a cache line each
// A shared tile costs at least 1.5 items' worth, so fewer than kTargetItems are shared. Room for the most is always
// kept: the counters of one plan then never lie where another plan of the same workspace had partials.
constexpr size_t kCounterRegionBytes = kTargetItems * kCounterBytes;

// Sum over positions first..last of the KV tokens each sees.
double visible_pairs(int64_t first, int64_t last, int window) {
  double pairs = 0;
  if (window > 0 && last >= window) {
    const int64_t full_from = std::max<int64_t>(first, window);
    pairs += static_cast<double>(last - full_from + 1) * window;
    last = full_from - 1;
  }
  return pairs + 0.5 * static_cast<double>(last - first + 1) * static_cast<double>(first + last + 2);
}

int tile_tokens(int group) { return std::max(1, kMaxQueryRows / group); }

}  // namespace

AttentionPlan::AttentionPlan() = default;
AttentionPlan::~AttentionPlan() = default;
AttentionPlan::AttentionPlan(AttentionPlan&&) noexcept = default;
AttentionPlan& AttentionPlan::operator=(AttentionPlan&&) noexcept = default;

void AttentionPlan::build(const KvGroupLayout& layout, int num_q_heads, const AttentionBatch& batch) {
  PARTITA_CHECK(num_q_heads >= 1 && num_q_heads % layout.num_kv_heads == 0, "num_q_heads: got ", num_q_heads,
                ", wanted a multiple of num_kv_heads = ", layout.num_kv_heads);
  const int group = num_q_heads / layout.num_kv_heads;
  const int max_tile_tokens = tile_tokens(group);
  items_.clear();
  tiles_.clear();
  score_pairs_ = 0;
  double total_cost = 0;
  int max_rows = group;

  for (int request = 0; request < batch.num_requests; ++request) {
    const int32_t row_end = batch.cu_seqlens_q[request + 1];
    const int64_t start = batch.context_starts[request];
    const int32_t row_start = batch.cu_seqlens_q[request];
    for (int32_t row = row_start; row < row_end; row += max_tile_tokens) {
      Tile tile;
      tile.request = request;
      tile.token_begin = row;
      tile.token_end = std::min(row_end, row + max_tile_tokens);
      const int64_t first = start + (row - row_start);
      const int64_t last = start + (tile.token_end - 1 - row_start);
      const int64_t visible_begin = layout.window > 0 && first >= layout.window ? first - layout.window + 1 : 0;
      tile.first_split = static_cast<int32_t>(visible_begin / kKvSplitTokens);
      tile.num_splits = static_cast<int32_t>(last / kKvSplitTokens) + 1 - tile.first_split;
      const int rows = (tile.token_end - tile.token_begin) * group;
      max_rows = std::max(max_rows, rows);
      const int64_t num_kv_tiles = last / kKvTileTokens + 1 - visible_begin / kKvTileTokens;
      tile.cost = static_cast<float>(num_kv_tiles * (rows + kTileLoadRows));
      total_cost += static_cast<double>(tile.cost) * layout.num_kv_heads;
      score_pairs_ += visible_pairs(first, last, layout.window);
      tiles_.push_back(tile);
    }
  }

  // Dearest first: the last items to be claimed are the short ones.
  std::stable_sort(tiles_.begin(), tiles_.end(), [](const Tile& a, const Tile& b) { return a.cost > b.cost; });

  const double target_cost = std::max(1.0, total_cost / kTargetItems);
  int32_t num_counters = 0;
  size_t partials_bytes = 0;
  for (const Tile& tile : tiles_) {
    const int rows = (tile.token_end - tile.token_begin) * group;
    int num_items = 1;
    if (rows <= kMaxSplitRows)
      num_items = std::clamp(static_cast<int>(tile.cost / target_cost + 0.5), 1, static_cast<int>(tile.num_splits));
    for (int kv_head = 0; kv_head < layout.num_kv_heads; ++kv_head) {
      Item item;
      item.request = tile.request;
      item.kv_head = kv_head;
      item.token_begin = tile.token_begin;
      item.token_end = tile.token_end;
      item.first_split = tile.first_split;
      item.num_splits = tile.num_splits;
      item.num_items = num_items;
      item.counter_idx = num_items > 1 ? num_counters++ : -1;
      item.partials_offset = partials_bytes;
      for (int i = 0; i < num_items; ++i) {
        item.split_begin = tile.first_split + static_cast<int32_t>(int64_t{tile.num_splits} * i / num_items);
        item.split_end = tile.first_split + static_cast<int32_t>(int64_t{tile.num_splits} * (i + 1) / num_items);
        items_.push_back(item);
      }
      if (num_items > 1) partials_bytes += sizeof(float) * partial_floats(rows, layout.head_dim) * tile.num_splits;
    }
  }
  for (Item& item : items_) item.partials_offset += kCounterRegionBytes;
  workspace_bytes_ = num_counters > 0 ? kCounterRegionBytes + partials_bytes : 0;
  worker_scratch_bytes_ = active_attend_kernel().scratch_bytes(max_rows, layout.head_dim);
}

int64_t AttentionPlan::num_chunks() const { return static_cast<int64_t>(items_.size()); }
size_t AttentionPlan::workspace_bytes() const { return workspace_bytes_; }
size_t AttentionPlan::counter_bytes() const { return workspace_bytes_ > 0 ? kCounterRegionBytes : 0; }
size_t AttentionPlan::worker_scratch_bytes() const { return worker_scratch_bytes_; }
const AttentionPlan::Item& AttentionPlan::item(int64_t chunk) const { return items_[chunk]; }
double AttentionPlan::score_pairs() const { return score_pairs_; }

size_t max_attend_scratch_bytes(const KvGroupLayout& layout, int num_q_heads) {
  const int group = num_q_heads / layout.num_kv_heads;
  return active_attend_kernel().scratch_bytes(tile_tokens(group) * group, layout.head_dim);
}

}  // namespace partita
