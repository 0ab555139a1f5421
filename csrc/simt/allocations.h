// Global memory as kernels see it: the registered allocations. Internal to csrc/simt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace partita::simt {

struct Allocation {
  uintptr_t begin, end;
  std::string label;
};

// One launch's view.
class GlobalMemory {
 public:
  void refresh();
  // `code`: the instruction that asks. It mostly touches the same allocation as the last time.
  bool contains(uintptr_t address, size_t bytes, const void* code) {
    Range& latest = latest_[(reinterpret_cast<uintptr_t>(code) >> 2) % kNumLatest];
    if (address >= latest.begin && address + bytes <= latest.end) return true;
    return find(address, bytes, latest);
  }
  // The library's own constants: tables of kernels.
  bool is_constant(uintptr_t address, size_t bytes) const;
  // "16 bytes past the end of kv_pool (4096 bytes)"
  std::string describe(uintptr_t address) const;

 private:
  struct Range {
    uintptr_t begin = 1, end = 0;
  };
  static constexpr size_t kNumLatest = 256;
  bool find(uintptr_t address, size_t bytes, Range& latest);

  std::vector<Allocation> allocations_;  // by address
  uint64_t version_ = ~uint64_t{0};
  Range latest_[kNumLatest];  // by instruction
  uintptr_t image_begin_ = 0, image_end_ = 0;
};

}  // namespace partita::simt
