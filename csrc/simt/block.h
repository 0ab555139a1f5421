// The state of a block that runs: its threads, warps, barriers, shared memory. Internal to csrc/simt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "simt/device_calls.h"
#include "simt/fiber.h"
#include "simt/shared_shadow.h"
#include "simt/simt.h"

namespace partita::simt {

constexpr uint32_t kWarpLanes = 32;
constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kMaxWarps = kMaxThreads / kWarpLanes;
constexpr uint32_t kNumBarriers = 16;
constexpr size_t kStackBytes = 64 * 1024;

struct Block;
struct Warp;
struct Thread;
class Executor;

enum class Waiting : uint8_t { kNo, kCollective, kWarpAtBarrier, kBarrier, kEnded };

// What a lane brings to a collective; what it takes away lies in the same place.
union Operands {
  struct {
    uint64_t value;
    int32_t lane;
  } shuffle;
  struct {
    Registers<float, 4> d;
    Registers<uint32_t, 4> a;
    Registers<uint32_t, 2> b;
  } mma;
  struct {
    Registers<int32_t, 4> d;
    Registers<uint32_t, 4> a;
    Registers<uint32_t, 2> b;
  } mma_bytes;
  struct {
    const void* row;
    const void* caller;
    Registers<uint32_t, 4> loaded;
  } ldmatrix;
  struct {
    BlockVote kind;
    int32_t value;
  } vote;
};

// A copy under way. `group` counts the commits before it.
struct AsyncCopy {
  uint32_t shared_offset;
  uint8_t bytes, source_bytes;
  uint32_t group;
  const void* source;
};

// Bytes that a wgmma under way may still read.
constexpr size_t kAsyncReadBytes = 32;
struct AsyncRead {
  uint32_t shared_offset;
  uint32_t group;
  const void* code;  // the call
};

struct Thread {
  FiberState fiber;
  char* stack_low;
  Warp* warp;
  Block* block;
  uint32_t lane;
  uint32_t linear_index;
  Index3 index;
  Waiting waiting;
  Site wait_site;
  Operands operands;

  // cp.async, oldest first.
  AsyncCopy* copies;
  uint32_t num_copies, copies_capacity, num_groups;

  // wgmma, oldest first.
  AsyncRead* reads;
  uint32_t num_reads, reads_capacity, num_read_groups;
  uint32_t proxy_fence;  // the clock after its latest fence_async_proxy
};

// Lanes that have come to an instruction of several lanes; `complete` stands for the instruction.
struct Collective {
  uint32_t mask, arrived;
  void (*complete)(Warp& warp, uint32_t lanes, int parameter);
  int parameter;
  Site site;
};

struct Warp {
  Block* block;
  Thread* threads;  // [32], a last, short warp's last ones unused
  uint32_t index;
  uint32_t lanes, alive, runnable;  // it has; of these not ended; of these not waiting
  uint32_t polling;                 // runnable lanes that wait for others to write what they poll
  Collective pending[kWarpLanes];
  uint32_t num_pending;
  // Lanes gathering for a barrier of the block, to which a warp comes whole.
  struct {
    uint32_t lanes;
    int id, num_threads;
    bool is_waiting;
    Site site;
  } gather;
};

struct Barrier {
  uint32_t num_warps, num_threads;  // arrived; wanted, 0: all
  uint32_t waiting[kMaxWarps];      // lanes
  uint32_t joined[kMaxWarps];       // what those who wait will know
  int32_t count;                    // of true predicates
  int32_t votes;
};

struct Block {
  Block();
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const LaunchRecord* launch;
  Executor* executor;
  Index3 index;
  char* shared;
  size_t shared_bytes;
  uint32_t num_threads, num_warps, num_alive, num_alive_warps;
  char* stacks;
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  Barrier barriers[kNumBarriers];
  Clocks clocks;
  SharedShadow shadow;
  bool is_stopped;    // something was reported
  uint64_t progress;  // collectives, barriers and ends: tells a block that polls from one that works
};

// The CUDA thread that runs on this OS thread, or null. A plain initial-exec variable: every load and store of a kernel
// reads it.
extern __thread Thread* current_thread __attribute__((tls_model("initial-exec")));

// Executor's services for the running thread.
void rest(Thread& thread, Waiting waiting, Site site);  // until another makes it runnable
void poll(Thread& thread);                              // let all others run once
void maybe_preempt(Thread& thread);                     // seeded orders: now and then another warp goes first
void run_again(Warp& warp, uint32_t lanes);
[[noreturn]] void abandon(Thread& thread);  // the block ends here; never returns, unwinds nothing

// Whether this barrier or wait is switched off; notes that it was reached.
bool skip_site(Thread& thread, Site site);

// Checks what the end of a lane may have completed.
void lane_ended(Thread& thread);

}  // namespace partita::simt
