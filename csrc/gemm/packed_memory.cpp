#include "gemm/packed_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>

namespace partita {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;
constexpr size_t kBlockBytes = size_t{32} << 20;  // address space; pages are taken as they are written

size_t round_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

class Block {
 public:
  explicit Block(size_t bytes) : bytes_(bytes), mapped_bytes_(bytes + kHugePageBytes) {
    mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    data_ = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<size_t>(mapping_), kHugePageBytes));
#if defined(MADV_HUGEPAGE)
    madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: where it is refused the pages are small and all else holds
#endif
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { munmap(mapping_, mapped_bytes_); }

  std::byte* take(size_t bytes) {
    if (bytes > bytes_ - used_) return nullptr;
    std::byte* taken = data_ + used_;
    used_ += bytes;
    return taken;
  }

 private:
  size_t bytes_;
  size_t mapped_bytes_;
  size_t used_ = 0;
  void* mapping_ = nullptr;
  std::byte* data_ = nullptr;
};

std::mutex g_mutex;
std::weak_ptr<Block> g_open_block;  // the block that small allocations go to

}  // namespace

std::shared_ptr<std::byte> allocate_packed_memory(size_t bytes) {
  const size_t rounded = round_up(std::max<size_t>(bytes, 1), 64);
  if (rounded >= kBlockBytes / 2) {
    const auto block = std::make_shared<Block>(round_up(rounded, kHugePageBytes));
    return {block, block->take(rounded)};
  }
  const std::lock_guard<std::mutex> lock(g_mutex);
  std::shared_ptr<Block> block = g_open_block.lock();
  std::byte* data = block ? block->take(rounded) : nullptr;
  if (!data) {
    block = std::make_shared<Block>(kBlockBytes);
    g_open_block = block;
    data = block->take(rounded);
  }
  return {block, data};
}

}  // namespace partita
