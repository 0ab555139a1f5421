// Where packed weights lie: large blocks on huge pages. A decode step streams every weight once; with 4 KB pages the
// stream stops at each page's end for a TLB miss (measured: 3 to 12 % of its bandwidth).
#pragma once

#include <cstddef>
#include <memory>

namespace partita {

// `bytes` of memory, 64-byte aligned. Allocations share blocks; a block is freed with its last allocation.
// Thread-safe. Throws std::bad_alloc.
std::shared_ptr<std::byte> allocate_packed_memory(size_t bytes);

}  // namespace partita
