#include "simt/allocations.h"

#include <link.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "simt/code_address.h"
#include "simt/simt.h"

namespace partita::simt {
namespace {

std::mutex g_mutex;
std::map<uintptr_t, Allocation> g_allocations;
uint64_t g_version = 0;

struct Image {
  uintptr_t begin, end;
};

// The loaded segments of the library that the kernels are part of.
int find_image(dl_phdr_info* info, size_t, void* result) {
  auto* image = static_cast<Image*>(result);
  uintptr_t begin = ~uintptr_t{0}, end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    begin = std::min<uintptr_t>(begin, info->dlpi_addr + header.p_vaddr);
    end = std::max<uintptr_t>(end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
  }
  const auto here = reinterpret_cast<uintptr_t>(__ehdr_start);
  if (here < begin || here >= end) return 0;
  *image = {begin, end};
  return 1;
}

}  // namespace

void register_allocation(void* address, size_t bytes, const char* label) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  const auto begin = reinterpret_cast<uintptr_t>(address);
  g_allocations[begin] = {begin, begin + bytes, label};
  ++g_version;
}

void unregister_allocation(void* address) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_allocations.erase(reinterpret_cast<uintptr_t>(address));
  ++g_version;
}

void GlobalMemory::refresh() {
  if (image_end_ == 0) {
    Image image{0, 0};
    dl_iterate_phdr(&find_image, &image);
    image_begin_ = image.begin;
    image_end_ = image.end;
  }
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (version_ == g_version) return;
  version_ = g_version;
  for (Range& latest : latest_) latest = {};
  allocations_.clear();
  for (const auto& entry : g_allocations) allocations_.push_back(entry.second);
}

bool GlobalMemory::find(uintptr_t address, size_t bytes, Range& latest) {
  auto after = std::upper_bound(allocations_.begin(), allocations_.end(), address,
                                [](uintptr_t a, const Allocation& allocation) { return a < allocation.begin; });
  if (after == allocations_.begin()) return false;
  const Allocation& allocation = *--after;
  if (address + bytes > allocation.end) return false;
  latest = {allocation.begin, allocation.end};
  return true;
}

bool GlobalMemory::is_constant(uintptr_t address, size_t bytes) const {
  return address >= image_begin_ && address + bytes <= image_end_;
}

std::string GlobalMemory::describe(uintptr_t address) const {
  const Allocation* nearest = nullptr;
  uintptr_t distance = 1 << 20;
  bool is_before = false;
  for (const Allocation& allocation : allocations_) {
    if (address >= allocation.begin && address < allocation.end)
      return "at " + allocation.label + " + " + std::to_string(address - allocation.begin) + " (of " +
             std::to_string(allocation.end - allocation.begin) + " bytes)";
    const uintptr_t past = address >= allocation.end ? address - allocation.end : ~uintptr_t{0};
    const uintptr_t before = address < allocation.begin ? allocation.begin - address : ~uintptr_t{0};
    if (std::min(past, before) >= distance) continue;
    distance = std::min(past, before);
    nearest = &allocation;
    is_before = before < past;
  }
  char number[32];
  std::snprintf(number, sizeof number, "0x%zx", static_cast<size_t>(address));
  if (!nearest) return std::string("at ") + number + ", near no allocation";
  return std::to_string(distance) + " bytes " + (is_before ? "before the beginning of " : "past the end of ") +
         nearest->label + " (" + std::to_string(nearest->end - nearest->begin) + " bytes)";
}

}  // namespace partita::simt
