// Kernel sources are compiled with the thread and alignment sanitizers' instrumentation, which puts a call before every
// plain load and store. These are the functions it calls, in place of the sanitizers' run times.
#include <cstddef>
#include <cstdint>

#include "simt/block.h"
#include "simt/memory_check.h"
#include "simt/report.h"

namespace {

using partita::simt::Access;
using partita::simt::current_thread;
using partita::simt::Thread;

// Host code of a kernel source (launch functions) runs outside any CUDA thread.
inline void check(const void* address, size_t bytes, Access kind, const void* code) {
  Thread* thread = current_thread;
  if (!thread) return;
  if (reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(thread->stack_low) <
      partita::simt::kStackBytes)
    return;
  partita::simt::check_access(*thread, address, bytes, kind, code);
}

}  // namespace

extern "C" {

#define PARTITA_SIMT_HOOKS(bytes)                                                                                 \
  void __tsan_read##bytes(void* address) { check(address, bytes, Access::kRead, __builtin_return_address(0)); }   \
  void __tsan_write##bytes(void* address) { check(address, bytes, Access::kWrite, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* address) {                                                              \
    check(address, bytes, Access::kRead, __builtin_return_address(0));                                            \
  }                                                                                                               \
  void __tsan_unaligned_write##bytes(void* address) {                                                             \
    check(address, bytes, Access::kWrite, __builtin_return_address(0));                                           \
  }                                                                                                               \
  void __tsan_volatile_read##bytes(void* address) {                                                               \
    check(address, bytes, Access::kRead, __builtin_return_address(0));                                            \
  }                                                                                                               \
  void __tsan_volatile_write##bytes(void* address) {                                                              \
    check(address, bytes, Access::kWrite, __builtin_return_address(0));                                           \
  }
PARTITA_SIMT_HOOKS(1)
PARTITA_SIMT_HOOKS(2)
PARTITA_SIMT_HOOKS(4)
PARTITA_SIMT_HOOKS(8)
PARTITA_SIMT_HOOKS(16)

void __tsan_read_range(void* address, size_t bytes) {
  check(address, bytes, Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  check(address, bytes, Access::kWrite, __builtin_return_address(0));
}
void __tsan_vptr_update(void* address, void*) { check(address, 8, Access::kWrite, __builtin_return_address(0)); }
void __tsan_vptr_read(void* address) { check(address, 8, Access::kRead, __builtin_return_address(0)); }

void __tsan_init() {}

// Host code's atomics (reference counts); kernels have CUDA's, which are checked. Always sequentially consistent.
#define PARTITA_SIMT_HOST_ATOMICS(bits, type)                                                                        \
  type __tsan_atomic##bits##_load(const volatile type* address, int) { return __atomic_load_n(address, 5); }         \
  void __tsan_atomic##bits##_store(volatile type* address, type value, int) { __atomic_store_n(address, value, 5); } \
  type __tsan_atomic##bits##_exchange(volatile type* address, type value, int) {                                     \
    return __atomic_exchange_n(address, value, 5);                                                                   \
  }                                                                                                                  \
  type __tsan_atomic##bits##_fetch_add(volatile type* address, type value, int) {                                    \
    return __atomic_fetch_add(address, value, 5);                                                                    \
  }                                                                                                                  \
  type __tsan_atomic##bits##_fetch_sub(volatile type* address, type value, int) {                                    \
    return __atomic_fetch_sub(address, value, 5);                                                                    \
  }                                                                                                                  \
  type __tsan_atomic##bits##_fetch_and(volatile type* address, type value, int) {                                    \
    return __atomic_fetch_and(address, value, 5);                                                                    \
  }                                                                                                                  \
  type __tsan_atomic##bits##_fetch_or(volatile type* address, type value, int) {                                     \
    return __atomic_fetch_or(address, value, 5);                                                                     \
  }                                                                                                                  \
  type __tsan_atomic##bits##_fetch_xor(volatile type* address, type value, int) {                                    \
    return __atomic_fetch_xor(address, value, 5);                                                                    \
  }                                                                                                                  \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* address, type* expected, type wanted, int, int) { \
    return __atomic_compare_exchange_n(address, expected, wanted, false, 5, 5);                                      \
  }                                                                                                                  \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile type* address, type* expected, type wanted, int, int) {   \
    return __atomic_compare_exchange_n(address, expected, wanted, false, 5, 5);                                      \
  }
PARTITA_SIMT_HOST_ATOMICS(8, uint8_t)
PARTITA_SIMT_HOST_ATOMICS(16, uint16_t)
PARTITA_SIMT_HOST_ATOMICS(32, uint32_t)
PARTITA_SIMT_HOST_ATOMICS(64, uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(5); }
void __tsan_atomic_signal_fence(int) {}

// A function of the kernel begins: the stack must hold its frame and those of what it calls here.
void __tsan_func_entry(void*) {
  Thread* thread = current_thread;
  if (!thread) return;
  constexpr ptrdiff_t kReserve = 8 * 1024;
  if (static_cast<char*>(__builtin_frame_address(0)) - thread->stack_low < kReserve)
    partita::simt::report(*thread, __builtin_return_address(0), "used up its stack of %zu bytes",
                          partita::simt::kStackBytes);
}
void __tsan_func_exit() {}

// An address that is not a multiple of its type's alignment.
struct TypeDescription {
  uint16_t kind, info;
  char name[1];
};
struct SourcePlace {
  const char* file;
  uint32_t line, column;
};
struct TypeMismatch {
  SourcePlace place;
  const TypeDescription* type;
  uint8_t log_alignment;
  uint8_t check_kind;
};
void __ubsan_handle_type_mismatch_v1(TypeMismatch* mismatch, uintptr_t address) {
  Thread* thread = current_thread;
  if (!thread) return;
  partita::simt::report(*thread, __builtin_return_address(0),
                        "misaligned %s of a %s at address 0x%zx, wanted a multiple of %u",
                        mismatch->check_kind == 1 ? "write" : "read", mismatch->type->name,
                        static_cast<size_t>(address), 1u << mismatch->log_alignment);
}

}  // extern "C"
