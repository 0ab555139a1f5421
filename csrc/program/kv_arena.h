// The bytes of all KV pages: one arena for every KV group, every lane. Which page belongs to whom is
// the scheduler's business (scheduler/page_pool.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention/attention.h"
#include "core/gpu.h"

namespace partita {

class KvArena {
 public:
  // On the CPU it reserves address space only; a page costs memory once it is written. On a GPU it takes the device's
  // memory at once; the bytes of a page are the same. Throws ValueError on a bad layout or page count and RuntimeError
  // when the memory cannot be had.
  KvArena(std::vector<KvGroupLayout> groups, int64_t num_pages, std::shared_ptr<Gpu> gpu = nullptr);
  ~KvArena();
  KvArena(const KvArena&) = delete;
  KvArena& operator=(const KvArena&) = delete;

  const std::vector<KvGroupLayout>& groups() const { return groups_; }
  int64_t num_pages() const { return num_pages_; }
  int page_size() const { return groups_[0].page_size; }
  size_t page_bytes() const { return page_bytes_; }  // of the widest group, a multiple of 64
  const std::shared_ptr<Gpu>& gpu() const { return gpu_; }
  std::byte* data() const { return data_; }  // of its device
  std::byte* page(int64_t page_id) const { return data_ + page_id * page_bytes_; }
  void copy_page(int64_t source, int64_t target) const;
  // The bytes of one page, wherever the arena lies; waits for the device's default stream.  out: [page_bytes]
  void read_page(int64_t page_id, std::byte* out) const;
  // Gives the memory of all pages back to the system; their contents are lost. A GPU's arena keeps it.
  void release_memory();

 private:
  std::vector<KvGroupLayout> groups_;
  std::shared_ptr<Gpu> gpu_;
  int64_t num_pages_;
  size_t page_bytes_ = 0;
  std::byte* data_ = nullptr;
  GpuBuffer device_memory_;
};

}  // namespace partita
