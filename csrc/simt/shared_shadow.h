// What is known of every byte of a block's shared memory: whether it was written, who wrote and read it last, and when;
// and which threads have synchronised since. Two accesses of different threads to one byte, one of them a write, race
// unless a barrier of both lies between. Internal to csrc/simt.
//
// Time is a counter that every completed barrier advances. A barrier teaches its threads each other's accesses up to
// now: for __syncthreads that is one number for the block, for a full __syncwarp one for the warp, for named barriers a
// number for each pair of warps, for a __syncwarp of part of a warp one for each pair of its lanes. What is learned is
// passed on, so pipelines of named barriers are followed as they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace partita::simt {

struct Thread;

struct Clocks {
  static constexpr uint32_t kWarps = 32, kLanes = 32;
  uint32_t now, block_sync;
  uint32_t warp_sync[kWarps];
  uint32_t known[kWarps][kWarps];                  // [who knows, of whom]
  std::unique_ptr<uint32_t[]> lane_known[kWarps];  // [who knows, of whom], once a part of the warp met
  bool has_lane_known[kWarps];

  void reset();
  void sync_block() { block_sync = ++now; }
  void sync_warp(uint32_t warp) { warp_sync[warp] = ++now; }
  void sync_lanes(uint32_t warp, uint32_t lanes);
  // A barrier of some warps. One that arrives adds what it knows, and what it did up to now, to `joined`; one that
  // waited learns that when the barrier opens.
  void arrive(uint32_t warp, uint32_t (&joined)[kWarps]);
  void learn(uint32_t warps, const uint32_t (&joined)[kWarps]);
};

enum class Access : uint8_t { kRead, kWrite, kAtomic, kCopyIssue };

class SharedShadow {
 public:
  void reset(size_t shared_bytes, uint32_t num_warps);

  // Reports an access that is out of bounds, uninitialised, of bytes under way, or a race. `code`: where in the kernel.
  // With is_whole_warp every lane of the thread's warp reads what the one thread names.
  void access(Thread& thread, size_t offset, size_t bytes, Access kind, const void* code, bool is_whole_warp = false);
  // The copy's bytes have arrived.
  void finish_copy(Thread& thread, size_t offset, size_t bytes);
  // Whole words that a wgmma begins to read and has read. Until then nobody writes them; what was written to them
  // before was followed by its writer's fence_async_proxy.
  void begin_async_read(Thread& thread, size_t offset, size_t bytes, const void* code);
  void end_async_read(Thread& thread, size_t offset, size_t bytes, const void* code);

 private:
  // Who reads or writes: lanes of one warp.
  struct Who {
    uint32_t warp, lanes;
  };
  // 4 bytes, or, once threads have touched parts of them, one. Of a warp's reads that no barrier orders the time of the
  // latest counts for all.
  struct Cell {
    uint32_t write_time, read_time;  // write_time with kAtomics, read_time with kManyWarps: the index of a set
    uint32_t write_code, read_code;
    uint32_t read_lanes;
    uint16_t writer;  // warp << 8 | lane
    uint8_t reader_warp;
    uint8_t flags;
  };
  // Reads or atomics of one warp. A set has one for each warp, and one for the plain write before the atomics.
  struct Group {
    uint32_t time, code, lanes;
  };

  static bool is_ordered(const Clocks& clocks, Who me, Who other, uint32_t time);
  void access_cell(Thread& thread, Cell& cell, size_t offset, size_t bytes, Access kind, uint32_t code, Who who);
  void note_read(const Clocks& clocks, Cell& cell, uint32_t code, Who who);
  void note_atomic(const Clocks& clocks, Cell& cell, uint32_t code, Who who);
  Group* set(uint32_t index) { return sets_ + size_t{index} * (num_warps_ + 1); }
  void split(size_t word);
  uint32_t take_set();
  void copy_set(uint32_t& index);
  void check_order(Thread& thread, const char* kind, size_t offset, size_t bytes, uint32_t code, Who who,
                   const char* other_kind, Who other, const Group& group);
  void check_proxy(Thread& thread, const Cell& cell, size_t offset, const void* code);

  size_t shared_bytes_ = 0;
  uint32_t num_warps_ = 0;
  std::unique_ptr<Cell[]> words_;
  std::unique_ptr<Cell[]> bytes_;
  std::unique_ptr<uint16_t[]> async_reads_;  // of each word, under way
  uint64_t num_async_reads_ = 0;
  size_t words_capacity_ = 0;
  Group* sets_ = nullptr;  // [num_sets, num_warps + 1]
  uint32_t num_sets_ = 0;
  size_t sets_capacity_ = 0;  // in groups
  uint32_t* free_sets_ = nullptr;
  uint32_t num_free_sets_ = 0;

 public:
  SharedShadow() = default;
  SharedShadow(const SharedShadow&) = delete;
  SharedShadow& operator=(const SharedShadow&) = delete;
  ~SharedShadow();
};

}  // namespace partita::simt
