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
  bool contains(uintptr_t address, size_t bytes) {
    if (address >= begin_ && address + bytes <= end_) return true;
    return find(address, bytes);
  }
  // The library's own constants: tables of kernels.
  bool is_constant(uintptr_t address, size_t bytes) const;
  // "16 bytes past the end of kv_pool (4096 bytes)"
  std::string describe(uintptr_t address) const;

 private:
  bool find(uintptr_t address, size_t bytes);

  std::vector<Allocation> allocations_;  // by address
  uint64_t version_ = ~uint64_t{0};
  uintptr_t begin_ = 1, end_ = 0;  // the one used last
  uintptr_t image_begin_ = 0, image_end_ = 0;
};

}  // namespace partita::simt
