// Asking memory for the K and V that a worker reads next. Pages are scattered, so no hardware prefetcher sees the next
// tile coming; asking for all of it at once fills the line fill buffers and stalls the core until memory has answered.
// So the lines of one tile are listed ahead of the arithmetic, past the end of the item into the first tile of the item
// that this worker probably runs next, and every inner loop asks for a few of them in each turn.
//
// Asked for into L2: 14 GB/s on one core where L1 gave 11. Prefetches never fault, and page tables are read only at
// positions that some query sees. A call in the loops that finds the next lines when they are needed lost: it spills
// the accumulators.
#pragma once

#include "attention/cpu/attend_kernel.h"

namespace partita {
namespace {

inline int64_t visible_begin(const AttendTask& task) {
  return task.window > 0 && task.first_position >= task.window ? task.first_position - task.window + 1 : 0;
}
inline int64_t visible_end(const AttendTask& task) { return task.first_position + task.num_rows / task.group; }
// The positions that the task's splits cover, from the first tile's begin.
inline int64_t walk_begin(const AttendTask& task) {
  const int64_t split = int64_t{task.split_begin} * kKvSplitTokens;
  const int64_t tile = visible_begin(task) / kKvTileTokens * kKvTileTokens;
  return split > tile ? split : tile;
}
inline int64_t walk_end(const AttendTask& task) {
  const int64_t split = int64_t{task.split_end} * kKvSplitTokens;
  return split < visible_end(task) ? split : visible_end(task);
}

inline const std::byte* page_of(const AttendTask& task, int64_t position, size_t* slot) {
  *slot = static_cast<size_t>(position) & (task.page_size - 1);  // a power of two
  return task.arena + task.page_table[position >> __builtin_ctz(task.page_size)] * task.arena_page_bytes;
}

inline bool has_params(KvCodec codec) {
  return codec == KvCodec::kInt8 || codec == KvCodec::kInt4Rotated || codec == KvCodec::kInt4Plain;
}

// The lines of one tile's K and V that are asked for.
inline int tile_lines(const AttendTask& task) {
  return static_cast<int>((task.k.row_bytes + task.v.row_bytes) * kKvTileTokens / 64);
}
// Room for them: less than a tile of fp32 is left when one more is listed, whose tail may end within a line.
constexpr size_t listed_lines(int head_dim) { return 16 * static_cast<size_t>(head_dim) + 16; }

class LinesAhead {
 public:
  // From the task's second tile on, then the first tile of `next` (or none). lines: room for listed_lines().
  LinesAhead(const AttendTask& task, const AttendTask* next, int per_turn, const std::byte** lines)
      : task_(&task), next_(next), per_turn_(per_turn), lines_(lines), tile_start_(walk_begin(task)) {}

  // A few more of them, while there are any.
  void turn() { ask(per_turn_); }
  void ask(int num_lines) {
    const int stop = at_ + num_lines < count_ ? at_ + num_lines : count_;
    for (; at_ < stop; ++at_) __builtin_prefetch(lines_[at_], 0, 2);
  }

  // Before each tile: lists on until a whole tile is waiting.
  void list(int num_wanted) {
    int left = 0;
    for (; at_ < count_; ++at_) lines_[left++] = lines_[at_];
    at_ = 0;
    count_ = left;
    while (count_ < num_wanted && task_) list_tile();
  }

 private:
  void list_tile() {
    tile_start_ += kKvTileTokens;
    if (tile_start_ >= walk_end(*task_)) {
      task_ = is_next_ ? nullptr : next_;
      is_next_ = true;
      if (!task_) return;
      tile_start_ = walk_begin(*task_);
    }
    list_stream(task_->k, walk_end(*task_) - tile_start_);
    list_stream(task_->v, walk_end(*task_) - tile_start_);
    if (is_next_) task_ = nullptr;
  }

  void list_stream(const KvStream& stream, int64_t num_left) {
    const int num_tokens = static_cast<int>(num_left < kKvTileTokens ? num_left : kKvTileTokens);
    for (int token = 0; token < num_tokens;) {
      size_t slot;
      const std::byte* page = page_of(*task_, tile_start_ + token, &slot);
      const int in_page = task_->page_size - static_cast<int>(slot);
      const int run = num_tokens - token < in_page ? num_tokens - token : in_page;
      const std::byte* at = page + stream.codes_offset + slot * stream.row_bytes;
      const int num_lines = static_cast<int>((run * stream.row_bytes + 63) / 64);
      for (int i = 0; i < num_lines; ++i) lines_[count_ + i] = at + 64 * i;
      count_ += num_lines;
      if (has_params(stream.codec))
        for (int t = 0; t < run; t += 16) __builtin_prefetch(page + stream.params_offset + 4 * (slot + t), 0, 2);
      token += run;
    }
  }

  const AttendTask* task_;  // null: everything is listed
  const AttendTask* next_;
  bool is_next_ = false;
  int per_turn_;
  int at_ = 0, count_ = 0;
  const std::byte** lines_;
  int64_t tile_start_;
};

}  // namespace
}  // namespace partita
