// Pages of a GPU's arena moved as they lie: copied inside it (copy-on-write), swapped to the host and back
// (preemption).
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/gpu.h"
#include "core/kernel_registry.h"

namespace partita {

struct CopyPagesParams {
  std::byte* arena = nullptr;          // page p starts at arena + p * page_bytes
  size_t page_bytes = 0;               // a multiple of 16, as the address is
  const int32_t* pairs = nullptr;      // [max_pairs, 2] (source, target) page ids, device; -1 in a pair: skipped
  const int32_t* num_pairs = nullptr;  // [1] device: pairs past it are not read; null: all max_pairs
  int64_t max_pairs = 0;               // the launch's size, so that a captured graph serves any count
};
// No page may be the target of two pairs, or the target of one and the source of another: pairs run at once.
// Throws ValueError that names the field, and RuntimeError where the device's library lacks the kernel.
void copy_pages(Gpu& gpu, const CopyPagesParams& params, GpuStream stream);

// Pages device_page_ids[i] of the arena <-> pages host_page_ids[i] of the host's.
struct SwapPagesParams {
  std::byte* arena = nullptr;
  size_t page_bytes = 0;
  std::byte* host_arena = nullptr;           // pinned (Gpu::allocate_pinned); page p at host_arena + p * page_bytes
  const int32_t* device_page_ids = nullptr;  // [num_pages] host memory
  const int32_t* host_page_ids = nullptr;    // [num_pages] host memory; null: 0, 1, ..
  int64_t num_pages = 0;
};
// The copy engine moves them, so no SM is taken from what runs beside; pages that are neighbours on both sides go in
// one copy, in the order of the lists: of two pages with one target the later stays. Returns before the copies are done
// (host memory that is not pinned is staged, which may wait); returns their number. The lists are read before it
// returns. Throws ValueError that names the argument; page ids past an arena's end are the caller's to refuse.
int64_t swap_pages_out(Gpu& gpu, const SwapPagesParams& params, GpuStream stream);  // device -> host
int64_t swap_pages_in(Gpu& gpu, const SwapPagesParams& params, GpuStream stream);   // host -> device

struct CopyPagesKernel {
  static constexpr const char* kFamily = "copy_pages";
  KernelInfo info;
  void (*launch)(const CopyPagesParams& params, void* stream);
};

}  // namespace partita
