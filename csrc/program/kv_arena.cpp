#include "program/kv_arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "core/check.h"

namespace partita {

KvArena::KvArena(std::vector<KvGroupLayout> groups, int64_t num_pages, std::shared_ptr<Gpu> gpu)
    : groups_(std::move(groups)), gpu_(std::move(gpu)), num_pages_(num_pages) {
  PARTITA_CHECK(!groups_.empty(), "groups: got none, wanted at least one KV group");
  PARTITA_CHECK(num_pages > 0, "num_pages: got ", num_pages, ", wanted a positive number");
  for (const KvGroupLayout& group : groups_) {
    group.check();
    PARTITA_CHECK(group.page_size == groups_[0].page_size, "page_size: got ", group.page_size, " and ",
                  groups_[0].page_size, ", wanted the same in every KV group");
    page_bytes_ = std::max(page_bytes_, group.page_bytes());
  }
  page_bytes_ = (page_bytes_ + 63) / 64 * 64;
  if (gpu_) {
    device_memory_ = GpuBuffer(gpu_, page_bytes_ * num_pages_, "KV arena");
    data_ = device_memory_.data();
    return;
  }
  void* memory = mmap(nullptr, page_bytes_ * num_pages_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED)
    throw std::runtime_error(
        concat("KV arena: mmap of ", page_bytes_ * num_pages_, " bytes failed: ", std::strerror(errno)));
  data_ = static_cast<std::byte*>(memory);
  // Attention walks whole pages of some hundred KiB: huge pages save most of its TLB misses.
  madvise(data_, page_bytes_ * num_pages_, MADV_HUGEPAGE);
}

KvArena::~KvArena() {
  if (data_ && !gpu_) munmap(data_, page_bytes_ * num_pages_);
}

void KvArena::copy_page(int64_t source, int64_t target) const {
  PARTITA_CHECK(source >= 0 && source < num_pages_ && target >= 0 && target < num_pages_, "copy_page: got ", source,
                " -> ", target, ", wanted pages 0 to ", num_pages_ - 1);
  PARTITA_CHECK(!gpu_, "copy_page: the arena lies on a GPU");
  std::memcpy(page(target), page(source), page_bytes_);
}

void KvArena::read_page(int64_t page_id, std::byte* out) const {
  PARTITA_CHECK(page_id >= 0 && page_id < num_pages_, "page_id: got ", page_id, ", wanted 0 to ", num_pages_ - 1);
  if (!gpu_) {
    std::memcpy(out, page(page_id), page_bytes_);
    return;
  }
  gpu_->copy(out, page(page_id), page_bytes_, GpuCopy::kDeviceToHost, gpu_->default_stream());
  gpu_->synchronize(gpu_->default_stream());
}

void KvArena::release_memory() {
  if (!gpu_) madvise(data_, page_bytes_ * num_pages_, MADV_DONTNEED);
}

}  // namespace partita
