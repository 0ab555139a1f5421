// What csrc/simt/device calls: the functions behind intrinsics and wrappers. They are compiled without instrumentation,
// so that their own loads and stores are not taken for the kernel's; what the kernel asks them to touch they check
// themselves. Small aggregates travel in registers, which keeps a kernel's fragments out of memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simt/site.h"

namespace partita::simt {

// Not zero-initialised: a CUDA vector type's members are what was put there.
struct Index3 {
  unsigned x, y, z;
};
template <typename T, int kCount>
struct Registers {
  T at[kCount];
};

// The running CUDA thread. These never change while it runs, so calls may be merged.
__attribute__((const)) Index3 thread_index();
__attribute__((const)) Index3 block_index();
__attribute__((const)) Index3 block_extent();
__attribute__((const)) Index3 grid_extent();
__attribute__((const)) unsigned lane_index();

// The block's shared memory; reports when the kernel's plan is larger than the launch asked for.
void* shared_memory(size_t bytes, size_t alignment);

// Warp collectives: a lane rests until every lane of `mask` that has not ended has come.
enum class Shuffle : uint8_t { kIndex, kUp, kDown, kXor };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int lane, int width, Site site);
enum class Vote : uint8_t { kBallot, kAny, kAll };
unsigned vote(Vote kind, unsigned mask, bool predicate, Site site);
void sync_warp(unsigned mask, Site site);

// Barriers of the block. `num_threads` 0: all that have not ended.
void block_barrier(Site site);
enum class BlockVote : uint8_t { kCount, kAnd, kOr };
int block_barrier_vote(BlockVote kind, bool predicate, Site site);
void named_barrier(int id, int num_threads, Site site);
void named_barrier_arrive(int id, int num_threads, Site site);

Registers<float, 4> mma_f16(Registers<float, 4> d, Registers<uint32_t, 4> a, Registers<uint32_t, 2> b, Site site);
Registers<float, 4> mma_bf16(Registers<float, 4> d, Registers<uint32_t, 4> a, Registers<uint32_t, 2> b, Site site);
enum class ByteSigns : uint8_t { kBothSigned, kAUnsigned, kBUnsigned };
Registers<int32_t, 4> mma_bytes(ByteSigns signs, Registers<int32_t, 4> d, Registers<uint32_t, 4> a,
                                Registers<uint32_t, 2> b, Site site);

// The first num_matrices registers are loaded.
Registers<uint32_t, 4> ldmatrix(int num_matrices, bool is_transposed, const void* shared_row, Site site);

void copy_async(void* shared, const void* global, int bytes, int source_bytes);
void copy_async_commit();
void copy_async_wait(int num_pending_groups, Site site);

// wgmma's way of reading shared memory, which is another than the threads': 32 bytes that this thread answers for. They
// are read until the wait that covers their group; who wrote them must have fenced since.
void read_async(const void* shared);
void read_async_commit();
void read_async_wait(int num_pending_groups, Site site);
void fence_async_proxy(Site site);

Registers<uint32_t, 4> load_global_16(const void* global);
Registers<uint32_t, 2> load_global_8(const void* global);
uint32_t load_global_4(const void* global);
void store_global_16(void* global, Registers<uint32_t, 4> value);
void store_global_8(void* global, Registers<uint32_t, 2> value);
void store_global_4(void* global, uint32_t value);

// A thread that polls lets others run first, other blocks included.
uint32_t load_acquire(const uint32_t* global);
void store_release(uint32_t* global, uint32_t value);

// Of global or shared memory; each returns the value before. One thread after another, but other OS threads may run
// launches on the same memory, so the host's atomics carry them out.
enum class Atomic : uint8_t { kAdd, kMin, kMax, kExchange, kAnd, kOr, kXor };
int32_t atomic_update(Atomic kind, int32_t* address, int32_t value);
uint32_t atomic_update(Atomic kind, uint32_t* address, uint32_t value);
uint64_t atomic_update(Atomic kind, uint64_t* address, uint64_t value);
float atomic_update(Atomic kind, float* address, float value);  // kAdd, kExchange
uint32_t atomic_compare_exchange(uint32_t* address, uint32_t expected, uint32_t wanted);
uint64_t atomic_compare_exchange(uint64_t* address, uint64_t expected, uint64_t wanted);

// A call that hands others the turn, for loops that poll.
void yield_to_others();

[[noreturn]] void trap(Site site);

}  // namespace partita::simt
