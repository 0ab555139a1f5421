// Memory as kernels touch it: plain accesses are checked here, wrappers' accesses are checked and carried out.
#include <cstdlib>
#include <cstring>

#include "simt/block.h"
#include "simt/executor.h"
#include "simt/memory_check.h"
#include "simt/report.h"

namespace partita::simt {
namespace {

const char* name_of(Access kind) {
  return kind == Access::kRead ? "read" : kind == Access::kAtomic ? "atomic" : "write";
}

bool is_shared(const Thread& thread, const void* address) {
  return static_cast<const char*>(address) - thread.block->shared >= 0 &&
         static_cast<size_t>(static_cast<const char*>(address) - thread.block->shared) < kMaxSharedBytes;
}

bool is_own_stack(const Thread& thread, const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(thread.stack_low) < kStackBytes;
}

[[noreturn]] void report_outside(Thread& thread, const void* address, size_t bytes, Access kind, const void* code) {
  current_thread = nullptr;
  char where[512];
  std::snprintf(where, sizeof where, "%s",
                thread.block->executor->memory.describe(reinterpret_cast<uintptr_t>(address)).c_str());
  report(thread, code, "%s of %zu bytes out of bounds: %s", name_of(kind), bytes, where);
}

}  // namespace

void check_access(Thread& thread, const void* address, size_t bytes, Access kind, const void* code) {
  if (is_own_stack(thread, address)) return;
  Executor& executor = *thread.block->executor;
  ++executor.num_checked;
  if (is_shared(thread, address)) {
    const auto offset = static_cast<size_t>(static_cast<const char*>(address) - thread.block->shared);
    thread.block->shadow.access(thread, offset, bytes, kind, code);
    return;
  }
  const auto where = reinterpret_cast<uintptr_t>(address);
  if (executor.memory.contains(where, bytes, code)) return;
  if (kind == Access::kRead && executor.memory.is_constant(where, bytes)) return;
  report_outside(thread, address, bytes, kind, code);
}

void check_global(Thread& thread, const void* address, size_t bytes, Access kind, const void* code) {
  Executor& executor = *thread.block->executor;
  ++executor.num_checked;
  const auto where = reinterpret_cast<uintptr_t>(address);
  if (where % bytes != 0)
    report(thread, code, "misaligned %s of %zu bytes at address 0x%zx", name_of(kind), bytes,
           static_cast<size_t>(where));
  if (executor.memory.contains(where, bytes, code)) return;
  if (kind == Access::kRead && executor.memory.is_constant(where, bytes)) return;
  if (is_shared(thread, address))
    report(thread, code, "%s of %zu bytes: got an address in shared memory, wanted global", name_of(kind), bytes);
  report_outside(thread, address, bytes, kind, code);
}

size_t shared_offset(Thread& thread, const void* address, size_t bytes, size_t alignment, const void* code) {
  if (!is_shared(thread, address)) {
    current_thread = nullptr;
    report(thread, code, "access of %zu bytes: got %p, wanted an address in shared memory", bytes, address);
  }
  const auto offset = static_cast<size_t>(static_cast<const char*>(address) - thread.block->shared);
  if (offset % alignment != 0)
    report(thread, code, "misaligned: shared memory + %zu, wanted a multiple of %zu", offset, alignment);
  return offset;
}

void check_shared_row(Thread& thread, const void* address, const void* code) {
  ++thread.block->executor->num_checked;
  thread.block->shadow.access(thread, shared_offset(thread, address, 16, 16, code), 16, Access::kRead, code, true);
}

// ---- the running thread --------------------------------------------------------------------------------------------

Index3 thread_index() { return current_thread->index; }
Index3 block_index() { return current_thread->block->index; }
Index3 block_extent() {
  const Dim3 extent = current_thread->block->launch->block;
  return {extent.x, extent.y, extent.z};
}
Index3 grid_extent() {
  const Dim3 extent = current_thread->block->launch->grid;
  return {extent.x, extent.y, extent.z};
}
unsigned lane_index() { return current_thread->lane; }

void* shared_memory(size_t bytes, size_t alignment) {
  Thread& thread = *current_thread;
  if (bytes > thread.block->shared_bytes || alignment > 1024)
    report(thread, __builtin_return_address(0),
           "shared memory: the plan takes %zu bytes aligned to %zu, the launch gave %zu aligned to 1024", bytes,
           alignment, thread.block->shared_bytes);
  return thread.block->shared;
}

void yield_to_others() { poll(*current_thread); }

void trap(Site site) {
  char here[256];
  report(*current_thread, nullptr, "__trap at %s", describe(site, here));
}

// ---- loads and stores of global memory -----------------------------------------------------------------------------

namespace {

template <typename T>
T load(const void* global, const void* code) {
  check_global(*current_thread, global, sizeof(T), Access::kRead, code);
  T value;
  std::memcpy(&value, global, sizeof value);
  return value;
}

template <typename T>
void store(void* global, T value, const void* code) {
  check_global(*current_thread, global, sizeof(T), Access::kWrite, code);
  std::memcpy(global, &value, sizeof value);
}

}  // namespace

Registers<uint32_t, 4> load_global_16(const void* global) {
  return load<Registers<uint32_t, 4>>(global, __builtin_return_address(0));
}
Registers<uint32_t, 2> load_global_8(const void* global) {
  return load<Registers<uint32_t, 2>>(global, __builtin_return_address(0));
}
uint32_t load_global_4(const void* global) { return load<uint32_t>(global, __builtin_return_address(0)); }
void store_global_16(void* global, Registers<uint32_t, 4> value) { store(global, value, __builtin_return_address(0)); }
void store_global_8(void* global, Registers<uint32_t, 2> value) { store(global, value, __builtin_return_address(0)); }
void store_global_4(void* global, uint32_t value) { store(global, value, __builtin_return_address(0)); }

// ---- between threads -----------------------------------------------------------------------------------------------

uint32_t load_acquire(const uint32_t* global) {
  Thread& thread = *current_thread;
  check_global(thread, global, 4, Access::kRead, __builtin_return_address(0));
  poll(thread);
  return __atomic_load_n(global, __ATOMIC_ACQUIRE);
}

void store_release(uint32_t* global, uint32_t value) {
  Thread& thread = *current_thread;
  check_global(thread, global, 4, Access::kWrite, __builtin_return_address(0));
  __atomic_store_n(global, value, __ATOMIC_RELEASE);
  ++thread.block->progress;
}

namespace {

template <typename T>
void check_atomic(const T* address, const void* code) {
  Thread& thread = *current_thread;
  const auto where = reinterpret_cast<uintptr_t>(address);
  if (where % sizeof(T) != 0)
    report(thread, code, "misaligned atomic of %zu bytes at address 0x%zx", sizeof(T), static_cast<size_t>(where));
  if (is_own_stack(thread, address)) report(thread, code, "atomic: got an address of the thread's own local memory");
  check_access(thread, address, sizeof(T), Access::kAtomic, code);
}

template <typename T>
T combine(Atomic kind, T old, T value) {
  switch (kind) {
    case Atomic::kMin:
      return value < old ? value : old;
    case Atomic::kMax:
      return old < value ? value : old;
    case Atomic::kExchange:
      return value;
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (kind == Atomic::kAnd) return old & value;
    if (kind == Atomic::kOr) return old | value;
    if (kind == Atomic::kXor) return old ^ value;
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<Unsigned>(old) + static_cast<Unsigned>(value));
  } else {
    return old + value;
  }
}

template <typename T>
T update(Atomic kind, T* address, T value) {
  T old, wanted;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do wanted = combine(kind, old, value);
  while (!__atomic_compare_exchange(address, &old, &wanted, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
  // An update that leaves what was there may be a thread's way of polling.
  if (std::memcmp(&old, &wanted, sizeof old) == 0) poll(*current_thread);
  return old;
}

template <typename T>
T compare_exchange(T* address, T expected, T wanted) {
  if (!__atomic_compare_exchange_n(address, &expected, wanted, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
    poll(*current_thread);
  return expected;
}

}  // namespace

int32_t atomic_update(Atomic kind, int32_t* address, int32_t value) {
  check_atomic(address, __builtin_return_address(0));
  return update(kind, address, value);
}
uint32_t atomic_update(Atomic kind, uint32_t* address, uint32_t value) {
  check_atomic(address, __builtin_return_address(0));
  return update(kind, address, value);
}
uint64_t atomic_update(Atomic kind, uint64_t* address, uint64_t value) {
  check_atomic(address, __builtin_return_address(0));
  return update(kind, address, value);
}
float atomic_update(Atomic kind, float* address, float value) {
  check_atomic(address, __builtin_return_address(0));
  return update(kind, address, value);
}
uint32_t atomic_compare_exchange(uint32_t* address, uint32_t expected, uint32_t wanted) {
  check_atomic(address, __builtin_return_address(0));
  return compare_exchange(address, expected, wanted);
}
uint64_t atomic_compare_exchange(uint64_t* address, uint64_t expected, uint64_t wanted) {
  check_atomic(address, __builtin_return_address(0));
  return compare_exchange(address, expected, wanted);
}

// ---- cp.async ------------------------------------------------------------------------------------------------------

void copy_async(void* shared, const void* global, int bytes, int source_bytes) {
  Thread& thread = *current_thread;
  const void* code = __builtin_return_address(0);
  const auto size = static_cast<size_t>(bytes);
  if (source_bytes < 0 || source_bytes > bytes)
    report(thread, code, "cp.async: src_bytes got %d, wanted 0..%d", source_bytes, bytes);
  const size_t offset = shared_offset(thread, shared, size, size, code);
  if (source_bytes > 0) {
    const auto where = reinterpret_cast<uintptr_t>(global);
    if (where % size != 0)
      report(thread, code, "misaligned cp.async of %d bytes from address 0x%zx", bytes, static_cast<size_t>(where));
    ++thread.block->executor->num_checked;
    if (!thread.block->executor->memory.contains(where, static_cast<size_t>(source_bytes), code))
      report_outside(thread, global, static_cast<size_t>(source_bytes), Access::kRead, code);
  }
  thread.block->shadow.access(thread, offset, size, Access::kCopyIssue, code);
  if (thread.num_copies == thread.copies_capacity) {
    thread.copies_capacity = thread.copies_capacity == 0 ? 64 : 2 * thread.copies_capacity;
    thread.copies = static_cast<AsyncCopy*>(std::realloc(thread.copies, thread.copies_capacity * sizeof(AsyncCopy)));
    if (!thread.copies) std::abort();
  }
  thread.copies[thread.num_copies++] = {static_cast<uint32_t>(offset), static_cast<uint8_t>(bytes),
                                        static_cast<uint8_t>(source_bytes), thread.num_groups, global};
}

void copy_async_commit() { ++current_thread->num_groups; }

void copy_async_wait(int num_pending_groups, Site site) {
  Thread& thread = *current_thread;
  if (skip_site(thread, site)) return;
  // Copies of groups before this one arrive. What was not committed yet belongs to no group and does not.
  const uint32_t pending = static_cast<uint32_t>(num_pending_groups);
  const uint32_t end_group = thread.num_groups > pending ? thread.num_groups - pending : 0;
  uint32_t done = 0;
  for (; done < thread.num_copies && thread.copies[done].group < end_group; ++done) {
    const AsyncCopy& copy = thread.copies[done];
    char* target = thread.block->shared + copy.shared_offset;
    std::memcpy(target, copy.source, copy.source_bytes);
    std::memset(target + copy.source_bytes, 0, static_cast<size_t>(copy.bytes - copy.source_bytes));
    thread.block->shadow.finish_copy(thread, copy.shared_offset, copy.bytes);
  }
  thread.num_copies -= done;
  std::memmove(thread.copies, thread.copies + done, thread.num_copies * sizeof(AsyncCopy));
  maybe_preempt(thread);
}

// ---- wgmma's reads -------------------------------------------------------------------------------------------------

void read_async(const void* shared) {
  Thread& thread = *current_thread;
  const void* code = __builtin_return_address(0);
  constexpr size_t kBytes = kAsyncReadBytes;
  const size_t offset = shared_offset(thread, shared, kBytes, kBytes, code);
  thread.block->shadow.begin_async_read(thread, offset, kBytes, code);
  if (thread.num_reads == thread.reads_capacity) {
    thread.reads_capacity = thread.reads_capacity == 0 ? 64 : 2 * thread.reads_capacity;
    thread.reads = static_cast<AsyncRead*>(std::realloc(thread.reads, thread.reads_capacity * sizeof(AsyncRead)));
    if (!thread.reads) std::abort();
  }
  thread.reads[thread.num_reads++] = {static_cast<uint32_t>(offset), thread.num_read_groups, code};
}

void read_async_commit() { ++current_thread->num_read_groups; }

void read_async_wait(int num_pending_groups, Site site) {
  Thread& thread = *current_thread;
  if (skip_site(thread, site)) return;
  const uint32_t pending = static_cast<uint32_t>(num_pending_groups);
  const uint32_t end_group = thread.num_read_groups > pending ? thread.num_read_groups - pending : 0;
  uint32_t done = 0;
  for (; done < thread.num_reads && thread.reads[done].group < end_group; ++done)
    thread.block->shadow.end_async_read(thread, thread.reads[done].shared_offset, kAsyncReadBytes,
                                        thread.reads[done].code);
  thread.num_reads -= done;
  std::memmove(thread.reads, thread.reads + done, thread.num_reads * sizeof(AsyncRead));
  maybe_preempt(thread);
}

void fence_async_proxy(Site site) {
  Thread& thread = *current_thread;
  if (skip_site(thread, site)) return;
  thread.proxy_fence = ++thread.block->clocks.now;
}

}  // namespace partita::simt
