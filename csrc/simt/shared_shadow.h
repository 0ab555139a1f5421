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
#include <vector>

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
  // `waiting` learn of `arrived`, which include them, what these had done by their release times.
  void sync_warps(uint32_t waiting, uint32_t arrived, const uint32_t* release_times);
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

 private:
  // 4 bytes, or, once threads have touched parts of them, one.
  struct Cell {
    uint32_t write_time, read_time;  // read_time: with kReaderSet the set's index
    uint32_t write_code, read_code;
    uint16_t writer, reader;  // warp << 8 | lane
    uint8_t flags;
  };
  struct Reader {
    uint32_t time;
    uint32_t code;
    uint16_t who;
  };

  void access_cell(Thread& thread, Cell& cell, size_t offset, size_t bytes, Access kind, uint32_t code, uint16_t who);
  void note_read(Thread& thread, Cell& cell, uint32_t code, uint16_t who);
  void split(size_t word);
  uint32_t take_reader_set();

  size_t shared_bytes_ = 0;
  uint32_t num_warps_ = 0;
  std::unique_ptr<Cell[]> words_;
  std::unique_ptr<Cell[]> bytes_;
  size_t words_capacity_ = 0;
  Reader* reader_sets_ = nullptr;  // [num_sets, num_warps]
  uint32_t num_reader_sets_ = 0;
  size_t reader_sets_capacity_ = 0;  // in readers
  uint32_t* free_sets_ = nullptr;
  uint32_t num_free_sets_ = 0;

 public:
  SharedShadow() = default;
  SharedShadow(const SharedShadow&) = delete;
  SharedShadow& operator=(const SharedShadow&) = delete;
  ~SharedShadow();
};

}  // namespace partita::simt
