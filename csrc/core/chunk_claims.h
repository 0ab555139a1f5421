// Who works on which chunk of a stage.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace partita {

struct ClaimedChunk {
  int64_t chunk = 0;
  int64_t run_end = 0;  // the claimer is likely to claim the chunks up to here next: what it may prefetch
};

// Chunks [begin, end) of one worker: it takes them from the front, so that it streams through memory; a worker that has
// none left takes from the back of another's. One word, so that the two cannot cross: fewer than 2^32 chunks, which the
// tokens of a step times the rows of a matrix, thousands to a chunk, do not come near.
class alignas(64) ChunkRun {
 public:
  void open(int64_t begin, int64_t end) { range_.store(pack(begin, end), std::memory_order_relaxed); }

  bool take_front(ClaimedChunk* claimed) {
    uint64_t range = range_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t begin = first(range), end = last(range);
      if (begin >= end) return false;
      if (!range_.compare_exchange_weak(range, pack(begin + 1, end), std::memory_order_relaxed)) continue;
      *claimed = {begin, end};
      return true;
    }
  }

  bool take_back(ClaimedChunk* claimed) {
    uint64_t range = range_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t begin = first(range), end = last(range);
      if (begin >= end) return false;
      if (!range_.compare_exchange_weak(range, pack(begin, end - 1), std::memory_order_relaxed)) continue;
      *claimed = {end - 1, end};
      return true;
    }
  }

 private:
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  static int64_t first(uint64_t range) { return static_cast<int64_t>(range >> 32); }
  static int64_t last(uint64_t range) { return static_cast<int64_t>(range & 0xffffffffu); }

  std::atomic<uint64_t> range_{0};
};

// Where the run of worker `run` begins when num_chunks are cut into num_runs.
inline int64_t run_begin(int64_t num_chunks, int num_runs, int run) { return num_chunks * run / num_runs; }

inline void open_runs(ChunkRun* runs, int num_runs, int64_t num_chunks) {
  for (int run = 0; run < num_runs; ++run)
    runs[run].open(run_begin(num_chunks, num_runs, run), run_begin(num_chunks, num_runs, run + 1));
}

// With one run for several workers all take the lowest chunk that is left, and run_end says nothing.
inline bool claim_chunk(ChunkRun* runs, int num_runs, int worker_idx, ClaimedChunk* claimed) {
  const int own = worker_idx % num_runs;
  if (runs[own].take_front(claimed)) return true;
  for (int i = 1; i < num_runs; ++i)
    if (runs[(own + i) % num_runs].take_back(claimed)) return true;
  return false;
}

}  // namespace partita
