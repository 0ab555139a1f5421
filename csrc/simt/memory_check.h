// Checks of what a kernel touches. Internal to csrc/simt. `code`: where in the kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simt/block.h"

namespace partita::simt {

// Any address: the thread's own stack, the block's shared memory, global memory, constants (reads).
void check_access(Thread& thread, const void* address, size_t bytes, Access kind, const void* code);
// As a wrapper of an instruction for global memory demands, aligned to its size.
void check_global(Thread& thread, const void* address, size_t bytes, Access kind, const void* code);
// One row of ldmatrix, read by the whole warp.
void check_shared_row(Thread& thread, const void* address, const void* code);

// The offset in the block's shared memory; reports when it lies outside or is not a multiple of the alignment.
size_t shared_offset(Thread& thread, const void* address, size_t bytes, size_t alignment, const void* code);

}  // namespace partita::simt
